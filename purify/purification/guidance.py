"""Guidance: what bends reverse steps towards the image that came in.

p(u_s | u_t) is weighted by exp(-s_t D), where D is a distance between the state and the input: the mean of an ``sde``
or ``ddpm`` step with variance Sigma_t is shifted by -s_t Sigma_t grad_{u_t} D (Dhariwal & Nichol 2021, algorithm 1). In
``ddim`` (with noise or without), ``ode`` and ``one-shot`` the score becomes score - s_t grad_{u_t} D (algorithm 2).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from purify.answers import as_logits
from purify.checks import NO_GRADIENT, choose, fitting, is_number
from purify.diffusion.noise import Noise
from purify.diffusion.score import Prediction, ScoreModel, per_sample
from purify.purification.conditioning import Conditioning, check_true_or_false
from purify.purification.rebuilt import Rebuilt, check_frozen, gradient_of

# s_t in units of ``scale``.
GROWTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda alpha, sigma: torch.ones_like(sigma),
    "noise-to-signal": lambda alpha, sigma: sigma / alpha,
}
POINTS = ("u_t", "u0_hat")
REFERENCES = ("diffused", "input")


@dataclass(frozen=True)
class Guidance(Conditioning):
    """A distance D and how it guides. Distances are per sample, so that batch-mates do not matter.

    Arguments as for :class:`~purify.purification.conditioning.Conditioning`, and

        scale: a in s_t = a * growth, at least 0; 0 is no guidance.
        growth: one of ``GROWTHS``: ``constant``, or ``noise-to-signal``, sigma(t) / alpha(t).
        point: what is compared: ``u_t``, or ``u0_hat``, the score model's guess of the clean image.
        reference: what it is compared with: the ``input`` of the purifier, or the input ``diffused`` to the same t
            with noise of its own in each step.
        through_score: where ``point`` is u0_hat: whether its gradient goes through the score network, which costs a
            backward pass of it per step, or takes the predicted noise for constant, so that du0_hat/du_t = 1/alpha.
        second_order: whether attacks' gradients go through ``grad D``.
    """

    growth: str = "noise-to-signal"
    point: str = "u_t"
    reference: str = "diffused"
    through_score: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_true_or_false(self.through_score, "through_score")
        choose(self.growth, GROWTHS, "growth of the guidance scale")
        choose(self.point, dict.fromkeys(POINTS), "guided point")
        choose(self.reference, dict.fromkeys(REFERENCES), "guidance reference")

    @property
    def takes_gradients(self) -> bool:
        return True

    @property
    def calls(self) -> tuple[int, int]:
        if self.scale == 0:
            return 0, 0
        through = int(self.point == "u0_hat" and self.through_score)  # backward through the score network
        if self.network is None:
            return through, 0
        each_reference = int(self.reference == "diffused")
        return 2 + through + each_reference, 1 - each_reference

    @property
    def twice(self) -> bool:
        return self.second_order and self.scale != 0 and self.point == "u0_hat" and self.through_score

    def represent(self, u: Tensor) -> Tensor:
        """What is compared of images u (N, C, H, W) in [-1, 1] space: (N, ...)."""
        return u

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """D (N,) between two representations, twice differentiable in both."""

    def bind(self, images: Tensor) -> Tensor:
        """What the steps need of the images that came in: their representation, made once, if that is the reference."""
        return self.represent(images) if self.reference == "input" else images

    def check(self, model: ScoreModel) -> None:
        """Raise ValueError if images of the score model's shape and type cannot be compared."""
        if model.image_shape is None or self.scale == 0:
            return
        parameter = next(model.network.parameters(), torch.empty(0))
        u = torch.zeros(1, *model.image_shape, dtype=parameter.dtype, device=parameter.device).requires_grad_()
        try:
            with torch.enable_grad():
                distance = self.distance(self.represent(u), self.represent(u))
        except RuntimeError as error:  # torch's word for shapes, types and devices that do not fit
            raise ValueError(
                f"The guidance cannot compare images of shape {model.image_shape} and type {u.dtype}: {error}"
            ) from error
        if not distance.requires_grad:
            warnings.warn(
                "The guidance has no gradient: its network ignores the image, or switches gradients off.", stacklevel=3
            )

    @property
    def always(self) -> bool:
        """Whether every step is guided, whatever its time."""
        return self.scale != 0 and self.t_min <= 0 and self.t_max >= 1

    def strength(self, model: ScoreModel, t: Tensor) -> Tensor:
        """s_t at times t: float64 (N,)."""
        strength = self.scale * GROWTHS[self.growth](model.schedule.alpha(t), model.schedule.sigma(t))
        return torch.where(self.inside(t), strength, 0.0)

    def look(self, bound: Tensor, noise: Noise, index: int | Tensor) -> Guide:
        return Guide(self, bound, noise, index)


