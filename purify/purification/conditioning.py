"""What ties reverse steps to the image that came in: guidance by a distance, or a correction of the clean estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from purify.checks import is_number
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import Look
from purify.diffusion.score import Prediction, ScoreModel, per_sample
from purify.purification.process import Enter

ROUNDING = 1e-9  # by which a step's time may miss the number that was meant


def check_true_or_false(value: object, name: str) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} of the guidance must be true or false, got {value!r}.")


@dataclass(frozen=True)
class Conditioning(ABC):
    """How reverse steps depend on the image that came in, beyond where they start.

    Args:
        scale: strength, at least 0; 0 is none at all.
        t_min, t_max: only steps that start in (t_min, t_max] are conditioned.
        second_order: whether attacks' gradients go through what is added to a step. False takes it for constant, an
            approximation that published attacks made: gradients are then not exact.
    """

    scale: float
    t_min: float = 0.0
    t_max: float = 1.0
    second_order: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "t_min", "t_max"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} of the guidance must be a finite number, got {getattr(self, name)!r}.")
        check_true_or_false(self.second_order, "second_order")
        if self.scale < 0:
            raise ValueError(f"The guidance scale must be a number of at least 0, got {self.scale}.")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"Guidance needs 0 <= t_min < t_max <= 1, got {self.t_min} and {self.t_max}.")

    @property
    def exact(self) -> bool:
        """Whether gradients through conditioned steps are those of the steps."""
        return self.second_order or self.scale == 0

    @property
    def takes_gradients(self) -> bool:
        """Whether a step needs autograd even where nobody differentiates it."""
        return False

    @property
    def twice(self) -> bool:
        """Whether gradients through conditioned steps take second derivatives of the score network."""
        return False

    @property
    def network(self) -> nn.Module | None:
        """The auxiliary network, if there is one; the purifier freezes it and moves it between devices."""
        return None

    @property
    def calls(self) -> tuple[int, int]:
        """Network calls that it adds to a step, and once to a purification."""
        return 0, 0

    def bind(self, images: Tensor) -> Tensor:
        """What the steps need of the images that came in, u (N, C, H, W) in [-1, 1] space: (N, ...), made once."""
        return images

    def check(self, model: ScoreModel) -> None:  # noqa: B027 - some take any model
        """Raise ValueError if it cannot condition steps of ``model``."""

    def inside(self, t: Tensor) -> Tensor:
        """Whether steps that start at ``t`` (N,) are conditioned, bool (N,)."""
        return (t > self.t_min + ROUNDING) & (t <= self.t_max + ROUNDING)

    @abstractmethod
    def look(self, bound: Tensor, noise: Noise, index: int | Tensor) -> Look:
        """What a step asks instead of the score model alone.

        Args:
            bound: what :meth:`bind` gave, of the step's rows.
            noise: of the same rows.
            index: the step's noise index, one or (N,).
        """

    def enter(self, model: ScoreModel, s: Tensor, bound: Tensor, noise: Noise, index: int | Tensor) -> Enter | None:
        """What is done to the state of a step to times ``s`` (N,), and to its time, before it is taken; None: nothing.

        Other arguments as for :meth:`look`.
        """
        return None


class Correction(Conditioning):
    """Adds ``scale`` times something to u0_hat, the clean estimate of every conditioned step.

    ``ddpm`` and ``ddim`` put the corrected estimate in place of their own, with the predicted noise as it was;
    ``sde`` and ``ode``, which know the noise alone, take the noise that gives it.
    """

    @abstractmethod
    def added(
        self, model: ScoreModel, u0: Tensor, images: Tensor, t: Tensor, noise: Noise, index: int | Tensor
    ) -> Tensor:
        """What is added to the estimates ``u0`` (N, C, H, W) at times ``t`` (N,) for scale 1, differentiable.

        ``images``: what came in; ``noise``: numbers of its own for the step, under ``index``.
        """

    def look(self, bound: Tensor, noise: Noise, index: int | Tensor) -> Corrector:
        return Corrector(self, bound, noise.stream("guidance"), index)


@dataclass(frozen=True)
class Corrector:
    """A correction bound to the images that came in. Attributes: see :meth:`Conditioning.look`."""

    correction: Correction
    images: Tensor
    noise: Noise
    index: int | Tensor

    def __call__(self, model: ScoreModel, u: Tensor, t: Tensor) -> tuple[Prediction, None]:
        """The score model's prediction at (u_t, t) with what is added to u0_hat, nothing outside of the window."""
        rule, prediction = self.correction, model.predict(u, t)
        inside = rule.inside(t)
        if rule.scale == 0 or not bool(inside.any()):
            return prediction, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and rule.second_order):
            u0 = model.denoised(prediction.eps, u, t)
            added = rule.scale * rule.added(model, u0, self.images, t, self.noise, self.index)
            added = torch.where(per_sample(inside, u).bool(), added, 0.0)
        return replace(prediction, added=added), None
