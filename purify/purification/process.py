"""A purification as data: rounds of one diffusion and its reverse steps, each step a pure function of u."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from purify.diffusion.noise import Noise
from purify.diffusion.reverse import Look, ReverseRule, unguided
from purify.diffusion.schedule import Schedule
from purify.diffusion.score import ScoreModel, per_sample
from purify.finite import clamped

Step = Callable[[Tensor], Tensor]
Evaluate = Callable[[Step, Tensor], Tensor]  # how a gradient engine runs one step
Enter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # what becomes of u_t and t before a step is taken
Watch = Callable[["ReverseStep", Tensor], None]  # sees each reverse step and the state after it


ROUND_INDICES = 2**16  # noise indices of a round: its diffusion has the first, its steps have those that follow
MOST_ROUNDS = 2**24 // ROUND_INDICES  # noise has so many steps


class Conditions(Protocol):
    """What ties steps to the image that came in, see :class:`~purify.purification.conditioning.Conditioning`."""

    def look(self, bound: Tensor, noise: Noise, index: int | Tensor) -> Look: ...

    def enter(self, model: ScoreModel, s: Tensor, bound: Tensor, noise: Noise, index: int | Tensor) -> Enter | None: ...


def unwatched(step: ReverseStep, u: Tensor) -> None:
    """Watch nothing."""


@dataclass(frozen=True)
class DiffuseStep:
    """u -> alpha(t) u + sigma(t) z, with z keyed by ``noise`` and ``index``."""

    schedule: Schedule
    t: Tensor
    noise: Noise
    index: int

    def __call__(self, u: Tensor) -> Tensor:
        z = self.noise.normal(self.index, u.shape[1:], u.dtype)
        return per_sample(self.schedule.alpha(self.t), u) * u + per_sample(self.schedule.sigma(self.t), u) * z


@dataclass(frozen=True)
class ReverseStep:
    """u_t -> u_s by ``rule``, with z keyed by ``noise`` and ``index`` (one, or (N,)): the same in a recomputation.

    ``guidance``: what ties the step to ``bound``, what it made of the image that came in. ``frozen``: whether no weight
    of its networks wants a gradient.
    """

    rule: ReverseRule
    model: ScoreModel
    t: Tensor
    s: Tensor
    noise: Noise
    index: int | Tensor
    guidance: Conditions | None = None
    bound: Tensor | None = None
    frozen: bool = False

    @property
    def look(self) -> Look:
        """What guides the step."""
        if self.guidance is None or self.bound is None:
            return unguided
        return self.guidance.look(self.bound, self.noise, self.index)

    def __call__(self, u: Tensor) -> Tensor:
        return self._moved(u, self._drawn(u))

    def for_graph(self, u: Tensor) -> Tensor:
        """Something with the step's derivatives, for less: noise without a part in them is not made again."""
        constant = self.rule.adds_noise and not (self.t.requires_grad or self.s.requires_grad)
        return self._moved(u, None if constant else self._drawn(u))

    def _moved(self, u: Tensor, z: Tensor | None) -> Tensor:
        u, t = self._entered(u)
        return self.rule(self.model, u, t, self.s, z, self.look)

    def _drawn(self, u: Tensor) -> Tensor | None:
        if not self.rule.stochastic:
            return None
        return self.noise.normal(self.index, self.rule.drawn(u.shape[1:]), u.dtype)

    def _entered(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.guidance is None or self.bound is None:
            return u, self.t
        enter = self.guidance.enter(self.model, self.s, self.bound, self.noise, self.index)
        return (u, self.t) if enter is None else enter(u, self.t)

    def variables(self) -> dict[str, Tensor]:
        """What gradients flow into besides the state, by name."""
        found = {"t": self.t, "s": self.s, "bound": self.bound, "classes": self.model.bound}
        return {name: value for name, value in found.items() if value is not None and value.requires_grad}

    def at(self, values: Mapping[str, Tensor]) -> ReverseStep:
        """The same step with other values of :meth:`variables`."""
        own: dict[str, Any] = dict(values)
        model = self.model.bound_to(own.pop("classes")) if "classes" in own else self.model
        return replace(self, model=model, **own)

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class Round:
    """One diffusion and the reverse steps that undo it, all samples in step.

    Where the rule holds its time, ``diffuse`` makes its state of the image as it came, and ``finish`` the image of it.
    """

    diffuse: Step
    reverse: tuple[ReverseStep, ...]
    finish: Step | None = None

    def run(self, u: Tensor, evaluate: Evaluate, watch: Watch = unwatched) -> Tensor:
        """Purified u; every reverse step goes through ``evaluate``."""
        u = self.diffuse(u)
        for step in self.reverse:
            u = evaluate(step, u)
            watch(step, u)
        return u if self.finish is None else self.finish(u)


@dataclass(frozen=True)
class Tick:
    """One network batch of a packed round: positions in it that are ``finished`` after it and that go on, and the rows
    of the diffused batch that are ``admitted`` to the freed places."""

    step: ReverseStep
    finished: Tensor
    going: Tensor
    admitted: Tensor


@dataclass(frozen=True)
class PackedRound:
    """One diffusion and reverse steps of which every sample has a number of its own.

    Only samples that still have steps to go are in a network batch: those that finished leave, and others, from
    ``first`` on, take their places. ``order`` puts the finished ones back in the order they came.
    """

    diffuse: DiffuseStep
    first: Tensor
    ticks: tuple[Tick, ...]
    order: Tensor

    @property
    def reverse(self) -> tuple[ReverseStep, ...]:
        return tuple(tick.step for tick in self.ticks)

    def run(self, u: Tensor, evaluate: Evaluate, watch: Watch = unwatched) -> Tensor:
        """Purified u; every network batch goes through ``evaluate``."""
        u = self.diffuse(u)
        active, done = u[self.first], []
        for tick in self.ticks:
            moved = evaluate(tick.step, active)
            watch(tick.step, moved)
            done.append(moved[tick.finished])
            active = torch.cat([moved[tick.going], u[tick.admitted]])
        return torch.cat(done)[self.order] if done else u


@dataclass(frozen=True)
class Process:
    """All rounds of a purification.

    ``clip``: clamp the result to [-1, 1], the range of images in diffusion space. ``watch`` sees every reverse step
    with the state after it.
    """

    rounds: tuple[Round | PackedRound, ...]
    clip: bool = False
    watch: Watch = unwatched

    def run(self, u: Tensor, evaluate: Evaluate) -> Tensor:
        """Purified u; every reverse step goes through ``evaluate``, in the order of :meth:`batch_sizes`."""
        for one_round in self.rounds:
            u = one_round.run(u, evaluate, self.watch)
        return self.finish(u)

    def finish(self, u: Tensor) -> Tensor:
        """What is done to the last state."""
        return clamped(u, -1, 1) if self.clip else u

    def batch_sizes(self) -> list[int]:
        """Samples in each reverse step."""
        return [len(step) for one_round in self.rounds for step in one_round.reverse]


class Deviation:
    """How far a reverse process has departed from the forward one, as it runs: a :data:`Watch`.

    The mean over reverse steps of ``alpha(s) mean((u_s - alpha(s) u - sigma(s) z)^2)``, for the image u (N, C, H, W) in
    diffusion space and the noise z of the round's diffusion; after the deviated-reconstruction loss of DiffAttack (Kang
    et al. 2023), in which the forward process is drawn at the same times. For processes in which all samples are in
    step.
    """

    def __init__(self, u: Tensor) -> None:
        self.u = u
        self.total, self.steps = torch.zeros(len(u), dtype=u.dtype, device=u.device), 0

    def __call__(self, step: ReverseStep, u_s: Tensor) -> None:
        schedule, s = step.model.schedule, step.s
        alpha, sigma = per_sample(schedule.alpha(s), u_s), per_sample(schedule.sigma(s), u_s)
        assert isinstance(step.index, int)
        z = step.noise.normal(step.index - step.index % ROUND_INDICES, u_s.shape[1:], u_s.dtype)
        distance = (u_s - alpha * self.u - sigma * z).square().flatten(1).mean(1)
        self.total, self.steps = self.total + alpha.flatten() * distance, self.steps + 1

    def mean(self) -> Tensor:
        """(N,), differentiable."""
        return self.total / self.steps
