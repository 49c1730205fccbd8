"""A purification as data: rounds of one diffusion and a chain of reverse steps, each a pure function of u."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from purify.noise import Noise
from purify.reverse import ReverseRule
from purify.schedule import Schedule
from purify.score import ScoreModel, per_sample


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
    """u_t -> u_s by ``rule``, with z keyed by ``noise`` and ``index`` and so the same in a recomputation."""

    rule: ReverseRule
    model: ScoreModel
    t: Tensor
    s: Tensor
    noise: Noise
    index: int

    def __call__(self, u: Tensor) -> Tensor:
        z = self.noise.normal(self.index, u.shape[1:], u.dtype) if self.rule.stochastic else None
        return self.rule(self.model, u, self.t, self.s, z)


@dataclass(frozen=True)
class Round:
    """One diffusion and the reverse steps that undo it."""

    diffuse: DiffuseStep
    reverse: tuple[ReverseStep, ...]


@dataclass(frozen=True)
class Process:
    """All rounds of a purification. ``process.steps()`` is the flat sequence that exact engines differentiate.

    ``clip``: clamp the result to [-1, 1], the range of images in diffusion space.
    """

    rounds: tuple[Round, ...]
    clip: bool = False

    def steps(self) -> Iterator[DiffuseStep | ReverseStep]:
        for r in self.rounds:
            yield r.diffuse
            yield from r.reverse

    def finish(self, u: Tensor) -> Tensor:
        """What is done to the last state."""
        return u.clamp(-1, 1) if self.clip else u


def reverse_times(t_star: Tensor, steps: int, t_end: float) -> list[Tensor]:
    """Times t_star (1 - j/steps), j = 0..steps, each (N,) float64; the last is ``t_end`` instead of 0.

    ``t_end`` is never later than the time before it: the process would turn round.

    For t_star = k/N and steps = k these are exactly k/N, ..., 1/N, t_end up to float64 rounding.
    """
    times = [t_star * ((steps - j) / steps) for j in range(steps)]
    return [*times, times[-1].clamp_max(t_end)]


def build_round(
    model: ScoreModel,
    rule: ReverseRule,
    t_star: Tensor,
    steps: int,
    noise: Noise,
    t_end: float = 0.0,
    forward_schedule: Schedule | None = None,
    first_index: int = 0,
) -> Round:
    """Diffuse to ``t_star`` (N,) and step back to ``t_end``; noise indices count up from ``first_index``."""
    times = reverse_times(t_star, steps, t_end)
    diffuse = DiffuseStep(forward_schedule or model.schedule, t_star, noise, first_index)
    reverse = tuple(
        ReverseStep(rule, model, t, s, noise, first_index + 1 + j)
        for j, (t, s) in enumerate(pairwise(times))
    )
    return Round(diffuse, reverse)
