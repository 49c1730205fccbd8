"""Random noise of the attack's size: what is lost without any attacker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.base import Attack, AttackResult
from purify.attacks.norms import BALLS
from purify.diffusion.noise import Noise


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Uniform noise in the L_inf ball; on the sphere for L2 and L1. Stands beside attacks for comparison."""

    name: ClassVar[str] = "random-noise"
    black_box: ClassVar[bool] = True
    takes_gradient: ClassVar[bool] = False

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        uniform = Noise.keyed(seed, ids).stream("attack").uniform(0, x.shape[1:], x.dtype)
        images = BALLS[self.norm].start(x, self.eps, uniform)
        return AttackResult(images, torch.full((len(x),), float("nan"), device=x.device))