@dataclass(frozen=True)
class Guide:
    """Guidance bound to the images that came in: what a reverse step asks instead of the score model alone.

    Args:
        guidance: the distance and how it guides.
        bound: ``guidance.bind`` of what came in, (N, ...).
        noise: of the same rows.
        index: the step's noise index, one or (N,).
    """

    guidance: Guidance
    bound: Tensor
    noise: Noise
    index: int | Tensor

    def __call__(self, model: ScoreModel, u: Tensor, t: Tensor) -> tuple[Prediction, Tensor | None]:
        """The score model's prediction at (u_t, t) and s_t grad_{u_t} D, or None where nothing is guided."""
        strength = self.guidance.strength(model, t)
        if not self.guidance.always and not bool((strength != 0).any()):  # the host waits for the device there
            return model.predict(u, t), None
        through = self.guidance.point == "u0_hat" and self.guidance.through_score
        check_frozen((model.network, self.guidance.network), u)
        if through and (self.guidance.second_order or not torch.is_grad_enabled()):
            gradient, *parts = Rebuilt.apply(partial(self._through_score, model), u, self.bound, t)
            return Prediction(*parts), per_sample(strength, u) * gradient
        prediction = model.predict(u, t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.guidance.second_order):
            gradient = (
                self._through_score(model, u, self.bound, t)[0] if through else self._outside(model, prediction, u, t)
            )
        return prediction, per_sample(strength, u) * gradient

    def rebuilt(self, model: ScoreModel, t: Tensor) -> Callable[[Tensor], Tensor]:
        """What the backward pass of a step builds again, beyond what the step keeps, as a function of u_t."""
        if self.guidance.point == "u0_hat" and self.guidance.through_score:
            return lambda u: self._through_score(model, u, self.bound, t)[0]
        return lambda u: gradient_of(lambda w: self._distance(model, w, self.bound, t), u)

    def curvature(self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor, v: Tensor) -> Tensor | None:
        """s_t times D's second derivative at u_t along v, with ``prediction`` held constant; None: not guided at t."""
        strength = self.guidance.strength(model, t)
        if not bool((strength != 0).any()):
            return None
        with torch.enable_grad():
            w = u.detach().requires_grad_()
            gradient = self._outside(model, prediction, w, t)
            if not gradient.requires_grad:
                return torch.zeros_like(u)
            (turned,) = torch.autograd.grad(gradient, w, v)
        return per_sample(strength, u) * turned

    def _through_score(self, model: ScoreModel, u: Tensor, bound: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """grad_{u_t} D through the score network, and what that said."""
        found: list[Prediction] = []

        def distance(w: Tensor) -> Tensor:
            found.append(model.predict(w, t))
            return self._distance(model, model.denoised(found[0].eps, w, t), bound, t)

        gradient, prediction = gradient_of(distance, u), found[0]
        parts = (prediction.eps,) if prediction.variance is None else (prediction.eps, prediction.variance)
        return gradient, *(parts if torch.is_grad_enabled() else (part.detach() for part in parts))

    def _outside(self, model: ScoreModel, prediction: Prediction, u: Tensor, t: Tensor) -> Tensor:
        """The gradient with what the score network said held constant."""

        def gradient(w: Tensor, bound: Tensor, t: Tensor) -> tuple[Tensor]:
            return (gradient_of(lambda v: self._distance(model, v, bound, t), w),)

        if self.guidance.point == "u_t":
            return Rebuilt.apply(gradient, u, self.bound, t)[0]
        u0 = model.denoised(prediction.eps, u, t)
        return Rebuilt.apply(gradient, u0, self.bound, t)[0] / per_sample(model.schedule.alpha(t), u)

    def _distance(self, model: ScoreModel, w: Tensor, bound: Tensor, t: Tensor) -> Tensor:
        reference = bound
        if self.guidance.reference == "diffused":
            z = self.noise.stream("guidance").normal(self.index, w.shape[1:], w.dtype)
            alpha, sigma = per_sample(model.schedule.alpha(t), w), per_sample(model.schedule.sigma(t), w)
            reference = self.guidance.represent(alpha * reference + sigma * z)
        return self.guidance.distance(self.guidance.represent(w), reference)


@dataclass(frozen=True)
class MSEGuidance(Guidance):
    """GDMP (Wang et al. 2022) with D the mean squared difference of pixels in [-1, 1] space; form inferred.

    Arguments as for :class:`Guidance`. The defaults compare u_t with the diffused input under s_t = a sigma/alpha.
    Programs that take the mean over the batch, too, need their scale divided by the batch size.
    """

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)


