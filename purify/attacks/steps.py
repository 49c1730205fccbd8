"""PGD+EOT that also attacks the intermediate steps of the purification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from purify.attacks.pgd import PGD, Evaluator, mixed
from purify.attacks.protocols import IN_STEP, Feature
from purify.checks import is_number
from purify.purification.calls import calls


@dataclass(frozen=True)
class StepsPGD(PGD):
    """PGD+EOT with the deviated-reconstruction loss of DiffAttack (Kang et al. 2023) beside its own.

    It climbs along loss gradient + ``step_weight`` * gradient of the reverse process's deviation from the forward one
    (:class:`~purify.purification.process.Deviation`), each of unit L2 norm: intermediate states have a gradient even
    where the final loss is flat. The best iterate is chosen by the loss alone.
    """

    step_weight: float = 0.3

    name: ClassVar[str] = "pgd-eot-steps"
    terms: ClassVar[int] = 2
    needs: ClassVar[Feature[Any] | str | None] = IN_STEP

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.step_weight):
            raise ValueError(f"step_weight must be a finite number, got {self.step_weight}.")

    def evaluator(self, model: nn.Module, seed: int) -> Evaluator:
        in_step = IN_STEP.of(model)

        def evaluate(images: Tensor, y: Tensor, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
            details = in_step.details(images, sample_ids=ids, draw=draws, seed=seed, deviation=True)
            assert details.deviation is not None
            return self.objective(details.logits, y), details.deviation.mean(1)

        return evaluate

    def gradient_calls(self, model: nn.Module) -> int:
        own = calls(model)  # each term has a way back
        return 2 * own.gradient - own.forward

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        return self.ball.direction(mixed(gradients, self.step_weight), z, x)
