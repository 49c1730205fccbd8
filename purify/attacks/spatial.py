"""Spatial attacks: pixels are moved, not changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from purify.attacks.base import AttackResult
from purify.attacks.flowfield import FlowBall, parted
from purify.attacks.norms import Ball
from purify.attacks.pgd import PGD, Target
from purify.attacks.transfer import Transfer
from purify.checks import is_number


@dataclass(frozen=True)
class SpatialPGD(PGD):
    """PGD+EOT on a flow field (stAdv, Xiao et al. 2018), no pixel of which is moved further than ``eps`` pixels.

    It climbs the loss less ``smoothness`` times the field's roughness, which is the paper's objective with EOT. The
    paper has no bound on the displacement and goes by L-BFGS; here every pixel steps as far as the schedule says, and
    the field is brought back to the bound. The best iterate is chosen by the loss alone. Records say how far pixels
    were moved (``flow``) and how rough the field is (``roughness``).

    Args:
        smoothness: weight of the roughness, tau in the paper.
    """

    smoothness: float = 0.05

    name: ClassVar[str] = "spatial-eot"
    threats: ClassVar[tuple[str, ...]] = ("flow",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.smoothness) and self.smoothness >= 0):
            raise ValueError(f"smoothness must be a number of at least 0, got {self.smoothness}.")

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        found = super().run(model, self.ball.enter(x), y, ids, seed)
        images, sizes = self.ball.leave(found.images)
        return replace(found, images=images, sizes=sizes)

    @property
    def ball(self) -> Ball:
        return FlowBall(self.smoothness)

    def _eot(
        self, target: Target, z: Tensor, first_draw: int, with_gradient: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        return super()._eot(target, parted(z)[0], first_draw, with_gradient)  # gradients are those of images

    def _asked(self, model: nn.Module, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        return super()._asked(model, parted(x)[0], ids, seed)


@dataclass(frozen=True)
class SpatialTransfer(SpatialPGD, Transfer):
    """``spatial-eot`` on the bare classifier, judged behind the purifier."""

    name: ClassVar[str] = "spatial-transfer"
