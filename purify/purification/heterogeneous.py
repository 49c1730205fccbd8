"""Heterogeneous noise (Pei et al. 2025): strong noise where a network looks, weak noise elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from purify.checks import choose, is_number
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import Look, unguided
from purify.diffusion.score import ScoreModel, per_sample
from purify.purification.conditioning import Conditioning
from purify.purification.guidance import GUIDANCES
from purify.purification.process import Enter

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Tanh)


@dataclass(frozen=True)
class HeterogeneousNoise(Conditioning):
    """Outside of the mask, steps that end above ``t_weak`` start from the input diffused anew to their time.

    So pixels in the mask are diffused to t* and all others to about ``t_weak``. The mask is 1 where the network's
    attention, the greatest over layers of sum_c |activation_c|^2 scaled to [0, 1] in each image, reaches ``threshold``.
    A jump of the mask has no gradient; elsewhere the gradient is exact. Arguments as for
    :class:`~purify.purification.conditioning.Conditioning` (``scale`` 1 or 0), and

        auxiliary: the network whose attention counts, from images in [0, 1]; published: the defended classifier.
        layers: names of its modules (``named_modules``) whose outputs (N, C', H', W') are looked at; default: all
            activations that are modules.
        threshold: in [0, 1]; 0 masks nothing, so that all pixels get the strong noise.
        t_weak: in [0, 1).
        resample: by how much time a step is diffused forward again before it is taken, at least 0, so that the two
            parts of the image meet; the time stays at most 1.
    """

    scale: float = 1.0
    auxiliary: nn.Module | None = None
    layers: Sequence[str] | None = None
    threshold: float = 0.9
    t_weak: float = 0.1
    resample: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in (0, 1):
            raise ValueError(f"Heterogeneous noise has scale 1, or 0 for none, got {self.scale}.")
        if not isinstance(self.auxiliary, nn.Module):
            raise ValueError(
                "Heterogeneous noise needs the network whose attention counts: pass auxiliary=, a module from images "
                "in [0, 1]."
            )
        for name, upper in (("threshold", 1.0), ("t_weak", 1.0), ("resample", 1.0)):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= upper):
                raise ValueError(f"{name} of heterogeneous noise must lie in [0, 1], got {value!r}.")
        modules = dict(self.auxiliary.named_modules())
        if isinstance(self.layers, list):  # as JSON has it
            object.__setattr__(self, "layers", tuple(self.layers))
        for name in self.layers or ():
            choose(name, modules, "layer of the auxiliary network")

    @property
    def network(self) -> nn.Module | None:
        return self.auxiliary

    @property
    def calls(self) -> tuple[int, int]:
        return 0, int(self.scale != 0)

    def check(self, model: ScoreModel) -> None:
        if model.image_shape is None or self.scale == 0:
            return
        parameter = next(model.network.parameters(), torch.empty(0))
        images = torch.zeros(1, *model.image_shape, dtype=parameter.dtype, device=parameter.device)
        try:
            self.attention(images)
        except RuntimeError as error:  # torch's word for shapes, types and devices that do not fit
            raise ValueError(
                f"The auxiliary network cannot look at images of shape {model.image_shape} and type "
                f"{images.dtype}: {error}"
            ) from error

    def attention(self, x: Tensor) -> Tensor:
        """The attention in [0, 1], (N, 1, H, W), on images ``x`` (N, C, H, W) in [0, 1]; without a gradient."""
        network, maps = self.auxiliary, []
        assert network is not None

        def see(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found = output.detach().square().sum(1, keepdim=True)
                maps.append(interpolate(found, size=x.shape[-2:], mode="bilinear", align_corners=False))

        modules = dict(network.named_modules())
        named = self.layers or [name for name, module in modules.items() if isinstance(module, ACTIVATIONS)]
        handles = [modules[name].register_forward_hook(see) for name in named]
        try:
            with torch.no_grad():
                network(x)
        finally:
            for handle in handles:
                handle.remove()
        if not maps:
            raise ValueError(
                "None of these layers of the auxiliary network has an output of (N, C, H, W); name others by layers=."
            )
        return torch.stack([_scaled(found) for found in maps]).amax(0)

    def bind(self, images: Tensor) -> Tensor:
        """The images with their mask as one channel more."""
        if self.scale == 0:
            return images
        mask = (self.attention((images.detach() + 1) / 2) >= self.threshold).to(images.dtype)
        return torch.cat([images, mask], 1)

    def look(self, bound: Tensor, noise: Noise, index: int | Tensor) -> Look:
        return unguided

    def enter(self, model: ScoreModel, s: Tensor, bound: Tensor, noise: Noise, index: int | Tensor) -> Enter | None:
        if self.scale == 0:
            return None
        own = noise.stream("guidance")

        def compose(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            images, mask = bound[:, :-1], bound[:, -1:]
            weak = self.inside(t) & (s >= self.t_weak - 1e-9)
            first, second = own.normal(index, (2, *u.shape[1:]), u.dtype).unbind(1)
            schedule = model.schedule
            diffused = per_sample(schedule.alpha(t), u) * images + per_sample(schedule.sigma(t), u) * first
            later = (t + self.resample).clamp_max(1.0)
            ratio = schedule.log_alpha_bar(later) - schedule.log_alpha_bar(t)
            kept, added = per_sample((0.5 * ratio).exp(), u), per_sample((-torch.expm1(ratio)).sqrt(), u)
            composed = kept * (mask * u + (1 - mask) * diffused) + added * second
            return torch.where(per_sample(weak, u).bool(), composed, u), torch.where(weak, later, t)

        return compose


def _scaled(attention: Tensor) -> Tensor:
    """Each map scaled to [0, 1]; a flat one to 1, so that its pixels all count."""
    low, high = attention.amin((1, 2, 3), keepdim=True), attention.amax((1, 2, 3), keepdim=True)
    return torch.where(high > low, (attention - low) / torch.where(high > low, high - low, 1.0), 1.0)


GUIDANCES["heterogeneous"] = HeterogeneousNoise
