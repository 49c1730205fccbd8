"""Balls in perceptual distances: what looks like x to LPIPS, or to SSIM."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from purify.attacks.norms import Ball, unit
from purify.diffusion.score import per_sample

HALVINGS = 12  # of the way back to x: the point lies within 1 / 4096 of the way of the farthest that is found
FIRST = 0.02  # root of the mean square of the first step from x itself; later ones follow what the ball allows
LEAST = 32  # pixels of a side that AlexNet needs; smaller images are enlarged


class PerceptualBall(Ball):
    """Images z with ``size(z, x) <= eps``, where the size is no norm: D(z, x), with D(x, x) = 0.

    Steps have the length, in L2, that the present perturbation has, because no other length is known: ``eps`` is no
    length. A point outside is brought back along the straight way to x, as far as bisection finds that it must; that
    it then lies in the ball was asked of D itself.
    """

    @torch.no_grad()
    def project(self, z: Tensor, x: Tensor, eps: float) -> Tensor:
        z = z.clamp(0, 1)
        outside = self.size(z, x) > eps
        low, high = torch.zeros(len(z), device=z.device), torch.ones(len(z), device=z.device)
        best = torch.where(outside[:, None, None, None], x, z)
        for _ in range(HALVINGS if bool(outside.any()) else 0):
            middle = (low + high) / 2
            tried = torch.lerp(x, z, per_sample(middle, z)).clamp(0, 1)
            inside = self.size(tried, x) <= eps
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            best = torch.where((outside & inside)[:, None, None, None], tried, best)
        return best

    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """As in :class:`Ball`, at the L2 length of z - x; from x itself ``FIRST`` for each value."""
        length = (z - x).flatten(1).norm(dim=1)
        length = torch.where(length > 0, length, FIRST * math.sqrt(x[0].numel()))
        return unit(gradient) * per_sample(length, z)

    def step(self, eps: float) -> float:
        return 1.0

    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        return self.project(x + 0.5 * (2 * uniform - 1), x, eps)

    def size(self, z: Tensor, x: Tensor) -> Tensor:
        found = self.distance(z.float(), x.float()).to(x.dtype)
        return torch.where((z == x).flatten(1).all(1), torch.zeros_like(found), found)  # to the bit

    @abstractmethod
    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        """D of float32 images (N, C, H, W) in [0, 1]: (N,)."""


class SSIMBall(PerceptualBall):
    """1 - SSIM (Wang et al. 2004; torchmetrics: Gaussian window, sigma 1.5), which needs no weights."""

    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        found = ssim(z, x, data_range=1.0, reduction="none")
        assert isinstance(found, Tensor)
        return 1 - found.reshape(-1)

    def check(self, x: Tensor) -> None:
        if min(x.shape[-2:]) < 6:
            raise ValueError(f"SSIM's window needs images of at least 6 pixels a side, got {tuple(x.shape)}.")


class LPIPSBall(PerceptualBall):
    """LPIPS of AlexNet (Zhang et al. 2018; torchmetrics): needs that network's ImageNet weights.

    Grey images are shown in three channels, and those of less than 32 pixels a side enlarged to it.
    """

    def check(self, x: Tensor) -> None:
        if not weights_file().is_file():
            raise ValueError(
                f"LPIPS needs AlexNet's weights, and {weights_file().name} is not in torch.hub.get_dir()/checkpoints; "
                "make it where there is a network, by torchvision.models.alexnet(weights='DEFAULT'), and copy it, or "
                "take the threat model ssim, which needs no weights."
            )

    def distance(self, z: Tensor, x: Tensor) -> Tensor:
        network = lpips_network().to(x.device)
        return network(_shown(z), _shown(x), normalize=True).reshape(-1)


def weights_file() -> Path:
    """Where torchvision keeps AlexNet's weights."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name)


@cache
def lpips_network() -> Any:
    """LPIPS of AlexNet, (N, 3, H, W) twice -> (N, 1, 1, 1), with its weights frozen."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("alex").net.eval().requires_grad_(False)


def _shown(x: Tensor) -> Tensor:
    """Images as AlexNet takes them."""
    height, width = x.shape[-2:]
    if min(height, width) < LEAST:
        size = [max(LEAST, height), max(LEAST, width)]
        x = interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
