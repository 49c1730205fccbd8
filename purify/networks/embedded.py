"""Networks of the embedded default, built from plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from purify.checks import choose
from purify.networks.timesteps import with_double_time


class PatchUNet(nn.Module):
    """diffusers' ``UNet2DModel`` on pixels folded into channels, ``patch`` x ``patch`` at a time.

    Folding makes the network about ``patch``^2 times cheaper, which every attack on a small image pays back.
    ``options`` are more of diffusers'.
    """

    def __init__(
        self, channels: int, size: int, patch: int, widths: list[int], layers: int = 1, **options: Any
    ) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.patch = patch
        unet = UNet2DModel(
            sample_size=size // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=8,
            add_attention=False,
            **options,
        )
        self.unet = with_double_time(unet)

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        """u (N, C, H, W), float labels (N,) -> (N, C, H, W)."""
        return pixel_shuffle(plain_unet(self.unet, pixel_unshuffle(u, self.patch), labels), self.patch)


def plain_unet(unet: Any, x: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
    """What diffusers' ``UNet2DModel`` of plain blocks, without attention, computes of x (N, C, H, W), labels (N,) and
    classes (N,).

    The same modules in the same order, and the same bits. Left out is what costs these small networks a fifth of a call
    of 8 images, and 5 % of one of 64: looking for the weights' type in every module, dividing by 1, and the activation
    of the time features once more in every block.
    """
    dtype = unet.conv_in.weight.dtype
    embedding = unet.time_embedding(unet.time_proj(labels).to(dtype))
    if classes is not None:
        embedding = embedding + unet.class_embedding(classes).to(dtype)
    act = silu(embedding)
    x = unet.conv_in(x)
    kept = [x]
    for down in unet.down_blocks:
        for block in down.resnets:
            x = _residual(block, x, act)
            kept.append(x)
        for halve in down.downsamplers or ():
            x = halve(x)
            kept.append(x)
    for block in unet.mid_block.resnets:
        x = _residual(block, x, act)
    for up in unet.up_blocks:
        for block in up.resnets:
            x = _residual(block, torch.cat([x, kept.pop()], 1), act)
        for double in up.upsamplers or ():
            x = double(x)
    return unet.conv_out(silu(unet.conv_norm_out(x)))


def _residual(block: Any, x: Tensor, act: Tensor) -> Tensor:
    h = block.conv1(silu(block.norm1(x)))
    h = h + block.time_emb_proj(act)[:, :, None, None]
    h = block.conv2(silu(block.norm2(h)))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h


class ClassPatchUNet(PatchUNet):
    """The same, told a class: one of ``num_classes - 1``, or the last entry of its table for none."""

    def __init__(self, *args: Any, num_classes: int, **arguments: Any) -> None:
        super().__init__(*args, **arguments, num_class_embeds=num_classes)
        self.num_classes = num_classes

    @property
    def class_embedding(self) -> nn.Module:
        """The table, where :class:`~purify.diffusion.classes.Predicted` looks for it."""
        return self.unet.class_embedding

    def forward(self, u: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
        """As :class:`PatchUNet`, with classes int64 (N,), without which it raises ValueError."""
        output = self.unet(pixel_unshuffle(u, self.patch), labels, classes).sample
        return pixel_shuffle(output, self.patch)


class SmallCNN(nn.Module):
    """Two 3x3 convolutions per width, halving the image between widths; images in [0, 1] to logits."""

    def __init__(self, channels: int, widths: list[int], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = channels
        for i, width in enumerate(widths):
            for inner in range(2):
                stride = 2 if i > 0 and inner == 0 else 1
                layers += [nn.Conv2d(previous, width, 3, stride, 1), nn.GroupNorm(8, width), nn.ReLU()]
                previous = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(previous, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, num_classes)."""
        return self.head(self.features(2 * x - 1).mean((-2, -1)))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "patch-unet": PatchUNet,
    "class-patch-unet": ClassPatchUNet,
    "small-cnn": SmallCNN,
}


def build_network(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The network that ``config`` = {"kind": name, **arguments} describes, initialised under ``seed``."""
    arguments = dict(config)
    kind = choose(arguments.pop("kind", ""), ARCHITECTURES, "architecture")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**arguments)
