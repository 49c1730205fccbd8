"""The attack of somebody who does not know about the purifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.base import AttackResult, keyed
from purify.attacks.pgd import PGD, Evaluator, mixed
from purify.attacks.protocols import AUXILIARY, BARE_CLASSIFIER, Feature
from purify.checks import is_number
from purify.purification.calls import calls


@dataclass(frozen=True)
class Transfer(PGD):
    """PGD on the bare classifier, judged behind the purifier.

    A sanity check: where it beats the white-box attacks, their gradient is masked.
    """

    name: ClassVar[str] = "transfer"
    needs: ClassVar[Feature[Any] | str | None] = BARE_CLASSIFIER
    black_box: ClassVar[bool] = True
    exact_gradient: ClassVar[bool] = False

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        return PGD.run(self.alone, model, x, y, ids, seed)

    @property
    def alone(self) -> Transfer:
        """The attack as it runs: the other network has no randomness."""
        return replace(self, eot=1, sparsity=None)

    @property
    def gradients(self) -> int:
        return 0

    @property
    def forwards(self) -> int:
        return 0

    @property
    def counted(self) -> int:
        return self.runs * self.steps  # of the other network

    def gradient_calls(self, model: nn.Module) -> int:
        return calls(self.attacked(model)).gradient  # of the other network

    def other_calls(self, model: nn.Module) -> int:
        asked = self.runs + self.aim.asks
        return self.counted * self.gradient_calls(model) + asked * calls(self.attacked(model)).forward

    def attacked(self, model: nn.Module) -> nn.Module:
        return BARE_CLASSIFIER.of(model).classifier

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "eot": 1}


def guide_of(model: nn.Module) -> nn.Module:
    """The network that guides the model's purifier, as a classifier of images."""
    auxiliary = AUXILIARY.of(model).auxiliary
    if auxiliary is None:
        raise ValueError(AUXILIARY.refusal("An attack on the guide", model))
    return auxiliary


@dataclass(frozen=True)
class GuideTransfer(Transfer):
    """PGD on the auxiliary network that guides the reverse steps, judged behind the purifier.

    Whoever deceives that network has the purification guided towards the wrong meaning.
    """

    name: ClassVar[str] = "guide-transfer"
    needs: ClassVar[Feature[Any] | str | None] = AUXILIARY

    def attacked(self, model: nn.Module) -> nn.Module:
        return guide_of(model)


@dataclass(frozen=True)
class GuidePGD(PGD):
    """PGD+EOT on a guided purifier and on the network that guides it: where :class:`GuideTransfer` ends, it begins.

    It climbs along the gradient of the whole plus ``guide_weight`` times that of the auxiliary network's loss, each of
    unit L2 norm: where guidance makes the former rough, the latter is smooth. The best iterate is chosen by the loss of
    the whole.

    Args:
        step_size: mean step length in the norm; default eps / 4, because it starts where it should be.
    """

    guide_weight: float = 1.0

    name: ClassVar[str] = "pgd-eot-guide"
    terms: ClassVar[int] = 2
    needs: ClassVar[Feature[Any] | str | None] = AUXILIARY

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.guide_weight):
            raise ValueError(f"guide_weight must be a finite number, got {self.guide_weight}.")

    @property
    def counted(self) -> int:
        return self.gradients + self.aim.turns * self.steps  # those of its starts

    def gradient_calls(self, model: nn.Module) -> int:
        return calls(model).gradient + calls(guide_of(model)).gradient

    def other_calls(self, model: nn.Module) -> int:
        starts = self.aim.turns * GuideTransfer(self.norm, self.eps, steps=self.steps).other_calls(model)
        return starts + self.runs * self.eot * calls(guide_of(model)).forward

    def first(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor:
        other = GuideTransfer(self.norm, self.eps, steps=self.steps, goal=self.goal).alone
        target = other.target(model, x, y, ids, seed)
        return other.climb(target, None, AttackResult(x, torch.full((len(x),), -torch.inf, device=x.device))).images

    def evaluator(self, model: nn.Module, seed: int) -> Evaluator:
        whole, auxiliary, loss = keyed(model, seed), guide_of(model), self.objective

        def evaluate(images: Tensor, y: Tensor, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            return loss(whole(images, ids, draws), y), loss(auxiliary(images), y)

        return evaluate

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        return self.ball.direction(mixed(gradients, self.guide_weight), z, x)

    def mean_step(self, x: Tensor) -> float:
        return self.ball.step(self.eps) / 4 if self.step_size is None else self.step_size
