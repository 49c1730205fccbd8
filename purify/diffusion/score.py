"""ScoreModel: any diffusion network seen as eps, score or denoiser at (u_t, t)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from purify.checks import check_shape, choose, fitting, is_number, short
from purify.diffusion.classes import ClassRule, Predicted, Unconditional, as_rule, check_takes, check_told
from purify.diffusion.precision import AUTOCAST, PRECISIONS, check_autocast, compiled, evaluate, mark_batch
from purify.diffusion.schedule import DiscreteVP, Schedule, as_schedule
from purify.fingerprint import is_compiled, unwrapped, weights_digest
from purify.transforms import COMPILED, set_mode

if TYPE_CHECKING:
    from purify.diffusion.health import Health


def per_sample(coefficient: Tensor, u: Tensor) -> Tensor:
    """Coefficients (N,), shaped and rounded (most are float64) to multiply images ``u`` (N, C, H, W)."""
    return coefficient.to(u.dtype).reshape(-1, *[1] * (u.ndim - 1))


@dataclass(frozen=True)
class Prediction:
    """What one network call says about u_t at time t.

    Attributes:
        eps: predicted noise, (N, C, H, W).
        variance: the network's v in [-1, 1] that interpolates log-variances (Nichol & Dhariwal 2021,
            eq. 15), or None if the network does not learn the variance.
        added: what a correction adds to the clean estimate u0_hat that eps gives, (N, C, H, W), or None.
    """

    eps: Tensor
    variance: Tensor | None = None
    added: Tensor | None = None


def _from_eps(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction(output)


def _from_score(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction(-sigma * output)


def _from_x0(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction((u - alpha * output) / sigma)


def _from_v(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction(sigma * u + alpha * output)


def _from_learned_variance(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    eps, variance = output.chunk(2, dim=1)
    return Prediction(eps, variance)


def _from_velocity(output: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    return Prediction((u + alpha * output) / (alpha + sigma))


# v = alpha eps - sigma u0 (Salimans & Ho 2022); the score is grad log p_t(u_t) = -eps / sigma. A flow network
# (Liu et al. 2023) sees x = (1 - tau) u0 + tau z = u_t / (alpha + sigma) at tau = sigma / (alpha + sigma), and predicts
# z - u0. A consistency function (Song et al. 2023) predicts where its path began.
PREDICTIONS = {
    "eps": _from_eps,
    "score": _from_score,
    "x0": _from_x0,
    "v": _from_v,
    "learned_variance": _from_learned_variance,
    "velocity": _from_velocity,
    "consistency": _from_x0,
}


SETTINGS = ("schedule", "prediction", "image_shape", "time_scale", "time_offset", "autocast", "classes")


def check_settings(settings: Iterable[str]) -> None:
    """Raise ValueError unless these are names of :class:`ScoreModel`'s settings."""
    for name in settings:
        choose(name, dict.fromkeys(SETTINGS), "setting of a score model")


# Channels and size, as diffusers (in its config), EDM and guided-diffusion call them.
SHAPES = (("in_channels", "sample_size"), ("img_channels", "img_resolution"), ("in_channels", "image_size"))


