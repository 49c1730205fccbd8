"""Which climbs a purifier asks for, from its own description, and what each may spend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from purify.attacks.adaptive.climb import Climb, LevelClimb, Mix
from purify.attacks.adaptive.select import Race
from purify.purification.calls import GRADIENT, calls
from purify.purification.cost import shortened

SHORT = 3  # reverse steps per round of the shorter process
LONG = 40  # steps of a climb before each gets more draws instead
SHARE = 0.7  # of t*(x), where a purifier that varies it is also climbed
LOWERING = 0.2  # of a stage's climbs, for those that lower t*: where it stays the greatest, they find nothing
GUIDE_STEPS = 20  # of the warm start, at 3 calls each
CLIMB_SHORT, CHOOSE_SHORT, CLIMB_FULL, CHOOSE_FULL = 0.55, 0.1, 0.2, 0.15  # shares of the calls


@dataclass(frozen=True)
class Phase:
    """One climb.

    Attributes:
        name: keys its randomness.
        model: what is differentiated.
        climb: how.
        mix: another network whose gradient is added.
        kept: iterates of its second half, the last included, that may be chosen.
        clean: whether it starts at the clean image, whose noise level is small, whatever the others start from.
        whole: whether its iterates are answered by the very model that is attacked.
    """

    name: str
    model: Any
    climb: Climb
    mix: Mix | None = None
    kept: int = 4
    clean: bool = False
    whole: bool = False

    @cached_property
    def calls(self) -> int:
        """Network calls for one image."""
        return self.climb.steps * self.each(self.climb.eot)

    @cached_property
    def drawn(self) -> int:
        """Network calls of the gradient at one draw."""
        statistic = self.model.purifier.level.calls if isinstance(self.climb, LevelClimb) else 0  # its own way back
        return calls(self.model).gradient + self.model.purifications * statistic

    def each(self, eot: int) -> int:
        """Network calls of a step of ``eot`` draws."""
        return eot * self.drawn + (0 if self.mix is None else GRADIENT)

    @cached_property
    def marks(self) -> frozenset[int]:
        """Steps, from 1, whose iterates may be chosen."""
        steps = self.climb.steps
        return frozenset(steps - round(i * steps / 2 / self.kept) for i in range(self.kept)) - {0}


@dataclass(frozen=True)
class Stage:
    """Climbs from one start, and the race among what they found."""

    phases: tuple[Phase, ...]
    race: Race

    @property
    def climbs(self) -> int:
        """Network calls of the climbs, for one image."""
        return sum(phase.calls for phase in self.phases)


def shorter(model: Any) -> nn.Module:
    """``model`` with at most ``SHORT`` reverse steps per round."""
    return model.with_purifier(shortened(model.purifier, SHORT))


def first_order(model: Any) -> nn.Module:
    """``model`` with what guides it held constant in the gradient; itself where nothing does."""
    return model.with_gradient(second_order=False) if model.guided else model


def lower(phase: Phase) -> Phase:
    """The phase with the loss at a share of t*(x), and a way to images of a smaller one, as ``pgd-eot-low-level``."""
    climb = phase.climb
    lowering = LevelClimb(climb.norm, climb.eps, scaled=climb.scaled, max_rows=climb.max_rows)
    return replace(phase, model=phase.model.at_share(SHARE), climb=lowering)


def sized(phase: Phase, share: float) -> Phase:
    """The phase with the steps and draws that ``share`` calls allow: more steps first, then more draws."""
    gradients = max(1, int(share / calls(phase.model).gradient))
    eot = max(1, min(phase.climb.eot, gradients // 2), round(math.sqrt(gradients * phase.climb.eot / LONG)))
    return replace(phase, climb=replace(phase.climb, eot=eot, steps=max(1, int(share / phase.each(eot)))))


def stages(model: Any, climb: Climb, budget: int) -> Iterator[Stage]:
    """The stages of an attack on a purified classifier, at ``budget`` calls for one image."""
    mix = None if model.auxiliary is None else Mix(model.auxiliary)
    climb = replace(climb, scaled=model.guided)
    forward = calls(model).forward
    short = [Phase("short", first_order(shorter(model)), climb, mix)]
    if model.level_varies:
        short.append(lower(Phase("short-level", first_order(shorter(model)), climb, clean=True)))
    given = int(mix is not None)  # the start may be chosen where it is more than random
    stage = _stage(short, CLIMB_SHORT * budget, int(CHOOSE_SHORT * budget / forward), given, 0)
    yield stage
    climb = replace(climb, step_size=climb.eps / 2)
    full = [Phase("exact", model, climb, whole=True)]
    if model.guided:
        full.append(Phase("first-order", first_order(model), climb, mix, whole=True))
    if model.level_varies:
        full.append(lower(Phase("level", model, climb)))
    yield _stage(full, CLIMB_FULL * budget, int(CHOOSE_FULL * budget / forward), 1, stage.race.draws)


def _stage(phases: list[Phase], climbs: float, forwards: int, given: int, first: int) -> Stage:
    """A stage whose phases share ``climbs`` calls, those that lower t* a fifth of them.

    ``given``: candidates besides their iterates; ``first``: the first draw that they are judged on.
    """
    lowering = sum(isinstance(phase.climb, LevelClimb) for phase in phases)
    rest = (1 - LOWERING * lowering) / (len(phases) - lowering)
    shares = [LOWERING if isinstance(phase.climb, LevelClimb) else rest for phase in phases]
    found = tuple(sized(phase, climbs * share) for phase, share in zip(phases, shares, strict=True))
    return Stage(found, Race(given + sum(len(phase.marks) for phase in found), forwards, first))