@dataclass(frozen=True)
class SSIMGuidance(Guidance):
    """GDMP (Wang et al. 2022) with D the negative structural similarity (torchmetrics' SSIM, data range 2).

    Arguments as for :class:`Guidance`, and

        sigma: width of SSIM's Gaussian window in pixels; the usual 1.5 is an 11 x 11 window, and images must be
            larger than half of it.
    """

    sigma: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.sigma) and self.sigma > 0):
            raise ValueError(f"The window of SSIM must have a finite width above 0, got sigma = {self.sigma}.")

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        half = int(3.5 * self.sigma + 0.5)
        if min(a.shape[-2:]) <= half:
            raise ValueError(
                f"SSIM with sigma = {self.sigma} needs images larger than {half} pixels, got {tuple(a.shape[-2:])}; "
                "lower sigma."
            )
        found = structural_similarity_index_measure(a, b, sigma=self.sigma, data_range=2.0, reduction="none")
        assert isinstance(found, Tensor)
        return -found


@dataclass(frozen=True)
class AdversarialGuidance(Guidance):
    """Robust diffusion, AGDM (Lin et al. 2024): D is taken between what an adversarially trained network sees.

    D = mean squared difference of c_phi's logits, or of the activations of one of its layers. Arguments as for
    :class:`Guidance`; by default u0_hat is compared with the input, which keeps c_phi near the images it was trained
    on, under a constant scale (all inferred); and

        auxiliary: c_phi, from images in [0, 1] to logits; embedded: ``purify.zoo.classifier("digits-guide")``.
        layer: name of the module of c_phi whose output is compared (``named_modules``); default: the logits.
    """

    growth: str = "constant"
    point: str = "u0_hat"
    reference: str = "input"
    auxiliary: nn.Module | None = None
    layer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.auxiliary, nn.Module):
            raise ValueError(
                "Adversarial guidance needs its auxiliary network: pass auxiliary=, a module from images in [0, 1] to "
                "logits."
            )
        if self.layer is not None:
            choose(self.layer, dict(self.auxiliary.named_modules()), "layer of the auxiliary network")

    @property
    def network(self) -> nn.Module | None:
        return self.auxiliary

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)

    def represent(self, u: Tensor) -> Tensor:
        """Logits or the layer's output for u (N, C, H, W) in [-1, 1] space."""
        network, seen = self.auxiliary, []
        assert network is not None
        if self.layer is None:
            return _tensor(as_logits(_asked(network, u)), "The auxiliary network")

        def see(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.append(_tensor(output, f"Layer {self.layer!r}").clone())  # what follows may work in place

        handle = network.get_submodule(self.layer).register_forward_hook(see)
        try:
            _asked(network, u)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"Layer {self.layer!r} of the auxiliary network does not run; name another.")
        return seen[-1]


def _asked(network: nn.Module, u: Tensor) -> Any:
    """What the network returns for images in [-1, 1] space.

    Raises:
        ValueError: it cannot take them, or leaves autograd.
    """
    x = (u + 1) / 2
    try:
        with fitting(x, "The auxiliary network"):
            return network(x)
    except ValueError as error:
        if NO_GRADIENT not in str(error):
            raise
        raise ValueError(
            "The auxiliary network leaves autograd (numpy or ONNX inside), and guidance is a gradient of it; take a "
            "network of torch."
        ) from error


def _tensor(output: Any, what: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"{what} must return a tensor to be compared, it returned {type(output).__name__}.")
    return output


GUIDANCES: dict[str, type[Conditioning]] = {
    "mse": MSEGuidance,
    "ssim": SSIMGuidance,
    "adversarial": AdversarialGuidance,
}
