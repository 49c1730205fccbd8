"""Variance-preserving noise schedules: u_t = alpha(t) u + sigma(t) z with alpha^2 + sigma^2 = 1.

Time t lies in [0, 1]; t = 0 is the clean image. Every function takes a tensor of times of any shape and
returns float64 of that shape, differentiable in t, so that rounding happens once, where an image is touched.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purify.checks import choose, is_number


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
            raise ValueError(f"A VP schedule needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}.")
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
        if t > 1:
            raise ValueError(f"sigma = {sigma} is beyond the end of the schedule; use a smaller sigma.")
        return t

    def config(self) -> dict[str, Any]:
        return {"kind": "continuous", "beta_min": self.beta_min, "beta_max": self.beta_max}


class DiscreteVP(Schedule):
    """A DDPM table of N betas (Ho et al. 2020). Time k/N stands for the state after k noise steps.

    abar(k/N) = prod_{i<=k} (1 - beta_i) holds exactly at the steps; between them log abar is linear, so a
    discrete model can be driven at any time. The network's 0-based label for time k/N is k - 1.
    """

    def __init__(self, betas: np.ndarray | list[float], config: dict[str, Any] | None = None) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("A discrete schedule needs a one-dimensional table of betas in (0, 1).")
        self.betas = betas
        log_step = np.log1p(-betas)
        self._slope = torch.from_numpy(-log_step * len(betas))
        self._knots = torch.from_numpy(np.concatenate([[0.0], np.cumsum(log_step)]))
        self._config = config or {"kind": "table", "betas": betas.tolist()}

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> DiscreteVP:
        """Linear betas of Ho et al. 2020 (``steps`` = 1000: guided-diffusion's ``linear``)."""
        config = {"kind": "linear", "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
        return cls(np.linspace(beta_start, beta_end, steps, dtype=np.float64), config)

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """Squared-cosine abar of Nichol & Dhariwal 2021, betas capped at ``max_beta``."""
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


def _there(table: Tensor, t: Tensor) -> Tensor:
    """A constant table where ``t`` lives; the host, which never changes it, need not wait for the copy."""
    return table.to(t.device, non_blocking=True)


def check_sigma(sigma: float) -> None:
    """Raise unless ``sigma`` is a positive finite number."""
    if not (is_number(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a positive number, got {sigma}.")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "continuous": ContinuousVP,
    "linear": DiscreteVP.linear,
    "cosine": DiscreteVP.cosine,
    "table": DiscreteVP,
}


def schedule_from_config(config: dict[str, Any]) -> Schedule:
    """Build the schedule that ``Schedule.config()`` described."""
    arguments = dict(config)
    return choose(arguments.pop("kind", ""), SCHEDULES, "schedule")(**arguments)
