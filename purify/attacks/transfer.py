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

    @property
    def gradients(self) -> int:
        return 0

    @property
    def forwards(self) -> int:
        return 0

    def attacked(self, model: Any) -> nn.Module:
        return model.classifier

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "eot": 1}


@dataclass(frozen=True)
class GuideTransfer(Transfer):
    """PGD on the auxiliary network that guides the reverse steps, judged behind the purifier.

    Whoever deceives that network has the purification guided towards the wrong meaning.
    """

    name: ClassVar[str] = "guide-transfer"
    needs_guidance: ClassVar[bool] = True

    def applies_to(self, model: Any) -> bool:
        return super().applies_to(model) and self.attacked(model) is not None

    def attacked(self, model: Any) -> nn.Module:
        return model.purifier.auxiliary


@dataclass(frozen=True)
class GuideStartPGD(PGD):
    """PGD+EOT that starts where :class:`GuideTransfer` ends.

    Strong guidance makes the gradient of the whole rough; what deceives the auxiliary network is beyond the roughness.
    """

    name: ClassVar[str] = "pgd-eot-guide-start"
    needs_guidance: ClassVar[bool] = True

    def applies_to(self, model: Any) -> bool:
        return super().applies_to(model) and model.purifier.auxiliary is not None

    def first(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor:
        return GuideTransfer(self.norm, self.eps, steps=self.steps).run(model, x, y, ids, seed).images
