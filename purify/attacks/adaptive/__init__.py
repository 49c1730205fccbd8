"""One attack to quote: what a purifier's own description asks for, within a budget of network calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.adaptive.climb import Climb
from purify.attacks.adaptive.phases import GUIDE_STEPS, Phase, Plan, Stage, lowered, needed, plan, tries, warm
from purify.attacks.apgd import APGD
from purify.attacks.base import Attack, AttackResult, keyed
from purify.attacks.pgd import PGD
from purify.attacks.submitted import Submitted
from purify.attacks.transfer import GuideTransfer
from purify.checks import check_count
from purify.diffusion.noise import derive_seed
from purify.purification.calls import GRADIENT, calls
from purify.purification.defended import DefendedClassifier

ASKED = 2  # answers that tell whether a model has randomness
DRAWS = 5  # per gradient on one that has, of which nothing else is known
EACH = 2 * (GRADIENT + 1)  # calls of one step of PGD and of APGD there, and of its answer
STEP = ASKED + EACH
ALONE = 604  # calls on a model without randomness: 100 steps of PGD and of APGD are enough there


class State:
    """What is known of N images so far; the arguments are those of an attack, the calls spent on each before, and the
    seed of the draws by which winners are chosen."""

    def __init__(self, x: Tensor, y: Tensor, ids: Tensor, spent: int, select: int) -> None:
        self.x, self.y, self.ids, self.select = x, y, ids, select
        self.best = torch.empty_like(x)
        self.loss, self.score = torch.full((2, len(x)), torch.nan, device=x.device)
        self.used = torch.full_like(y, spent)
        self.submitted = Submitted(len(x), x.device)

    def again(self) -> State:
        """Of another try: calls and answers go on, what it finds is kept apart."""
        other = State(self.x, self.y, self.ids, 0, self.select)
        other.used, other.submitted = self.used, self.submitted
        return other

    def keep(self, rows: Tensor, images: Tensor, loss: Tensor, score: Tensor) -> None:
        self.best[rows], self.loss[rows], self.score[rows] = images, loss, score

    def take(self, other: State, rows: Tensor) -> None:
        """What another try found for the images ``rows``, where that is better."""
        better = rows[~(other.score[rows] <= self.score[rows])]  # anything is, than nothing yet
        self.keep(better, other.best[better], other.loss[better], other.score[better])


@dataclass(frozen=True)
class Adaptive(Attack):
    """The strongest white-box attack that a budget of network calls allows, put together for each model.

    On a purifier: momentum climbs with few draws, first along a shorter process, then along the whole one from the best
    iterate so far; which iterate that is, and which is returned, is decided on draws held out for it. Purifiers
    guided by a network are also climbed with the guidance held constant, from where it is deceived (in L2 at random,
    with one draw in each step and no momentum), and in several tries where there are calls for them; where t* varies,
    images whose t* a probe lowers are climbed towards a smaller one. On a model without randomness: the better of PGD
    and APGD on the margin, with draws where answers differ. See docs/adaptive.md.

    Args:
        calls: network calls for one image, at most: see :func:`purify.purification.calls.calls`. Of a model without a
            purifier answers, however many calls one of them takes. Every climb has a step at least, which takes 45 on
            DiffPure with 10 steps, 252 on GNS, 264 on AGDM (203 in L2) and 10 on a model without a purifier: fewer are
            refused, and raised by :meth:`fitted`.
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
        if not isinstance(model, DefendedClassifier):
            return self._plain(model, x, y, ids, seed)
        deceived = self._deceived(model, x, y, ids, seed)
        state = State(x, y, ids, self.warm(model), derive_seed(seed, "select"))
        left = torch.arange(len(x), device=x.device)
        for number in range(self.tries(model)):
            own, again = derive_seed(seed, f"try {number}") if number else seed, state.again()
            going = self._try(model, again, left, deceived, own) if len(left) else left
            state.take(again, left)
            left = going
        return AttackResult(state.best, state.loss, state.used, state.submitted)

    def _try(self, model: Any, state: State, left: Tensor, found: list[Tensor], seed: int) -> Tensor:
        """All stages of the images ``left``, from what is ``found`` or else at random: those not broken after them."""
        plan, going = self.plan(model), []
        start = found[0] if found else self._climb.anywhere(state.x, state.ids, seed)
        fallen = torch.zeros_like(left, dtype=torch.bool)
        if plan.probe is not None:
            fallen, extra = self._probe(plan.probe, state.x[left], state.y[left], state.ids[left], seed)
            state.used[left] += plan.probing + extra
        for stages, rows in ((plan.stages, left[~fallen]), (plan.fallen, left[fallen])):
            here, known = start[rows], [z[rows] for z in found]
            for stage in stages:
                if len(rows):
                    rows, here = self._stage(model, stage, state, rows, here, known, seed)
                    known = [here]
            going.append(rows)
        return torch.cat(going).sort().values

    def _stage(
        self, model: Any, stage: Stage, state: State, rows: Tensor, start: Tensor, found: list[Tensor], seed: int
    ) -> tuple[Tensor, Tensor]:
        """One stage of the images ``rows``: those not broken after it, and where they are."""
        own = (state.x[rows], state.y[rows], state.ids[rows])
        climbed, extra, answered = self._climbs(stage, start, *own, seed)
        winner = stage.race.run(keyed(model, state.select), torch.stack([*found, *climbed]), *own[1:], self.max_rows)
        state.keep(rows, winner.images, winner.loss, winner.score)
        state.used[rows] += stage.calls + extra
        for answers in (*answered, winner.submitted):
            state.submitted.include(rows, answers)
        return rows[~winner.broken], winner.images[~winner.broken]

    def _probe(self, probe: Phase, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Whether t* of each image can be lowered, and calls beyond the plan, (N,)."""
        target = probe.climb.target(probe.model, x, y, ids, derive_seed(seed, probe.name))
        *_, last = probe.climb.path(target, x)
        return lowered(probe.model, last, ids, derive_seed(seed, "asked")), target.inside.tries * probe.drawn

    def plan(self, model: Any) -> Plan:
        """What is done to a purified model, and what each part may spend.

        Raises:
            ValueError: there are fewer calls than a step of every climb takes.
        """
        least = self.least(model)
        if self.calls < least:
            raise ValueError(f"{self._takes(least, 'this purifier')}, got {self.calls}; give as many.")
        return plan(model, self._climb, (self.calls - self.warm(model)) // self.tries(model))

    def tries(self, model: Any) -> int:
        """How often an image that does not break is attacked anew."""
        return tries(model, self.calls)

    def least(self, model: Any) -> int:
        """Calls of a step of every climb."""
        return self.warm(model) + needed(model, self._climb) if isinstance(model, DefendedClassifier) else STEP

    @staticmethod
    def _takes(least: int, name: str) -> str:
        return f"The adaptive attack takes at least {least} network calls for an image of {name}"

    def fitted(self, model: nn.Module, name: str = "this purifier") -> Attack:
        least = self.least(model)
        if self.calls >= least:
            return self
        warnings.warn(f"{self._takes(least, name)}; it gets these in place of {self.calls}.", stacklevel=2)
        return replace(self, calls=least)

    def stages(self, model: Any) -> Sequence[Stage]:
        """The stages of an image that takes most calls."""
        return self.plan(model).longest * self.tries(model)

    def climbs(self, model: nn.Module) -> list[tuple[nn.Module, int]]:
        if not isinstance(model, DefendedClassifier):
            return super().climbs(model)
        plan = self.plan(model)
        phases = [phase for stage in (*plan.stages, *plan.fallen) for phase in stage.phases]
        phases += [] if plan.probe is None else [plan.probe]
        return [(phase.model, phase.climb.eot) for phase in phases]

    @property
    def _climb(self) -> Climb:
        return Climb(self.norm, self.eps, max_rows=self.max_rows)

    @property
    def _guide(self) -> GuideTransfer:
        return GuideTransfer(self.norm, self.eps, steps=GUIDE_STEPS)

    def warm(self, model: Any) -> int:
        """Calls of the warm start."""
        return self._guide.other_calls(model) if warm(model, self.norm) else 0

    def _deceived(self, model: Any, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> list[Tensor]:
        """Where the first climbs begin, if the guide tells, which may be chosen besides their iterates."""
        if not self.warm(model):
            return []
        return [self._guide.run(model, x, y, ids, derive_seed(seed, "guide")).images]

    def _climbs(
        self, stage: Stage, start: Tensor, x: Tensor, y: Tensor, ids: Tensor, seed: int
    ) -> tuple[list[Tensor], Tensor, list[Submitted]]:
        """Iterates that may be chosen, calls beyond the plan, (N,), and the model's answers to iterates.

        Beyond the plan are gradients that are taken again inside [0, 1].
        """
        found, extra, answered = [], torch.zeros_like(y), []
        for phase in stage.phases:
            target = phase.climb.target(phase.model, x, y, ids, derive_seed(seed, phase.name))
            path = phase.climb.path(target, x if phase.clean else start, phase.mix)
            found += [z for step, z in enumerate(path, start=1) if step in phase.marks]
            extra += target.inside.tries * phase.climb.eot * phase.drawn
            answered += [target.submitted] if phase.whole else []
        return found, extra, answered

    @property
    def gradients(self) -> int:
        return sum(attack.gradients for attack in self._alone(1))

    @property
    def forwards(self) -> int:
        return sum(attack.forwards for attack in self._alone(1)) + ASKED

    def network_calls(self, model: nn.Module) -> int:
        if not isinstance(model, DefendedClassifier):
            return super().network_calls(model)
        found = self.plan(model)
        return self.warm(model) + self.tries(model) * (found.probing + sum(stage.calls for stage in found.longest))

    def forwards_on(self, model: nn.Module) -> int:
        if not isinstance(model, DefendedClassifier):
            return self.forwards
        return sum(stage.race.used for stage in self.stages(model))

    def answers(self, model: nn.Module) -> int:
        if not isinstance(model, DefendedClassifier):
            return 0
        plan, found = self.plan(model), []
        for stages in (plan.stages, plan.fallen):
            climbs = [phase.climb for stage in stages for phase in stage.phases if phase.whole]
            found.append(sum(climb.steps * climb.eot for climb in climbs) + sum(stage.race.used for stage in stages))
        return self.tries(model) * max(found)

    def counts(self, model: nn.Module) -> int:
        if not isinstance(model, DefendedClassifier):
            return self.counted
        plan = self.plan(model)
        climbs = [phase.climb for stage in plan.longest for phase in stage.phases]
        climbs += [] if plan.probe is None else [plan.probe.climb]
        each = sum(climb.steps * climb.eot for climb in climbs)
        return self.tries(model) * each + (GUIDE_STEPS if self.warm(model) else 0)

    def on_deterministic(self) -> Attack:
        return replace(self, calls=min(self.calls, ALONE))

    def doubled(self) -> dict[str, Attack]:
        return {"network calls": replace(self, calls=2 * self.calls)}

    def budget(self) -> dict[str, Any]:
        parts = super().budget()
        del parts["max_rows"]  # does not change results
        return parts

    def _plain(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        """PGD and APGD on any other model, with draws where it answers the same question differently."""
        if self.calls < STEP:
            raise ValueError(f"{self._takes(STEP, 'any model')}, got {self.calls}; give as many.")
        call = keyed(model, derive_seed(seed, "asked"))
        with torch.no_grad():
            first, again = (call(x, ids, torch.full_like(ids, draw)) for draw in range(ASKED))
        attacks = self._alone(1 if torch.equal(first, again) else min(DRAWS, (self.calls - ASKED) // EACH))
        one, other = (attack.run(model, x, y, ids, derive_seed(seed, attack.name)) for attack in attacks)
        better = (other.loss > one.loss).reshape(-1, 1, 1, 1)
        spent = ASKED + sum(GRADIENT * attack.gradients + attack.forwards for attack in attacks)
        images = torch.where(better, other.images, one.images)
        used = torch.full_like(y, spent * calls(model).forward)
        return AttackResult(images, torch.maximum(one.loss, other.loss), used)

    def _alone(self, eot: int) -> list[PGD]:
        """The attacks on a model of which nothing is known."""
        steps = max(1, ((self.calls - ASKED) // (2 * eot) - 1) // GRADIENT)
        sparsity = None if eot == 1 else 0.05
        options: dict[str, Any] = {"steps": steps, "eot": eot, "sparsity": sparsity, "max_rows": self.max_rows}
        return [kind(self.norm, self.eps, **options) for kind in (PGD, APGD)]


__all__ = ["Adaptive"]