def said_shape(network: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the images that a network says it was built for; None where it says nothing.

    Asked are diffusers' ``config`` (``in_channels``, ``sample_size``), EDM's ``img_channels`` and ``img_resolution``,
    guided-diffusion's ``in_channels`` and ``image_size``; through wrappers for several devices and ``torch.compile``.
    """
    network = unwrapped(network)
    network = getattr(network, "denoiser", network)
    for told in (getattr(network, "config", None), network):
        for names in SHAPES:
            channels, size = (_told(told, name) for name in names)
            height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
            if all(isinstance(n, int) and n > 0 for n in (channels, height, width)):
                return channels, height, width
    return None


def _told(told: Any, name: str) -> Any:
    return told.get(name) if isinstance(told, Mapping) else getattr(told, name, None)


def _number(value: Any, what: str) -> float:
    if not is_number(value):
        raise ValueError(f"{what} must be a finite number, got {short(value)}.")
    return float(value)


class ScoreModel(nn.Module):
    """One interface over diffusion networks of every parametrisation.

    Args:
        network: called as ``network(u_t, labels)`` with u_t (N, C, H, W) in diffusion space and float labels (N,), of
            float32 also where the network and its images are of half precision; returns a tensor or an object with
            ``.sample`` (diffusers).
        schedule: the VP schedule that the network was trained on: a :class:`~purify.ContinuousVP`, for networks trained
            as DDPM a :class:`~purify.DiscreteVP`, or the name of one with its defaults: ``continuous``, ``linear``,
            ``cosine``.
        prediction: what the network returns: one of ``PREDICTIONS`` (``learned_variance``: eps and v stacked;
            ``velocity``: z - u0 of flow matching on the straight path from images at time 0 to noise at 1;
            ``consistency``: the image at the path's beginning).
        image_shape: (C, H, W) of the images, checked by the purifier; None: what the network says (see
            :func:`said_shape`), and where it says nothing, any.
        time_scale, time_offset: labels are ``max(t * time_scale - time_offset, 0)``. Default: for a discrete schedule
            of N steps N and 1 (0-based labels), for a continuous one 1000 and 0 (score_sde's networks: 999 and 0). For
            ``velocity`` t stands for the path's time sigma / (alpha + sigma), whatever the schedule; 1000 and 0.
        autocast: run the network, and only it, in ``bfloat16`` or ``float16`` (a name or torch dtype) by
            ``torch.autocast``; see :func:`purify.diffusion.precision.evaluate`.
        classes: what a class-conditional network, called as ``network(u_t, labels, classes)``, is told: a
            :class:`~purify.diffusion.classes.ClassRule`, ``unconditional`` or a class. None: nothing.

    Times are float64 tensors (N,) in [0, 1]. Labels that are whole numbers up to rounding are made exact.

    Raises:
        ValueError: unknown names, arguments of another type, autocast of a float64 network, a class-conditional network
            without ``classes``.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule | str,
        prediction: str = "eps",
        image_shape: tuple[int, int, int] | None = None,
        time_scale: float | None = None,
        time_offset: float | None = None,
        autocast: str | torch.dtype | None = None,
        classes: ClassRule | str | int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(f"network must be a torch.nn.Module, got {type(network).__name__}.")
        schedule = as_schedule(schedule)
        self._to_prediction = choose(prediction, PREDICTIONS, "prediction")
        self.network = network
        self.compiled = False  # by with_precision
        self.schedule = schedule
        self.prediction = prediction
        self.given_shape = None if image_shape is None else check_shape(image_shape)
        self.image_shape = said_shape(network) if self.given_shape is None else self.given_shape
        stepwise = isinstance(schedule, DiscreteVP) and prediction != "velocity"
        scale, offset = (float(schedule.steps), 1.0) if stepwise else (1000.0, 0.0)  # type: ignore[attr-defined]
        self.time_scale = scale if time_scale is None else _number(time_scale, "time_scale")
        if self.time_scale <= 0:
            raise ValueError(f"time_scale must be positive, got {self.time_scale:g}; labels grow with time.")
        self.time_offset = offset if time_offset is None else _number(time_offset, "time_offset")
        self.classes = None if classes is None else as_rule(classes)
        if self.classes is None:
            check_told(network)
        else:
            check_takes(network)
            self.classes.check(network)
        # Registered here, so that it moves with the network.
        self.labeller = self.classes.classifier if isinstance(self.classes, Predicted) else None
        self._bound: Tensor | None = None
        self.set_autocast(autocast)

    def set_autocast(self, autocast: str | torch.dtype | None) -> None:
        """Run the network from now on in this type, as the argument of this name says; None: in its own."""
        name = None if autocast is None else str(autocast).removeprefix("torch.")
        if name is not None:
            choose(name, AUTOCAST, "autocast type")
            check_autocast(self.network, name)
        self.autocast = name

    def train(self, mode: bool = True) -> ScoreModel:
        """As usual; an exported network keeps the mode of its export."""
        self.training = mode
        for network in self.children():
            set_mode(network, mode)
        return self

    @property
    def dtype(self) -> torch.dtype | None:
        """The network's floating type; None if it has no parameters."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

    def labels(self, t: Tensor) -> Tensor:
        """Network labels for times ``t`` (N,), float64, differentiable in t."""
        time = t.double()
        if self.prediction == "velocity":
            alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
            time = sigma / (alpha + sigma)
        labels = (time * self.time_scale - self.time_offset).clamp_min(0)
        whole = labels.detach().round()
        rounding = torch.where((whole - labels.detach()).abs() < 1e-6, whole - labels.detach(), 0.0)
        return labels + rounding

    def predict(self, u: Tensor, t: Tensor) -> Prediction:
        """One network call at u_t = ``u`` (N, C, H, W) and times ``t`` (N,).

        Raises:
            ValueError: the network cannot take these images, or returns another shape than its prediction has.
        """
        if not (isinstance(u, Tensor) and isinstance(t, Tensor)) or t.shape != u.shape[:1]:
            given = f"{short(u)} and {short(t)}"
            raise ValueError(f"A score model takes tensors u (N, C, H, W) and times t (N,) in [0, 1], got {given}.")
        alpha, sigma = (per_sample(c, u) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return self._to_prediction(self._output(u, t, alpha, sigma), u, alpha, sigma)

    def output(self, u: Tensor, t: Tensor) -> Tensor:
        """What the network itself says at u_t = ``u`` (N, C, H, W) and times ``t`` (N,); raises as :meth:`predict`."""
        return self._output(u, t, *(per_sample(c, u) for c in (self.schedule.alpha(t), self.schedule.sigma(t))))

    def _output(self, u: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        with fitting(u, "The score network"):
            labels = self.labels(t).to(torch.promote_types(u.dtype, torch.float32))  # bfloat16 would make 1000 of 999
            seen = self.seen(u, alpha, sigma)
            classes = self.classes_for(u)
            if self.compiled:
                mark_batch(seen, labels, classes)
            output = evaluate(self.network, seen, labels, self.autocast, classes)
        self.check_output(output, u)
        return output.to(u.dtype)

    def seen(self, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is shown of u_t: itself, or for a flow its point of the straight path."""
        return u / (alpha + sigma) if self.prediction == "velocity" else u

    def classes_for(self, u: Tensor) -> Tensor | None:
        """What the network is told with images u (N, C, H, W): of those it is bound to, or else of u itself."""
        if self.classes is None:
            return None
        if self._bound is None:
            return self.classes.of(self.network, u)
        return self._bound.repeat(len(u) // len(self._bound), 1)

    def bind(self, u: Tensor) -> ScoreModel:
        """The same model, told the classes of the images u (N, C, H, W), in [-1, 1] space, whatever it sees later.

        Rows beyond N are theirs again, in the same order.
        """
        if self.classes is None or not self.classes.looks:
            return self
        other = copy.copy(self)
        other._bound = self.classes.of(self.network, u)
        return other

    def told(self, classes: Tensor) -> ScoreModel:
        """The same model, told these classes, weights (N, K) of which each row sums to 1, of the images that it sees.

        Raises:
            ValueError: the network takes no classes.
        """
        check_takes(self.network)
        other = copy.copy(self)
        other.classes, other._bound = self.classes or Unconditional(), classes
        return other

    def __getitem__(self, rows: Tensor) -> ScoreModel:
        """The model bound to some of its rows."""
        if self._bound is None:
            return self
        return self.bound_to(self._bound[rows])

    @property
    def bound(self) -> Tensor | None:
        """The classes, or weights of classes, that the model is told whatever it sees."""
        return self._bound

    def bound_to(self, classes: Tensor) -> ScoreModel:
        """The same model with these classes for :attr:`bound`."""
        other = copy.copy(self)
        other._bound = classes
        return other

    def check_output(self, output: Tensor, u: Tensor) -> None:
        """Raise ValueError for what would be broadcast, or fail somewhere else."""
        learned = self.prediction == "learned_variance"
        expected = (len(u), (2 if learned else 1) * u.shape[1], *u.shape[2:])
        if output.shape != expected:
            advice = ""
            if output.shape[1:2] == (2 * u.shape[1],) or learned:
                advice = f"; use prediction='{'eps' if learned else 'learned_variance'}'"
            raise ValueError(
                f"A network that predicts {self.prediction} returns shape {expected} for these images, this one "
                f"returned {tuple(output.shape)}{advice}."
            )

    def eps(self, u: Tensor, t: Tensor) -> Tensor:
        """Predicted noise eps(u_t, t), (N, C, H, W)."""
        return self.predict(u, t).eps

    forward = eps

    def score(self, u: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(u_t) = -eps / sigma(t)."""
        return -self.eps(u, t) / per_sample(self.schedule.sigma(t), u)

    def denoise(self, u: Tensor, t: Tensor) -> Tensor:
        """u0_hat = (u_t - sigma eps) / alpha, the posterior mean of the clean image in [-1, 1] space."""
        return self.denoised(self.eps(u, t), u, t)

    def denoised(self, eps: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """u0_hat from a prediction already made."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (u - per_sample(sigma, u) * eps) / per_sample(alpha, u)

    def clean(self, prediction: Prediction, u: Tensor, t: Tensor) -> Tensor:
        """u0_hat of a prediction, with what was added to it."""
        u0 = self.denoised(prediction.eps, u, t)
        return u0 if prediction.added is None else u0 + prediction.added

    def noise(self, prediction: Prediction, t: Tensor) -> Tensor:
        """The eps that gives the u0_hat of :meth:`clean`."""
        eps, added = prediction.eps, prediction.added
        return eps if added is None else eps - per_sample(self.schedule.alpha(t) / self.schedule.sigma(t), eps) * added

    def check(
        self, images: Tensor, n: int = 32, levels: Sequence[float] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2), seed: int = 0
    ) -> Health:
        """Whether the network denoises as it is declared, or would do better read otherwise.

        Args:
            images: clean images (N, C, H, W) in [0, 1], like those that it was trained on.
            n: of which so many are used, fewer of large ones.
            levels: noise levels sigma / alpha.
            seed: keys the noise.

        Raises:
            ValueError: bad images, or an output of another shape than declared.
        """
        from purify.diffusion import health  # which needs this class

        return health.check(self, images, n, levels, seed)

    def with_settings(self, **settings: Any) -> ScoreModel:
        """A model over the same network, with other arguments than this one's."""
        check_settings(settings)
        own = {**{name: getattr(self, name) for name in SETTINGS}, "image_shape": self.given_shape}
        other = ScoreModel(self.network, **{**own, **settings})
        other.compiled = self.compiled
        return other

    def with_precision(self, precision: str) -> ScoreModel:
        """The same model (sharing its weights) with its network run as one of ``PRECISIONS`` says, and not otherwise.

        A network that came compiled stays so.

        Raises:
            ValueError: an unknown precision; autocast of a float64 network.
        """
        run = choose(precision, PRECISIONS, "precision")
        other = copy.copy(self)
        other._modules = dict(self._modules)  # of its own, so that this model keeps its network
        other.set_autocast(run.autocast)
        if run.compiled and not is_compiled(self.network):
            other.network, other.compiled = compiled(self.network), True
        elif self.compiled and not run.compiled:
            other.network, other.compiled = getattr(self.network, COMPILED), False
        return other

    def config(self) -> dict[str, Any]:
        """Plain data that describes the model apart from its network."""
        config = {
            "prediction": self.prediction,
            "schedule": self.schedule.config(),
            "image_shape": None if self.given_shape is None else list(self.given_shape),
            "time_scale": self.time_scale,
            "time_offset": self.time_offset,
        }
        config = config if self.autocast is None else {**config, "autocast": self.autocast}
        return config if self.classes is None else {**config, "classes": self.classes.config()}

    def fingerprint(self) -> str:
        """sha256 over config and weights: two models with the same fingerprint purify alike."""
        digest = hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode())
        digest.update(weights_digest(self.network).encode())
        return digest.hexdigest()
