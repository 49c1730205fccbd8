"""The attack of somebody who does not know about the purifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from purify.attacks.base import AttackResult
from purify.attacks.pgd import PGD


@dataclass(frozen=True)
class Transfer(PGD):
    """PGD on the bare classifier, judged behind the purifier.

    A sanity check: where it beats the white-box attacks, their gradient is masked.
    """

    name: ClassVar[str] = "transfer"
    needs_purifier: ClassVar[bool] = True
    black_box: ClassVar[bool] = True

    def run(self, model: Any, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        return PGD.run(replace(self, eot=1), model, x, y, ids, seed)  # the bare classifier has no randomness

    def attacked(self, model: Any) -> nn.Module:
        return model.classifier

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "eot": 1}
