"""Something random of the attack's size: what is lost without any attacker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.base import Attack, AttackResult
from purify.attacks.threats import THREATS
from purify.diffusion.noise import Noise


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Uniform noise in the L_inf ball; on the sphere for L2 and L1. Stands beside attacks for comparison.

    In a perceptual distance noise as large as may be, in ``flow`` a random field.
    """

    name: ClassVar[str] = "random-noise"
    threats: ClassVar[tuple[str, ...]] = tuple(THREATS)
    black_box: ClassVar[bool] = True
    takes_gradient: ClassVar[bool] = False

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        ball = THREATS[self.norm]
        point = ball.enter(x)
        uniform = Noise.keyed(seed, ids).stream("attack").uniform(0, point.shape[1:], x.dtype)
        images, sizes = ball.leave(ball.start(point, self.eps, uniform))
        return AttackResult(images, torch.full((len(x),), float("nan"), device=x.device), sizes=sizes)
