"""Reverse steps: pure functions from u_t to u_s (s < t), with a time of its own for every sample.

No hidden state and no random generator inside: the standard normal z comes from outside. That is what makes
checkpointing, mixed noise levels in a batch and bit-equal recomputation possible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from purify.checks import choose, is_number
from purify.diffusion.score import Prediction, ScoreModel, per_sample
from purify.finite import clamped


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0, so that a last step without noise has no infinite slope."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


# What a step asks at (u_t, t): the score model's prediction and, under guidance, s_t grad_{u_t} D (N, C, H, W).
Look = Callable[[ScoreModel, Tensor, Tensor], tuple[Prediction, Tensor | None]]


def unguided(model: ScoreModel, u: Tensor, t: Tensor) -> tuple[Prediction, Tensor | None]:
    """The score model's prediction alone."""
    return model.predict(u, t), None


def bent(model: ScoreModel, prediction: Prediction, push: Tensor | None, t: Tensor) -> Prediction:
    """The prediction of the guided score, score - push (Dhariwal & Nichol 2021, algorithm 2)."""
    if push is None:
        return prediction
    return replace(prediction, eps=prediction.eps + per_sample(model.schedule.sigma(t), push) * push)


class ReverseRule(ABC):
    """One step of a reverse process: ``rule(model, u_t, t, s, z, look) -> u_s``.

    ``u_t`` (N, C, H, W); ``t`` and ``s`` float64 (N,) with 0 <= s <= t <= 1; ``z`` standard normal like u_t,
    or None where ``stochastic`` is False; ``look`` decides what guides the step.
    """

    @property
    def stochastic(self) -> bool:
        """Whether the step uses z."""
        return True

    @property
    def adds_noise(self) -> bool:
        """Whether z is only added, with a weight that depends on times alone: the step has the same derivative by the
        state without it, and z None leaves it out. Not inherited: a subclass may do more with z, and says so itself."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "adds_noise" not in vars(cls):
            cls.adds_noise = False  # type: ignore[method-assign, assignment]

    @property
    def calls(self) -> int | None:
        """Network calls per step, or None where an adaptive solver decides."""
        return 1

    @property
    def held(self) -> bool:
        """Whether its steps stay at their time: t = s, from the image as it came. The others step down in time."""
        return False

    @property
    def exact(self) -> bool:
        """Whether autograd's derivative of a step is that of the step."""
        return True

    @property
    def twice(self) -> bool:
        """Whether the derivative of a step takes second derivatives of the network."""
        return False

    def check(self, model: ScoreModel) -> None:  # noqa: B027 - most rules take any model
        """Raise ValueError if the rule cannot drive ``model``."""

    def begin(self, u: Tensor) -> Tensor:
        """The state that a held rule steps from, of images u (N, C, H, W): (N, C', H, W)."""
        return u

    def finish(self, state: Tensor) -> Tensor:
        """The images (N, C, H, W) of a held rule's last state."""
        return state

    def drawn(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape of z for states of ``shape`` (C', H, W)."""
        return shape

    def rebuilt(self, model: ScoreModel, t: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What the backward pass of a step at ``t`` builds beyond what the step keeps, as a function of the state."""
        return None

    @abstractmethod
    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor: ...


class GaussianRule(ReverseRule):
    """A step u_s = mean + std z that needs one network call. Guidance shifts the mean by -std^2 push."""

    @abstractmethod
    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (N, C, H, W) and standard deviation (broadcastable to it) of u_s."""

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        prediction, push = look(model, u, t)
        mean, std = self.moments(model, prediction, u, t, s)
        if push is not None:
            mean = mean - std.square() * push
        return mean if z is None else mean + std * z


@dataclass(frozen=True)
class EulerMaruyama(GaussianRule):
    """Reverse VP-SDE du = -(beta/2)(u + 2 score) dt + sqrt(beta) dw (Song et al. 2021, eq. 6; DiffPure eq. 5)."""

    adds_noise = True

    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        rate = model.schedule.beta(t) * (t - s)
        pull = per_sample(rate / model.schedule.sigma(t), u)
        mean = u + per_sample(0.5 * rate, u) * u - pull * model.noise(prediction, t)
        return mean, per_sample(safe_sqrt(rate), u)


@dataclass(frozen=True)
class Ancestral(GaussianRule):
    """DDPM ancestral sampling between any two times (Ho et al. 2020, eq. 6-7).

    Args:
        variance: ``posterior`` (beta-tilde), ``beta`` (fixed large), or ``learned`` (Nichol & Dhariwal 2021,
            eq. 15, for networks with prediction ``learned_variance``).
        clip_denoised: clamp u0_hat to [-1, 1] as guided-diffusion does.
    """

    variance: str = "posterior"
    clip_denoised: bool = False

    def __post_init__(self) -> None:
        choose(self.variance, {"posterior": 0, "beta": 0, "learned": 0}, "DDPM variance")

    @property
    def adds_noise(self) -> bool:
        return self.variance != "learned"

    def check(self, model: ScoreModel) -> None:
        if self.variance == "learned" and model.prediction != "learned_variance":
            raise ValueError("variance='learned' needs a score model with prediction='learned_variance'.")

    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        schedule = model.schedule
        var_t, var_s = schedule.variance(t), schedule.variance(s)
        log_ratio = schedule.log_alpha_bar(t) - schedule.log_alpha_bar(s)  # log(1 - beta) of this step
        beta = -torch.expm1(log_ratio)
        u0 = model.clean(prediction, u, t)
        if self.clip_denoised:
            u0 = clamped(u0, -1, 1)
        mean = per_sample(schedule.alpha(s) * beta / var_t, u) * u0
        mean = mean + per_sample((0.5 * log_ratio).exp() * var_s / var_t, u) * u
        posterior = beta * var_s / var_t
        if self.variance == "learned":
            return mean, self._learned_std(prediction, u, beta, posterior)
        chosen = posterior if self.variance == "posterior" else torch.where(var_s > 0, beta, 0.0)
        return mean, per_sample(safe_sqrt(chosen), u)

    def _learned_std(self, prediction: Prediction, u: Tensor, beta: Tensor, posterior: Tensor) -> Tensor:
        assert prediction.variance is not None
        noisy = posterior > 0
        low = torch.where(noisy, posterior, 1.0).log()
        fraction = 0.5 * (prediction.variance + 1)
        log_var = fraction * per_sample(beta.log(), u) + (1 - fraction) * per_sample(low, u)
        return per_sample(noisy.double(), u) * (0.5 * log_var).exp()


@dataclass(frozen=True)
class DDIM(GaussianRule):
    """DDIM (Song et al. 2021a, eq. 12, 16): eta = 0 is deterministic, eta = 1 is the DDPM posterior.

    Guidance bends the score, whatever eta.
    """

    eta: float = 0.0

    adds_noise = True

    def __post_init__(self) -> None:
        if not (is_number(self.eta) and 0 <= self.eta <= 1):
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}.")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        schedule = model.schedule
        var_t, var_s = schedule.variance(t), schedule.variance(s)
        beta = -torch.expm1(schedule.log_alpha_bar(t) - schedule.log_alpha_bar(s))
        noise_var = self.eta**2 * beta * var_s / var_t
        u0 = model.clean(prediction, u, t)
        mean = per_sample(schedule.alpha(s), u) * u0
        mean = mean + per_sample(safe_sqrt(var_s - noise_var), u) * prediction.eps
        return mean, per_sample(safe_sqrt(noise_var), u)

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        return super().__call__(model, u, t, s, z, lambda *at: (bent(model, *look(*at), t), None))


@dataclass(frozen=True)
class RandomSampling(GaussianRule):
    """u_s = alpha(s) u0_hat + std z: the DDPM posterior's std, but the last noise is forgotten (Zhang et al. 2024)."""

    adds_noise = True

    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        schedule = model.schedule
        beta = -torch.expm1(schedule.log_alpha_bar(t) - schedule.log_alpha_bar(s))
        variance = beta * schedule.variance(s) / schedule.variance(t)
        return per_sample(schedule.alpha(s), u) * model.clean(prediction, u, t), per_sample(safe_sqrt(variance), u)


@dataclass(frozen=True)
class ConsistencySampling(GaussianRule):
    """u_s = alpha(s) u0_hat + sigma(s) z: the estimate diffused anew (Song et al. 2023, algorithm 1)."""

    adds_noise = True

    def moments(
        self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        std = safe_sqrt(model.schedule.variance(s))
        return per_sample(model.schedule.alpha(s), u) * model.clean(prediction, u, t), per_sample(std, u)


# torchdiffeq's solvers with their network calls per step; None: adaptive, as many as the tolerance asks for.
ODE_SOLVERS: dict[str, int | None] = {
    "euler": 1,
    "midpoint": 2,
    "heun3": 3,
    "rk4": 4,
    "adaptive_heun": None,
    "bosh3": None,
    "dopri5": None,
    "dopri8": None,
}


@dataclass(frozen=True)
class ProbabilityFlow(ReverseRule):
    """Probability-flow ODE du = -(beta/2)(u + score) dt (Song et al. 2021, eq. 13) through torchdiffeq.

    Args:
        solver: one of ``ODE_SOLVERS``. Fixed-step solvers take one step per reverse step; adaptive ones choose
            their steps for the whole batch and by the image, so only the former give results independent of
            batch-mates, and gradients exact beyond the solver's tolerance.
        rtol, atol: tolerances of the adaptive solvers.
        t_min: the field is evaluated at max(t, t_min), because the score diverges at t = 0, where solvers with
            inner stages would ask for it.
    """

    solver: str = "euler"
    rtol: float = 1e-5
    atol: float = 1e-5
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        choose(self.solver, ODE_SOLVERS, "ODE solver")
        if not (0 < self.t_min < 1 and self.rtol > 0 and self.atol > 0):
            raise ValueError("The ODE rule needs t_min in (0, 1) and positive rtol and atol.")

    @property
    def stochastic(self) -> bool:
        return False

    @property
    def calls(self) -> int | None:
        return ODE_SOLVERS[self.solver]

    def velocity(self, model: ScoreModel, u: Tensor, t: Tensor, look: Look = unguided) -> Tensor:
        """du/dt at (u, t): (N, C, H, W) and (N,). Guidance bends the score."""
        t = t.clamp_min(self.t_min)
        half_beta = 0.5 * model.schedule.beta(t)
        eps = model.noise(bent(model, *look(model, u, t), t), t)
        return per_sample(half_beta / model.schedule.sigma(t), u) * eps - per_sample(half_beta, u) * u

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        return self.solve(odeint, model, u, t, s, look)

    def solve(
        self,
        integrate: Callable[..., Tensor],
        model: ScoreModel,
        u: Tensor,
        t: Tensor,
        s: Tensor,
        look: Look = unguided,
    ) -> Tensor:
        """u_s by ``integrate``: torchdiffeq's ``odeint``, or another of its interface."""

        # tau in [0, 1] stands for t + tau (s - t), so that every sample has its own times.
        def field(tau: Tensor, v: Tensor) -> Tensor:
            return per_sample(s - t, v) * self.velocity(model, v, t + tau * (s - t), look)

        span = torch.tensor([0.0, 1.0], dtype=torch.float64, device=u.device)
        return integrate(field, u, span, method=self.solver, rtol=self.rtol, atol=self.atol)[-1]


@dataclass(frozen=True)
class OneShot(ReverseRule):
    """u0_hat(u_t, t) in one network call, whatever s (Carlini et al. 2022). Guidance bends the score."""

    @property
    def stochastic(self) -> bool:
        return False

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        return model.clean(bent(model, *look(model, u, t), t), u, t)


REVERSE_RULES: dict[str, type[ReverseRule]] = {
    "sde": EulerMaruyama,
    "ddpm": Ancestral,
    "ddim": DDIM,
    "ode": ProbabilityFlow,
    "one-shot": OneShot,
    "random": RandomSampling,
    "consistency": ConsistencySampling,
}
