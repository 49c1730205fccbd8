"""Time features of diffusers' networks in double precision.

diffusers computes the sines and cosines of the labels in float32 whatever the network's type is. A float64 network then
is a staircase in time, with steps of 1e-7 of the label, and finite differences through t* see the stairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

PERIOD = 10_000  # of the slowest feature, as everywhere in diffusers


class DoubleTimesteps(nn.Module):
    """diffusers' ``Timesteps``, where float64 labels get float64 features; others get diffusers' own, bit for bit.

    The frequencies are those that the network was trained with, rounded to float32: only what is computed from them is
    more precise, so that the float64 run is the float32 run up to rounding. Without weights, like the original.
    """

    def __init__(self, timesteps: Any) -> None:
        super().__init__()
        self.single = timesteps

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (N,) to features (N, num_channels), of float64 or float32."""
        if labels.dtype != torch.float64:
            return self.single(labels)
        half = self.single.num_channels // 2
        exponent = -math.log(PERIOD) * torch.arange(half, dtype=torch.float32, device=labels.device)
        frequencies = (exponent / (half - self.single.downscale_freq_shift)).exp().double()
        phases = self.single.scale * labels[:, None] * frequencies
        parts = [phases.sin(), phases.cos()]
        features = torch.cat(parts[::-1] if self.single.flip_sin_to_cos else parts, 1)
        return nn.functional.pad(features, (0, self.single.num_channels % 2))


def with_double_time(network: Any) -> Any:
    """The same ``UNet2DModel``, with :class:`DoubleTimesteps` in place of diffusers' time features where it has these;
    Fourier features of noise levels are of the network's own type already."""
    from diffusers.models.embeddings import Timesteps

    if isinstance(network.time_proj, Timesteps):
        network.time_proj = DoubleTimesteps(network.time_proj)
    return network
