"""One attack to quote: what a purifier's own description asks for, within a budget of network calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.adaptive.climb import Climb
from purify.attacks.adaptive.phases import GUIDE_STEPS, Stage, stages
from purify.attacks.adaptive.select import Winner
from purify.attacks.apgd import APGD
from purify.attacks.base import Attack, AttackResult, keyed
from purify.attacks.norms import BALLS
from purify.attacks.pgd import PGD
from purify.attacks.transfer import GuideTransfer
from purify.checks import check_count
from purify.diffusion.noise import Noise, derive_seed
from purify.purification.calls import GRADIENT, calls

ALONE = 602  # calls on a model without randomness: 100 steps of PGD and of APGD are enough there


@dataclass(frozen=True)
class Adaptive(Attack):
    """The strongest white-box attack that a budget of network calls allows, put together for each model.

    On a purifier: momentum climbs with few draws, first along a shorter process, then along the whole one from the best
    iterate so far; which iterate that is, and which is returned, is decided on draws held out for it. Guided purifiers
    are also climbed with the guidance held constant, from where their guide is deceived. On a model without randomness:
    the better of PGD and APGD on the margin. See docs/adaptive.md.

    Args:
        calls: network calls for one image, at most: see :func:`purify.purification.calls.calls`.
        max_rows: images times draws that go through the model at once.
    """

    calls: int = 10_000
    max_rows: int = 2048

    name: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.calls, "network calls (--calls)")
        check_count(self.max_rows, "max_rows")

    def run(self, model: Any, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        if getattr(model, "purifier", None) is None:
            return self._plain(model, x, y, ids, seed)
        plan = self.stages(model)
        start, extra = self._start(model, x, y, ids, seed)
        best = torch.empty_like(x)
        loss, used = torch.empty(len(x), device=x.device), torch.zeros(len(x), dtype=torch.long, device=x.device)
        used += self.warm(model)
        left = torch.arange(len(x), device=x.device)
        for stage in plan:
            winner = self._stage(model, stage, start, extra, x[left], y[left], ids[left], seed)
            best[left], loss[left] = winner.images, winner.loss
            used[left] += stage.climbs + stage.race.used * calls(model).forward
            going = ~winner.broken
            left, start = left[going], winner.images[going]
            extra = [start]
            if len(left) == 0:
                break
        return AttackResult(best, loss, used)

    def stages(self, model: Any) -> Sequence[Stage]:
        """What is done to a purified model, and what each part may spend."""
        return list(stages(model, self._climb, self.calls - self.warm(model)))

    @property
    def _climb(self) -> Climb:
        return Climb(self.norm, self.eps, max_rows=self.max_rows)

    def warm(self, model: Any) -> int:
        """Calls of the warm start."""
        return 0 if model.auxiliary is None else GUIDE_STEPS * GRADIENT + 1

    def _start(self, model: Any, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Where the first climb begins, and what may be chosen besides its iterates."""
        if model.auxiliary is not None:
            guide = GuideTransfer(self.norm, self.eps, steps=GUIDE_STEPS)
            deceived = guide.run(model, x, y, ids, derive_seed(seed, "guide")).images
            return deceived, [deceived]
        uniform = Noise.keyed(seed, ids).stream("attack").uniform(0, x.shape[1:], x.dtype)
        return BALLS[self.norm].start(x, self.eps, uniform), []

    def _stage(
        self, model: nn.Module, stage: Stage, start: Tensor, extra: list[Tensor], x: Tensor, y: Tensor, ids: Tensor,
        seed: int,
    ) -> Winner:  # fmt: skip
        found = list(extra)
        for phase in stage.phases:
            path = phase.climb.path(phase.model, x, y, ids, derive_seed(seed, phase.name), start, phase.mix)
            found += [z for step, z in enumerate(path, start=1) if step in phase.marks]
        call = keyed(model, derive_seed(seed, "select"))
        return stage.race.run(call, torch.stack(found), y, ids, self.max_rows)

    @property
    def gradients(self) -> int:
        return sum(attack.gradients for attack in self._alone())

    @property
    def forwards(self) -> int:
        return sum(attack.forwards for attack in self._alone())

    def passes(self, model: Any) -> tuple[float, float]:
        if getattr(model, "purifier", None) is None:
            return self.gradients, self.forwards
        cost, plan = calls(model), self.stages(model)
        climbs = self.warm(model) + sum(stage.climbs for stage in plan)
        return climbs / cost.gradient, sum(stage.race.used for stage in plan)

    def on_deterministic(self) -> Attack:
        return replace(self, calls=min(self.calls, ALONE))

    def doubled(self) -> dict[str, Attack]:
        return {"network calls": replace(self, calls=2 * self.calls)}

    def budget(self) -> dict[str, Any]:
        parts = super().budget()
        del parts["max_rows"]  # does not change results
        return parts

    def _plain(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        found = [a.run(model, x, y, ids, derive_seed(seed, a.name)) for a in self._alone()]
        best = found[0]
        for other in found[1:]:
            better = other.loss > best.loss
            images = torch.where(better.reshape(-1, 1, 1, 1), other.images, best.images)
            best = AttackResult(images, torch.maximum(best.loss, other.loss))
        return AttackResult(best.images, best.loss, torch.full_like(y, sum(map(_calls, self._alone()))))

    def _alone(self) -> list[PGD]:
        """The attacks on a model without randomness."""
        steps = max(1, (self.calls // 2 - 1) // GRADIENT)
        return [kind(self.norm, self.eps, steps=steps, eot=1, sparsity=None) for kind in (PGD, APGD)]


def _calls(attack: PGD) -> int:
    return GRADIENT * attack.gradients + attack.forwards


__all__ = ["Adaptive"]
