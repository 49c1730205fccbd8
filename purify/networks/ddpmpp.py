"""DDPM++ of Song et al. 2021 (score_sde), the one public score network that no library carries.

A U-Net whose residual and attention blocks are averaged with their input (divided by sqrt 2), which resamples inside
residual blocks, by mean and nearest neighbour (``fir=False``), and attends once per level on the way up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu


def group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least four channels."""
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def time_features(labels: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of labels (N,) at ``dim`` / 2 frequencies from 1 down to 1e-4: (N, dim)."""
    frequencies = torch.logspace(0, -4, dim // 2, dtype=torch.float64, device=labels.device).to(labels.dtype)
    angles = labels[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def same(h: Tensor) -> Tensor:
    """No resampling."""
    return h


def halve(h: Tensor) -> Tensor:
    """Means over 2 x 2 pixels."""
    return avg_pool2d(h, 2)


def double(h: Tensor) -> Tensor:
    """Nearest neighbour."""
    return interpolate(h, scale_factor=2, mode="nearest")


RESAMPLE = {"none": same, "down": halve, "up": double}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a time shift between them; ``resample`` (none, down, up) acts on both branches."""

    def __init__(self, channels: int, out_channels: int, time_channels: int, resample: str = "none") -> None:
        super().__init__()
        self.resample = RESAMPLE[resample]
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        plain = channels == out_channels and resample == "none"
        self.skip = nn.Identity() if plain else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (N, C, H, W), time features (N, T) -> (N, C', H', W')."""
        h = self.conv1(self.resample(silu(self.norm1(x)))) + self.time(silu(time))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return (self.skip(self.resample(x)) + h) / math.sqrt(2)


class AttentionBlock(nn.Module):
    """Single-head self-attention over pixels, written out so that it can be differentiated twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query, self.key, self.value, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        weights = (self.query(pixels) @ self.key(pixels).transpose(1, 2) / math.sqrt(c)).softmax(-1)
        h = self.out(weights @ self.value(pixels)).transpose(1, 2).reshape(n, c, height, width)
        return (x + h) / math.sqrt(2)


class Stage(nn.Module):
    """A residual block and, maybe, attention after it."""

    def __init__(self, block: ResidualBlock, attention: AttentionBlock | None = None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (N, C, H, W), time features (N, T) -> (N, C', H', W')."""
        h = self.block(x, time)
        return h if self.attention is None else self.attention(h)


class DDPMpp(nn.Module):
    """DDPM++: u (N, C, H, W) in [-1, 1] space and float labels (N,), 999 t for t in [0, 1], to eps (N, C, H, W).

    Modules are registered in the order in which they are applied, which is that of score_sde's numbers.

    Args:
        channels: image channels.
        width: channels of the first level; time features have four times as many.
        multipliers: channels of each level, in units of ``width``; each level halves the image.
        blocks: residual blocks per level going down (one more going up).
        attention: levels that attend, counted from 0: after every block going down, once going up.
    """

    def __init__(
        self, channels: int, width: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        self.width = width
        features = 4 * width
        widths = [width * m for m in multipliers]
        last = len(widths) - 1
        self.time1, self.time2 = nn.Linear(width, features), nn.Linear(features, features)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for level, w in enumerate(widths):
            for _ in range(blocks):
                block = ResidualBlock(skips[-1], w, features)
                self.down.append(Stage(block, AttentionBlock(w) if level in attention else None))
                skips.append(w)
            if level < last:
                self.down.append(Stage(ResidualBlock(w, w, features, "down")))
                skips.append(w)
        previous = widths[last]
        self.mid.append(Stage(ResidualBlock(previous, previous, features), AttentionBlock(previous)))
        self.mid.append(Stage(ResidualBlock(previous, previous, features)))
        for level, w in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                block = ResidualBlock(previous + skips.pop(), w, features)
                self.up.append(Stage(block, AttentionBlock(w) if level in attention and i == blocks else None))
                previous = w
            if level > 0:
                self.up.append(Stage(ResidualBlock(w, w, features, "up")))
        self.norm_out, self.conv_out = group_norm(previous), nn.Conv2d(previous, channels, 3, padding=1)

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        """eps at u (N, C, H, W) and labels (N,)."""
        features = time_features(labels, self.width).to(self.time1.weight.dtype)  # made of exact labels, rounded once
        time = self.time2(silu(self.time1(features)))
        h = self.conv_in(u)
        skips = [h]
        for stage in self.down:
            h = stage(h, time)
            skips.append(h)
        for stage in self.mid:
            h = stage(h, time)
        for stage in self.up:
            assert isinstance(stage, Stage)
            # A block that enlarges the image has no partner on the way down.
            h = stage(h if stage.block.resample is double else torch.cat([h, skips.pop()], 1), time)
        return self.conv_out(silu(self.norm_out(h)))
