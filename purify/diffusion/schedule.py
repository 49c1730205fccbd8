"""Variance-preserving noise schedules: u_t = alpha(t) u + sigma(t) z with alpha^2 + sigma^2 = 1.

Time t lies in [0, 1]; t = 0 is the clean image. Every function takes a tensor of times of any shape and
returns float64 of that shape, differentiable in t, so that rounding happens once, where an image is touched.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purify.checks import check_count, choose, is_number, short


class Schedule(ABC):
    """A VP noise schedule, defined by ``log_alpha_bar`` and its slope."""

    @abstractmethod
    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log abar(t), abar = alpha^2, float64, for times ``t`` in [0, 1]."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = -d log abar / dt: the rate of the VP-SDE du = -beta/2 u dt + sqrt(beta) dw."""

    @abstractmethod
    def time_of_sigma(self, sigma: float) -> float:
        """Time whose noise-to-signal ratio sigma(t)/alpha(t) is ``sigma`` (in [-1, 1] image units).

        Discrete schedules give the first step that has at least that ratio (Carlini et al. 2022).
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data from which :func:`schedule_from_config` builds the same schedule."""

    def alpha_bar(self, t: Tensor) -> Tensor:
        """abar(t) = alpha(t)^2."""
        return self.log_alpha_bar(t).exp()

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level alpha(t)."""
        return (0.5 * self.log_alpha_bar(t)).exp()

    def variance(self, t: Tensor) -> Tensor:
        """Noise variance sigma(t)^2 = 1 - abar(t), by ``expm1`` so that small times keep their digits."""
        return -torch.expm1(self.log_alpha_bar(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level sigma(t)."""
        return self.variance(t).sqrt()


class ContinuousVP(Schedule):
    """VP-SDE of Song et al. 2021: beta(t) = beta_min + t (beta_max - beta_min)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not (is_number(beta_min) and is_number(beta_max) and 0 < beta_min <= beta_max):
            given = f"{short(beta_min)} and {short(beta_max)}"
            raise ValueError(f"A VP schedule needs 0 < beta_min <= beta_max, got {given}.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        t = t.double()
        return -(self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def time_of_sigma(self, sigma: float) -> float:
        check_sigma(sigma)
        target = math.log1p(sigma * sigma)  # -log abar
        slope = self.beta_max - self.beta_min
        t = (
            target / self.beta_min
            if slope == 0
            else (2 * target / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * target)))
        )
        if t > 1 + 1e-9:  # up to rounding
            raise ValueError(f"sigma = {sigma} is beyond the end of the schedule; use a smaller sigma.")
        return min(t, 1.0)

    def config(self) -> dict[str, Any]:
        return {"kind": "continuous", "beta_min": self.beta_min, "beta_max": self.beta_max}


class DiscreteVP(Schedule):
    """A table of N betas: the schedule of every network that was trained as a DDPM (Ho et al. 2020).

    Time k/N stands for the state after k noise steps. abar(k/N) = prod_{i<=k} (1 - beta_i) holds exactly at the steps;
    between them log abar is linear, so a discrete model can be driven at any time. The network's 0-based label for time
    k/N is k - 1.

    - ``DiscreteVP.linear()``: 1000 betas from 1e-4 to 0.02, those of DDPM, guided-diffusion (``linear``) and diffusers
      (``DDPMScheduler()``, ``beta_schedule="linear"``).
    - ``DiscreteVP.cosine()``: improved-diffusion's ``cosine`` and diffusers' ``squaredcos_cap_v2``.
    - ``DiscreteVP(betas)``: any table; of a scheduler of diffusers ``DiscreteVP(scheduler.betas)``.

    Args:
        betas: the N betas in (0, 1), a list, array or tensor; not ``alphas`` or ``alphas_cumprod``.
        config: plain data that describes the schedule; default: the table.
    """

    def __init__(self, betas: np.ndarray | Tensor | Sequence[float], config: dict[str, Any] | None = None) -> None:
        betas = _table(betas)
        self.betas = betas
        log_step = np.log1p(-betas)
        self._slope = torch.from_numpy(-log_step * len(betas))
        self._knots = torch.from_numpy(np.concatenate([[0.0], np.cumsum(log_step)]))
        self._config = config or {"kind": "table", "betas": betas.tolist()}

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> DiscreteVP:
        """Linear betas of Ho et al. 2020 (``steps`` = 1000: guided-diffusion's ``linear``)."""
        check_count(steps, "steps of a schedule")
        if not (is_number(beta_start) and is_number(beta_end) and 0 < beta_start <= beta_end < 1):
            given = f"{short(beta_start)} and {short(beta_end)}"
            raise ValueError(f"Linear betas need 0 < beta_start <= beta_end < 1, got {given}.")
        config = {"kind": "linear", "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
        return cls(np.linspace(beta_start, beta_end, steps, dtype=np.float64), config)

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """Squared-cosine abar of Nichol & Dhariwal 2021, betas capped at ``max_beta``."""
        check_count(steps, "steps of a schedule")
        if not (is_number(max_beta) and 0 < max_beta < 1):
            raise ValueError(f"max_beta must lie in (0, 1), got {short(max_beta)}.")
        edges = np.arange(steps + 1, dtype=np.float64) / steps
        abar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], max_beta)
        return cls(betas, {"kind": "cosine", "steps": steps, "max_beta": max_beta})

    @property
    def steps(self) -> int:
        """Number N of noise steps of the table."""
        return len(self.betas)

    def _interval(self, t: Tensor) -> Tensor:
        # ceil of t*N, forgiving float rounding of k/N, so that a step time belongs to the interval it ends.
        return (t.detach() * self.steps - 1e-6).ceil().long().clamp(1, self.steps)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        t = t.double()
        k = self._interval(t)
        knots, slope = _there(self._knots, t), _there(self._slope, t)
        return knots[k - 1] - slope[k - 1] * (t - (k - 1).double() / self.steps)  # exactly 0 at t = 0

    def beta(self, t: Tensor) -> Tensor:
        t = t.double()
        return _there(self._slope, t)[self._interval(t) - 1] + 0.0 * t

    def time_of_sigma(self, sigma: float) -> float:
        check_sigma(sigma)
        ratio = np.sqrt(np.expm1(-self._knots[1:].numpy()))  # sigma/alpha at every step
        k = int(np.searchsorted(ratio, sigma, side="left"))
        if k == self.steps:
            raise ValueError(f"sigma = {sigma} is beyond the end of the schedule; use a smaller sigma.")
        return (k + 1) / self.steps

    def config(self) -> dict[str, Any]:
        return dict(self._config)


