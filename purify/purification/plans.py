"""Execution plans: how samples with noise levels of their own are stepped back in one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from purify.checks import check_count, is_number
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import ReverseRule
from purify.diffusion.schedule import Schedule
from purify.diffusion.score import ScoreModel
from purify.purification.conditioning import Conditioning
from purify.purification.process import DiffuseStep, PackedRound, ReverseStep, Round, Tick


@dataclass(frozen=True)
class StepFactory:
    """Makes the steps of a round, which differ in their times.

    Attributes:
        forward_schedule: schedule that diffuses.
        t_end: time at which the reverse steps end.
        first_index: noise index of the diffusion; those of the steps count up from it.
        guidance: what bends the steps, if anything does.
        bound: what guidance keeps of the images that came into the purifier, (N, ...).
    """

    model: ScoreModel
    rule: ReverseRule
    noise: Noise
    forward_schedule: Schedule
    t_end: float = 0.0
    first_index: int = 0
    guidance: Conditioning | None = None
    bound: Tensor | None = None

    def diffuse(self, t_star: Tensor) -> DiffuseStep:
        return DiffuseStep(self.forward_schedule, t_star, self.noise, self.first_index)

    def step(self, t: Tensor, s: Tensor, position: int | Tensor, rows: Tensor | None = None) -> ReverseStep:
        """The step from t to s that is the ``position``-th of its samples, counted from 0; of some ``rows`` only."""
        noise, index = self.noise if rows is None else self.noise[rows], self.first_index + 1 + position
        model = self.model if rows is None else self.model[rows]
        bound = self.bound if rows is None or self.bound is None else self.bound[rows]
        assert self.guidance is None or bound is not None
        return ReverseStep(self.rule, model, t, s, noise, index, self.guidance, bound, self.frozen)

    @cached_property
    def frozen(self) -> bool:
        """Whether no weight of the networks in the steps wants a gradient."""
        networks = [self.model, None if self.guidance is None else self.guidance.network]
        return not any(p.requires_grad for network in networks if network is not None for p in network.parameters())


class Plan(ABC):
    """From noise levels to a round of steps."""

    @abstractmethod
    def counts(self, t_star: Tensor) -> Tensor:
        """Reverse steps of each sample, int64 (N,)."""

    @abstractmethod
    def round(self, factory: StepFactory, t_star: Tensor) -> Round | PackedRound:
        """The round for levels ``t_star``, float64 (N,)."""

    @abstractmethod
    def at_most(self, steps: int) -> Plan:
        """A plan of so many steps per sample, or of fewer where this one has fewer for all; for surrogate gradients."""

    @abstractmethod
    def step_length(self, t_star: float) -> float:
        """Length of the last step from the level ``t_star``."""


@dataclass(frozen=True)
class FixedSteps(Plan):
    """``steps`` reverse steps for every sample, each of its own length t*/steps."""

    steps: int = 100

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")

    def counts(self, t_star: Tensor) -> Tensor:
        return torch.full_like(t_star, self.steps, dtype=torch.int64)

    def round(self, factory: StepFactory, t_star: Tensor) -> Round:
        times = reverse_times(t_star, self.steps, factory.t_end)
        steps = tuple(factory.step(t, s, j) for j, (t, s) in enumerate(pairwise(times)))
        return Round(factory.diffuse(t_star), steps)

    def at_most(self, steps: int) -> FixedSteps:
        return FixedSteps(min(self.steps, steps))

    def step_length(self, t_star: float) -> float:
        return t_star / self.steps


def reverse_times(t_star: Tensor, steps: int, t_end: float) -> list[Tensor]:
    """Times t_star (1 - j/steps), j = 0..steps, each (N,) float64; the last is ``t_end`` instead of 0.

    ``t_end`` is never later than the time before it: the process would turn round.

    For t_star = k/N and steps = k these are exactly k/N, ..., 1/N, t_end up to float64 rounding.
    """
    times = [t_star * ((steps - j) / steps) for j in range(steps)]
    return [*times, times[-1].clamp_max(t_end)]


@dataclass(frozen=True)
class FixedDt(Plan):
    """k = round(t*/dt) steps, at least one: from t* to (k-1) dt, and on by ``dt`` each.

    t* decides how many steps a sample takes. The first step absorbs what t* exceeds or lacks of k dt, so the
    process starts at t* itself and has a gradient through it. The network sees sum_i k_i samples in all: those
    that finished leave the batch, and waiting ones take their places.

    Args:
        dt: step length.
        batch: samples in the network at once; None: all.
    """

    dt: float = 1e-3
    batch: int | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.dt) and 0 < self.dt <= 1):
            raise ValueError(f"dt must lie in (0, 1], got {self.dt}.")
        if self.batch is not None:
            check_count(self.batch, "batch of the fixed_dt plan")

    def counts(self, t_star: Tensor) -> Tensor:
        return (t_star.detach() / self.dt).round().long().clamp_min(1)

    def round(self, factory: StepFactory, t_star: Tensor) -> PackedRound:
        counts = self.counts(t_star)
        batches = list(packing(counts.cpu(), self.batch or max(len(counts), 1)))
        ticks = [self._tick(factory, t_star, counts, *(b.to(t_star.device) for b in batch)) for batch in batches]
        leaving = [batch[0].to(t_star.device)[tick.finished] for batch, tick in zip(batches, ticks, strict=True)]
        order = torch.cat(leaving).argsort() if leaving else counts
        first = batches[0][0].to(t_star.device) if batches else counts
        return PackedRound(factory.diffuse(t_star), first, tuple(ticks), order)

    def _tick(
        self, factory: StepFactory, t_star: Tensor, counts: Tensor, rows: Tensor, done: Tensor, admitted: Tensor
    ) -> Tick:
        left = counts[rows] - done  # steps to go, this one included
        t = torch.where(done == 0, t_star[rows], left * self.dt)
        s = torch.where(left == 1, t.clamp_max(factory.t_end), (left - 1) * self.dt)
        return Tick(factory.step(t, s, done, rows), (left == 1).nonzero()[:, 0], (left > 1).nonzero()[:, 0], admitted)

    def at_most(self, steps: int) -> FixedSteps:
        return FixedSteps(steps)

    def step_length(self, t_star: float) -> float:
        return min(self.dt, t_star)


@dataclass(frozen=True)
class Held(Plan):
    """``steps`` steps at t*, from the image as it came: for rules that hold their time (``langevin``, ``likelihood``).

    Args:
        steps: how many.
        spread: each step is at t* (1 + spread r), r uniform in (-1, 1) for every step and sample; in [0, 1).
    """

    steps: int = 100
    spread: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        if not (is_number(self.spread) and 0 <= self.spread < 1):
            raise ValueError(f"spread of the held plan must lie in [0, 1), got {self.spread!r}.")

    def counts(self, t_star: Tensor) -> Tensor:
        return torch.full_like(t_star, self.steps, dtype=torch.int64)

    def round(self, factory: StepFactory, t_star: Tensor) -> Round:
        steps = []
        for j in range(self.steps):
            t = self._at(factory, t_star, j)
            steps.append(factory.step(t, t, j))
        return Round(factory.rule.begin, tuple(steps), factory.rule.finish)

    def _at(self, factory: StepFactory, t_star: Tensor, position: int) -> Tensor:
        if self.spread == 0:
            return t_star
        share = factory.noise.stream("time").uniform(factory.first_index + 1 + position, (), torch.float64)
        return (t_star * (1 + self.spread * (2 * share - 1))).clamp_max(1.0)

    def at_most(self, steps: int) -> Held:
        return replace(self, steps=min(self.steps, steps))

    def step_length(self, t_star: float) -> float:
        return t_star


def packing(counts: Tensor, room: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Network batches of at most ``room`` samples that give sample i ``counts[i]`` steps.

    Yields rows in the batch, steps they have done, and rows admitted to the places freed after it. The longest go
    first, so that few batches at the end are not full.
    """
    queue = counts.argsort(descending=True, stable=True)
    rows, queue = queue[:room], queue[room:]
    done = torch.zeros_like(rows)
    while len(rows):
        going = counts[rows] - done > 1
        free = room - int(going.sum())
        admitted, queue = queue[:free], queue[free:]
        yield rows, done, admitted
        rows = torch.cat([rows[going], admitted])
        done = torch.cat([done[going] + 1, torch.zeros_like(admitted)])


PLANS: dict[str, type[Plan]] = {"fixed_steps": FixedSteps, "fixed_dt": FixedDt, "held": Held}
