"""Which climbs a purifier asks for, from its own description, and what each may spend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from purify.attacks.adaptive.climb import Climb, LevelClimb, Mix
from purify.attacks.adaptive.select import Race
from purify.purification.calls import calls
from purify.purification.cost import shortened

ROUNDS = 2  # of the shorter process at most, the last ones
SHORT = 3  # its reverse steps, shared by its rounds: at least one in each
HELD = 0.5  # its share of the steps instead, where time stands still
LONG = 40  # steps of a climb before each gets more draws instead
SHARE = 0.7  # of t*(x), where a purifier that varies it is also climbed
PROBE = 6  # steps of one draw each that try to lower t*, where it varies
FALLEN = 0.9  # of the greatest t*: below, the probe has lowered it
TRY = 170  # gradients of the whole process that a try has, where there are several
MOMENTUM = 0.0  # behind a guide in L2, with one draw in each step
GUIDE_STEPS = 20  # of the warm start
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

    @property
    def lowers(self) -> bool:
        """Whether it climbs towards a smaller t*."""
        return isinstance(self.climb, LevelClimb)

    @cached_property
    def calls(self) -> int:
        """Network calls for one image."""
        return self.climb.steps * self.each(self.climb.eot)

    @cached_property
    def drawn(self) -> int:
        """Network calls of the gradient at one draw."""
        return self.climb.gradient_calls(self.model)

    def each(self, eot: int) -> int:
        """Network calls of a step of ``eot`` draws."""
        return eot * self.drawn + (0 if self.mix is None else calls(self.mix.network).gradient)

    @cached_property
    def marks(self) -> frozenset[int]:
        """Steps, from 1, whose iterates may be chosen."""
        steps = self.climb.steps
        return frozenset(steps - round(i * steps / 2 / self.kept) for i in range(self.kept)) - {0}


@dataclass(frozen=True)
class Stage:
    """Climbs from one start, and the race among what they found, whose answers take ``each`` network calls."""

    phases: tuple[Phase, ...]
    race: Race
    each: int

    @property
    def climbs(self) -> int:
        """Network calls of the climbs, for one image."""
        return sum(phase.calls for phase in self.phases)

    @property
    def calls(self) -> int:
        """Network calls of climbs and race, for one image."""
        return self.climbs + self.race.used * self.each


@dataclass(frozen=True)
class Plan:
    """What is done to an image.

    Attributes:
        stages: one after the other.
        probe: where t* varies, a short climb that tries to lower it.
        fallen: the stages instead, of an image whose t* it lowered.
    """

    stages: tuple[Stage, ...]
    probe: Phase | None = None
    fallen: tuple[Stage, ...] = ()

    @property
    def probing(self) -> int:
        """Network calls of the probe and of asking it for t*."""
        return probing(self.probe)

    @property
    def longest(self) -> tuple[Stage, ...]:
        """The stages of an image that takes most calls."""
        return max(self.stages, self.fallen, key=lambda stages: sum(stage.calls for stage in stages))


@torch.no_grad()
def lowered(model: Any, images: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Whether t* of each image is far below the greatest, (N,)."""
    t_star = model.details(images, sample_ids=ids, draw=torch.zeros_like(ids), seed=seed).t_star.mean(1)
    return t_star < FALLEN * model.purifier.level.highest


