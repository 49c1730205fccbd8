"""diffusers' ``UNet2DModel``, on the meta device and twice differentiable."""

from __future__ import annotations

from typing import Any

import torch

from purify.networks.timesteps import with_double_time


def unet(**config: Any) -> Any:
    """The network on the meta device; float labels (N,), returns an object with ``.sample``.

    Its attention is written out: fused kernels have no second derivative, which guidance needs under attack. Its time
    features are in float64 where labels are.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.device("meta"):
        network = UNet2DModel.from_config(config)
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return with_double_time(network)
