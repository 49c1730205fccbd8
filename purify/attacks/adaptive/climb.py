"""A climb with momentum: few draws per step, averaged over steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.level import NormPGD
from purify.attacks.losses import LOSSES
from purify.attacks.norms import unit
from purify.attacks.pgd import PGD, STEP_SCHEDULES, Target
from purify.checks import is_number


@dataclass(frozen=True)
class Climb(PGD):
    """The steps of PGD+EOT along an average of the gradients so far, so that each may have few draws.

    A gradient that is zero leaves the average's direction: the climb goes on.

    Args:
        momentum: share of the average that the past keeps, in [0, 1).
        scaled: every draw's gradient at length 1 before they are averaged, for those with heavy tails.
    """

    eot: int = 2
    momentum: float = 0.9
    scaled: bool = False

    name: ClassVar[str] = "climb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}.")

    def average(self, gradients: Tensor) -> Tensor:
        return super().average(unit(gradients.flatten(0, 2)).reshape(gradients.shape) if self.scaled else gradients)

    def path(self, target: Target, start: Tensor, mix: Mix | None = None) -> Iterator[Tensor]:
        """Every iterate after ``start``; ``mix``: whose gradient is added."""
        x, y, z = target.x, target.y, start
        past: list[Tensor] = []
        for step in range(self.steps):
            _, gradients = self._eot(target, z, step * self.eot)
            if mix is not None:
                gradients[0] = mix(gradients[0], z, y)
            past = [self.momentum * p + g for p, g in zip(past, gradients, strict=True)] if past else gradients
            size = self.mean_step(x) * STEP_SCHEDULES[self.schedule](step / self.steps)
            z = self.project(z + size * self.direction(past, z, x), x)
            yield z


@dataclass(frozen=True)
class LevelClimb(Climb, NormPGD):
    """A climb that also lowers the statistic behind t*(x), as ``pgd-eot-norm``: in steps of L2 length."""

    norm_weight: float = 1.0

    name: ClassVar[str] = "climb-norm"


@dataclass(frozen=True)
class Mix:
    """Adds the gradient of another network's margin: ``g^ + weight * a^``, each of unit length."""

    network: nn.Module
    weight: float = 0.5

    def __call__(self, gradient: Tensor, z: Tensor, y: Tensor) -> Tensor:
        images = z.detach().requires_grad_()
        with torch.enable_grad():
            loss = LOSSES["margin"](self.network(images), y).sum()
        (other,) = torch.autograd.grad(loss, images)
        return unit(gradient) + self.weight * unit(other)
