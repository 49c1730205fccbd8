"""PGD from where another attack ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from purify.attacks.pgd import PGD


@dataclass(frozen=True)
class ContinuedPGD(PGD):
    """PGD+EOT whose first run starts at given images; further restarts start at random.

    Args:
        start: images (N, C, H, W) of the samples that are attacked, in the ball around them; None: at random.
    """

    start: Tensor | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "pgd-eot-continued"

    def first(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor | None:
        return self.start

    def budget(self) -> dict[str, Any]:
        parts = super().budget()
        del parts["start"]  # data, no setting
        return parts
