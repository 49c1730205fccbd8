"""Corrections that pull the clean estimate towards the image that came in: DiffAP's mediator and MimicDiffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from purify.checks import check_count, is_number
from purify.diffusion.noise import Noise
from purify.diffusion.score import ScoreModel, per_sample
from purify.purification.conditioning import Correction
from purify.purification.guidance import GUIDANCES


@dataclass(frozen=True)
class MediatorPull(Correction):
    """DiffAP (Zhang et al. 2024): u0_hat - scale alpha(t) grad D, D the mean squared difference of u0_hat to the input.

    Arguments as for :class:`~purify.purification.conditioning.Conditioning`. Where scale alpha(t) 2 / d exceeds 1 for
    images of d values, the estimate ends on the other side of the input, above 2 farther away from it.
    """

    def added(
        self, model: ScoreModel, u0: Tensor, images: Tensor, t: Tensor, noise: Noise, index: int | Tensor
    ) -> Tensor:
        return per_sample(model.schedule.alpha(t) * (-2 / u0[0].numel()), u0) * (u0 - images)


@dataclass(frozen=True)
class ManhattanPull(Correction):
    """MimicDiffusion (Song et al. 2024): u0_hat - scale / alpha(t) (grad D_long + grad D_short).

    D_long is the L1 distance of u0_hat to the input, the sum over channels and the mean over pixels; D_short is that of
    their means over blocks of ``factor`` x ``factor`` pixels. Arguments as for
    :class:`~purify.purification.conditioning.Conditioning`, and

        factor: at least 1, and a divisor of height and width; with 1 both distances are the same, as in the released
            program, whose upsampling by nearest neighbour repeats pixels.
        softness: the gradients are signs, whose derivative is 0 wherever they have one: the exact gradient is blind to
            the jumps. With w above 0 attacks see sign(x) as x / sqrt(x^2 + w^2) in the backward pass, which is
            inexact; the forward pass stays. In units of [-1, 1] images.
    """

    factor: int = 4
    softness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.factor, "factor of the short-range distance")
        if not (is_number(self.softness) and self.softness >= 0):
            raise ValueError(f"softness must be a number of at least 0, got {self.softness!r}.")

    @property
    def exact(self) -> bool:
        return self.scale == 0 or (self.second_order and self.softness == 0)

    def check(self, model: ScoreModel) -> None:
        if model.image_shape is not None:
            self._check_size(model.image_shape[1:])

    def _check_size(self, size: tuple[int, ...]) -> None:
        if any(n % self.factor for n in size):
            raise ValueError(
                f"The short-range distance averages blocks of {self.factor} x {self.factor} pixels, which do not fill "
                f"images of {size[0]} x {size[1]}; choose a factor that divides both."
            )

    def added(
        self, model: ScoreModel, u0: Tensor, images: Tensor, t: Tensor, noise: Noise, index: int | Tensor
    ) -> Tensor:
        self._check_size(tuple(u0.shape[-2:]))
        apart = u0 - images
        pull = self.sign(apart)
        short = self.sign(avg_pool2d(apart, self.factor))
        pull = pull + interpolate(short, scale_factor=self.factor, mode="nearest")
        pixels = u0.shape[-2] * u0.shape[-1]
        return per_sample(-1 / (pixels * model.schedule.alpha(t)), u0) * pull

    def sign(self, x: Tensor) -> Tensor:
        """Signs, of the slope that ``softness`` says."""
        return x.sign() if self.softness == 0 else SoftSign.apply(x, self.softness)


class SoftSign(torch.autograd.Function):
    """sign(x) forward; the slope of x / sqrt(x^2 + w^2) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.w = w
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.w**2 / (x.square() + ctx.w**2) ** 1.5, None


GUIDANCES["mediator"] = MediatorPull
GUIDANCES["manhattan"] = ManhattanPull
