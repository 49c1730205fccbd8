"""Attacks as papers ran them, where a recipe needs more than a budget: to compare with, not to quote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from purify.attacks.pgd import PGD, Target
from purify.attacks.threats import NORMS


@dataclass(frozen=True)
class LeeKimPGD(PGD):
    """PGD+EOT of Lee & Kim 2023 (arXiv 2303.09051): equal steps on cross-entropy, from the clean image, to the last.

    It returns the last iterate, whatever its loss.
    """

    steps: int = 200
    eot: int = 20
    step_size: float | None = 0.007
    schedule: str = "constant"
    random_start: bool = False
    loss: str = "ce"

    name: ClassVar[str] = "pgd-eot-lee-kim"
    threats: ClassVar[tuple[str, ...]] = NORMS

    def _iterates(self, target: Target, restart: int, first: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        *_, last = super()._iterates(target, restart, first)
        yield last
