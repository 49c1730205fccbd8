"""Attacks that know that a purifier chooses its noise level t* by the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.autoattack import AutoAttackRand
from purify.attacks.base import Attack
from purify.attacks.norms import unit
from purify.attacks.pgd import PGD, Evaluator, mixed
from purify.attacks.protocols import VARYING_LEVEL, Feature
from purify.attacks.threats import NORMS
from purify.checks import is_number
from purify.purification.calls import calls
from purify.transforms import run_plainly


class Weighted(Attack):
    """An attack with a ``norm_weight``, which its label names."""

    norm_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.norm_weight):
            raise ValueError(f"norm_weight must be a finite number, got {self.norm_weight}.")

    @property
    def label(self) -> str:
        return f"{super().label}({self.norm_weight:g})"

    def gradient_calls(self, model: nn.Module) -> int:
        own = calls(model)  # the statistic has a way back of its own
        return own.gradient + own.statistic


class ConstantLevel(Attack):
    """An attack that takes each image's noise level t* for a constant in its gradient."""

    needs: ClassVar[Feature[Any] | str | None] = VARYING_LEVEL
    exact_gradient: ClassVar[bool] = False

    def attacked(self, model: nn.Module) -> nn.Module:
        return VARYING_LEVEL.of(model).with_gradient(through_level=False)


@dataclass(frozen=True)
class ConstantLevelPGD(ConstantLevel, PGD):
    """PGD+EOT that takes each image's noise level t* for a constant in its gradient.

    Plain ``pgd-eot`` goes through t*(x). What this attack leaves standing beyond that is what evaluations of
    sample-specific noise levels overlook if they ignore that gradient.
    """

    name: ClassVar[str] = "pgd-eot-constant-t"


@dataclass(frozen=True)
class ConstantLevelAutoAttackRand(ConstantLevel, AutoAttackRand):
    """AutoAttack's ``rand`` with each image's noise level t* taken for a constant in its gradient."""

    name: ClassVar[str] = "autoattack-rand-constant-t"


@dataclass(frozen=True)
class NormPGD(Weighted, PGD):
    """PGD+EOT through t*(x) that also lowers (or raises) the statistic behind t*; for SSNI the score norm.

    It climbs along loss gradient - ``norm_weight`` * statistic gradient, each of unit L2 norm, in steps of L2 length:
    signs of a gradient would themselves be the noise that the score norm detects. So there is a way to smaller noise
    even where t* is clipped, and the weight carries over between models. It starts at the clean image, whose t* is
    small. The best iterate is chosen by the loss alone.

    Args:
        norm_weight: positive lowers the statistic, negative raises it.
        step_size: mean L2 length of a step; default: a sixth of the L2 radius of the threat model's ball.
    """

    random_start: bool = False
    norm_weight: float = 0.3

    name: ClassVar[str] = "pgd-eot-norm"
    terms: ClassVar[int] = 2
    threats: ClassVar[tuple[str, ...]] = NORMS  # its steps have an L2 length of the ball's
    needs: ClassVar[Feature[Any] | str | None] = VARYING_LEVEL

    def evaluator(self, model: nn.Module, seed: int) -> Evaluator:
        varying = VARYING_LEVEL.of(model)

        def evaluate(images: Tensor, y: Tensor, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            details = varying.details(images, sample_ids=ids, draw=draws, seed=seed)
            return self.objective(details.logits, y), details.statistic.mean(1)

        return evaluate

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        return unit(mixed(gradients, -self.norm_weight))

    def mean_step(self, x: Tensor) -> float:
        if self.step_size is not None:
            return self.step_size
        radius = self.eps * (math.sqrt(x[0].numel()) if self.norm == "Linf" else 1.0)
        return radius / 6


class Lowering(nn.Module):
    """A model whose gradient is mixed with that of its statistic as in :class:`NormPGD`; its values are the model's.

    The mixture has the length of the loss gradient, so that draws weigh in EOT as they do without it.
    """

    def __init__(self, model: nn.Module, norm_weight: float) -> None:
        super().__init__()
        self.model, self.norm_weight = model, norm_weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        z = x.clone()
        with run_plainly():  # graphs of torch.compile are gone back through once
            details = VARYING_LEVEL.of(self.model).details(z)
        (statistic,) = torch.autograd.grad(details.statistic.sum(), z, retain_graph=True)

        def mix(gradient: Tensor) -> Tensor:
            length = gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            return length * mixed((gradient, statistic), -self.norm_weight)

        z.register_hook(mix)
        return details.logits


@dataclass(frozen=True)
class NormAutoAttackRand(Weighted, AutoAttackRand):
    """AutoAttack's ``rand`` that also lowers (or raises) the statistic behind t*, mixed in as in ``pgd-eot-norm``.

    Its steps in L_inf are signs of a gradient, which the score norm detects: expect less of it than of
    ``pgd-eot-norm`` there.

    Args:
        norm_weight: positive lowers the statistic, negative raises it.
    """

    norm_weight: float = 0.3

    name: ClassVar[str] = "autoattack-rand-norm"
    needs: ClassVar[Feature[Any] | str | None] = VARYING_LEVEL

    def attacked(self, model: nn.Module) -> nn.Module:
        return Lowering(model, self.norm_weight)


@dataclass(frozen=True)
class LowLevelPGD(NormPGD):
    """``pgd-eot-norm`` with the gradient of the loss at a share of the present noise level.

    At a large t* the loss falls along images that never get to a small one, and those that deceive the purifier at a
    small t* look useless there. Here the way down is that of the purifier with less noise, while the statistic is
    lowered; the best iterate is chosen by the loss of the purifier itself.

    Args:
        share: of t*(x), in (0, 1], at which the loss is differentiated.
    """

    norm_weight: float = 1.0
    share: float = 0.7

    name: ClassVar[str] = "pgd-eot-low-level"
    exact_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise ValueError(f"share must lie in (0, 1], got {self.share}.")

    def gradient_calls(self, model: nn.Module) -> int:
        return super().gradient_calls(model) + calls(model).forward  # the loss is that of t*(x) itself

    def evaluator(self, model: nn.Module, seed: int) -> Evaluator:
        true = super().evaluator(model, seed)
        low = super().evaluator(VARYING_LEVEL.of(model).at_share(self.share), seed)

        def evaluate(*arguments: Tensor) -> tuple[Tensor, ...]:
            if not torch.is_grad_enabled():
                return true(*arguments)
            with torch.no_grad():
                value = true(*arguments)[0]
            loss, statistic = low(*arguments)
            return loss + (value - loss).detach(), statistic

        return evaluate