def _table(betas: Any) -> np.ndarray:
    """Checked betas (N,) in float64."""
    try:
        found = np.asarray(betas.detach().cpu() if isinstance(betas, Tensor) else betas, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.ndim != 1 or len(found) == 0 or not ((found > 0) & (found < 1)).all():
        raise ValueError(
            f"A discrete schedule needs a one-dimensional table of betas in (0, 1), got {short(betas)}; use "
            "purify.DiscreteVP.linear(steps) or .cosine(steps), or of diffusers' scheduler DiscreteVP(scheduler.betas)."
        )
    if len(found) > 1 and found[0] > 0.5 and (np.diff(found) < 0).all():
        raise ValueError(
            f"These betas fall from {found[0]:.4g} to {found[-1]:.4g}, as alphas do; DiscreteVP takes betas: "
            "1 - alphas (not alphas_cumprod), or of diffusers' scheduler scheduler.betas."
        )
    return found


def _there(table: Tensor, t: Tensor) -> Tensor:
    """A constant table where ``t`` lives; the host, which never changes it, need not wait for the copy."""
    return table.to(t.device, non_blocking=True)


def check_sigma(sigma: float) -> None:
    """Raise unless ``sigma`` is a positive finite number."""
    if not (is_number(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a positive number, got {short(sigma)}.")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "continuous": ContinuousVP,
    "linear": DiscreteVP.linear,
    "cosine": DiscreteVP.cosine,
    "table": DiscreteVP,
}


def schedule_from_config(config: dict[str, Any]) -> Schedule:
    """Build the schedule that ``Schedule.config()`` described."""
    arguments = dict(config)
    build = choose(arguments.pop("kind", ""), SCHEDULES, "schedule")
    try:
        return build(**arguments)
    except TypeError as error:
        raise ValueError(f"This is not a schedule's config ({error}).") from error


def as_schedule(value: Any, what: str = "schedule") -> Schedule:
    """A schedule given as itself, or one with its defaults by name: ``continuous``, ``linear`` or ``cosine``.

    Raises:
        ValueError: it is something else; says what to pass instead.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return choose(value, {name: build for name, build in SCHEDULES.items() if name != "table"}, what)()
    advice = "pass purify.DiscreteVP.linear() for a network trained as DDPM, or purify.ContinuousVP()"
    if isinstance(value, (np.ndarray, Tensor, list, tuple)):
        advice = "of a table of betas make one by purify.DiscreteVP(betas)"
    elif hasattr(value, "betas"):
        advice = "of diffusers' scheduler make one by purify.DiscreteVP(scheduler.betas)"
    elif isinstance(value, type) and issubclass(value, Schedule):
        advice = f"call it: purify.{value.__name__}" + (".linear()" if value is DiscreteVP else "()")
    raise ValueError(f"{what} must be a purify.ContinuousVP or DiscreteVP, got {short(value)}; {advice}.")