def shorter(model: Any) -> nn.Module:
    """``model`` with the last ``ROUNDS`` rounds at most, and ``SHORT`` reverse steps in all, or one in each.

    Where time stands still, with the share ``HELD`` of its steps: so few as ``SHORT`` would hardly purify.
    """
    purifier = model.purifier
    rounds = min(ROUNDS, len(purifier.rounds))
    steps = math.ceil(HELD * purifier.most_steps_by_round()[-1]) if purifier.rule.held else max(1, SHORT // rounds)
    return model.with_purifier(shortened(purifier, steps, rounds))


def network_guided(model: Any) -> bool:
    """Whether the gradient of an auxiliary network guides its reverse steps.

    Its second derivative may turn an attack's gradient upside down (a step overshoots). Other guidances and corrections
    lead the input itself into the steps, and held constant they would hide that.
    """
    guidance = model.purifier.guidance
    return model.auxiliary is not None and guidance.takes_gradients


def tries(model: Any, budget: int) -> int:
    """How often an image that does not break is attacked anew.

    Behind a guide, whose steps turn a little noise in the gradient into another image, longer climbs find hardly more,
    and tries spare the calls of images that break early (docs/adaptive.md).
    """
    return max(1, int(budget / (TRY * calls(model).gradient))) if network_guided(model) else 1


def warm(model: Any, norm: str) -> bool:
    """Whether climbs begin where the guide is deceived; otherwise at random."""
    return network_guided(model) and not memoryless(model, norm)


def memoryless(model: Any, norm: str) -> bool:
    """Whether climbs have one draw in each step and no momentum.

    Behind a guide in L2, where momentum leaves far more; in L1 and, but at few calls, in L_inf it makes no difference
    (docs/adaptive.md).
    """
    return network_guided(model) and norm == "L2"


def first_order(model: Any) -> nn.Module:
    """``model`` with the network that guides it held constant in the gradient; itself where none does."""
    return model.with_gradient(second_order=False) if network_guided(model) else model


def lower(phase: Phase) -> Phase:
    """The phase with the loss at a share of t*(x), and a way to images of a smaller one, as ``pgd-eot-low-level``."""
    climb = phase.climb
    kept = {name: getattr(climb, name) for name in ("steps", "eot", "momentum", "scaled", "max_rows")}
    return replace(phase, model=phase.model.at_share(SHARE), climb=LevelClimb(climb.norm, climb.eps, **kept))


def sized(phase: Phase, share: float) -> Phase:
    """The phase with the steps and draws that ``share`` calls allow: more steps first, then more draws.

    Without momentum more steps alone: draws stay as they are.
    """
    gradients = max(1, int(share / calls(phase.model).gradient))
    more = round(math.sqrt(gradients * phase.climb.eot / LONG)) if phase.climb.momentum > 0 else phase.climb.eot
    eot = max(1, min(phase.climb.eot, gradients // 2), more)
    return replace(phase, climb=replace(phase.climb, eot=eot, steps=max(1, int(share / phase.each(eot)))))


def divided(phases: list[Phase], share: float) -> tuple[Phase, ...]:
    """The phases with equal parts of ``share`` calls, but each with those of a step of one draw at least."""
    parts = [share / len(phases)] * len(phases)
    if any(part < phase.each(1) for part, phase in zip(parts, phases, strict=True)):
        spare = max(0.0, share - least(phases)) / len(phases)
        parts = [phase.each(1) + spare for phase in phases]
    return tuple(sized(phase, part) for phase, part in zip(phases, parts, strict=True))


def least(phases: Iterable[Phase]) -> int:
    """Network calls of one step of one draw in each phase."""
    return sum(phase.each(1) for phase in phases)


def plan(model: Any, climb: Climb, budget: int) -> Plan:
    """What an attack on a purified classifier does, at ``budget`` calls for one image, which are :func:`needed` ones at
    least."""
    climb = replace(climb, scaled=network_guided(model))
    if memoryless(model, climb.norm):
        climb = replace(climb, eot=1, momentum=MOMENTUM)
    probe = probe_of(model, climb)
    found = [stages(model, *way, budget - probing(probe)) for way in ways(model, climb)]
    return Plan(found[0], probe, *found[1:])


def needed(model: Any, climb: Climb) -> int:
    """Network calls of one step of one draw in every climb, and of the probe."""
    return probing(probe_of(model, climb)) + max(least(first) + least(then) for first, then in ways(model, climb))


def ways(model: Any, climb: Climb) -> list[tuple[list[Phase], list[Phase]]]:
    """The climbs of an image: as it is, and, where t* varies, if it falls."""
    return [staying(model, climb), *([falling(model, climb)] if model.level_varies else [])]


def probe_of(model: Any, climb: Climb) -> Phase | None:
    """The climb that tells which of these; None where t* does not vary."""
    if not model.level_varies:
        return None
    return lower(Phase("probe", first_order(shorter(model)), replace(climb, steps=PROBE, eot=1), clean=True))


def probing(probe: Phase | None) -> int:
    """Network calls of the probe and of asking it for t*."""
    return 0 if probe is None else probe.calls + calls(probe.model).forward


def stages(model: Any, first: list[Phase], then: list[Phase], budget: int) -> tuple[Stage, Stage]:
    """Climbs on the shorter process, then on the whole one; each is followed by a race for what climbs leave of it."""
    each = calls(model).forward
    short = divided(first, min(CLIMB_SHORT * budget, budget - least(then)))
    left = budget - sum(phase.calls for phase in short)
    full = divided(then, min(CLIMB_FULL * budget, left))
    answers = (left - sum(phase.calls for phase in full)) // each
    given = int(warm(model, first[0].climb.norm))  # the start may be chosen where it is more than random
    race = Race(given + _kept(short), min(int(CHOOSE_SHORT * (budget / each)), answers))
    last = Race(1 + _kept(full), min(int(CHOOSE_FULL * (budget / each)), answers - race.used), race.draws)
    return Stage(short, race, each), Stage(full, last, each)


def _kept(phases: Iterable[Phase]) -> int:
    """Iterates that may be chosen."""
    return sum(len(phase.marks) for phase in phases)


def staying(model: Any, climb: Climb) -> tuple[list[Phase], list[Phase]]:
    """Climbs at t*(x): on the shorter process, and then on the whole one at half the step size."""
    mix = Mix(model.auxiliary) if network_guided(model) else None
    half = replace(climb, step_size=climb.eps / 2 or None)
    full = [Phase("exact", model, half, whole=True)]
    if mix is not None:
        full.append(Phase("first-order", first_order(model), half, mix, whole=True))
    return [Phase("short", first_order(shorter(model)), climb, mix)], full


def falling(model: Any, climb: Climb) -> tuple[list[Phase], list[Phase]]:
    """Climbs towards smaller t*: on the shorter process from the clean image, and then on the whole one."""
    short = Phase("short-level", first_order(shorter(model)), climb, clean=True)
    return [lower(short)], [lower(Phase("level", model, climb))]
