"""Flow fields: every pixel of an image looked up somewhere else, at most so many pixels away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from purify.attacks.norms import Ball

CHANNELS = 2  # of a flow: to the right, and down, in pixels
TINY = 1e-12  # keeps the root's slope finite where neighbours move alike


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Images x (N, C, H, W) seen through ``flow`` (N, 2, H, W): each pixel is looked up that many pixels away.

    Between pixels bilinear, beyond the border the border's own value; differentiable in both. Values stay within those
    of x, up to rounding.
    """
    height, width = x.shape[-2:]
    rows, columns = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (height, width))
    places = torch.stack([columns + flow[:, 0], rows[:, None] + flow[:, 1]], dim=-1)
    last = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=x.dtype, device=x.device)
    return grid_sample(x, 2 * places / last - 1, mode="bilinear", padding_mode="border", align_corners=True)


def displacement(flow: Tensor) -> Tensor:
    """How far the pixel that moves most is moved, in pixels: (N, 2, H, W) -> (N,)."""
    return flow.norm(dim=1).flatten(1).amax(1)


def roughness(flow: Tensor) -> Tensor:
    """Differences between neighbours, (N, 2, H, W) -> (N,): L_flow of Xiao et al. 2018.

    The sum over all pixels and their neighbours above, below, left and right of the distance between the two
    displacements; so each pair counts twice.
    """
    down, right = flow.diff(dim=-2), flow.diff(dim=-1)
    lengths = [(pairs.square().sum(1) + TINY).sqrt().flatten(1).sum(1) for pairs in (down, right)]
    return 2 * (lengths[0] + lengths[1])


def joined(images: Tensor, flow: Tensor) -> Tensor:
    """Images (N, C, H, W) and the flow behind them, (N, C + 2, H, W)."""
    return torch.cat([images, flow], dim=1)


def parted(z: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`joined` put together."""
    return z[:, :-CHANNELS], z[:, -CHANNELS:]


@dataclass(frozen=True)
class FlowBall(Ball):
    """Images that a flow field makes of x, no pixel of which is moved further than ``eps`` pixels.

    Points are images with their flow, see :func:`joined`: an image alone does not say how it was made.

    Args:
        smoothness: weight of :func:`roughness`, which the ascent lowers: tau of Xiao et al. 2018.
    """

    smoothness: float = 0.05

    unit: ClassVar[str] = "px"

    def enter(self, x: Tensor) -> Tensor:
        return joined(x, x.new_zeros(len(x), CHANNELS, *x.shape[-2:]))

    def leave(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        images, flow = parted(z)
        return images, {"flow": displacement(flow), "roughness": roughness(flow)}

    def size(self, z: Tensor, x: Tensor) -> Tensor:
        return displacement(parted(z)[1])

    def project(self, z: Tensor, x: Tensor, eps: float) -> Tensor:
        (image, _), (_, flow) = parted(x), parted(z)
        length = flow.norm(dim=1, keepdim=True)
        flow = flow * (eps / length.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(1)
        return joined(warp(image, flow).clamp(0, 1), flow)

    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """As in :class:`Ball`; ``gradient`` is that of images (N, C, H, W). Every pixel moves one pixel at most."""
        image, flow = parted(x)[0], parted(z)[1].detach().requires_grad_()
        with torch.enable_grad():
            climbed = (warp(image, flow) * gradient).flatten(1).sum(1) - self.smoothness * roughness(flow)
            (ascent,) = torch.autograd.grad(climbed.sum(), flow)
        length = ascent.norm(dim=1, keepdim=True)
        return joined(torch.zeros_like(image), ascent / length.clamp_min(torch.finfo(z.dtype).tiny))

    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        """A random flow: each pixel by itself."""
        image, _ = parted(x)
        return self.project(joined(image, eps * (2 * parted(uniform)[1] - 1)), x, eps)
