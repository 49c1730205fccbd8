"""guided-diffusion, improved-diffusion and consistency_models of OpenAI on diffusers' UNet2DModel.

Dhariwal & Nichol 2021, Nichol & Dhariwal 2021, Song et al. 2023. consistency_models writes guided-diffusion's keys, but
its attention is a convolution in two dimensions whose rows are all queries, all keys and all values. Its EDM teachers
have the same layout and cannot be told apart: read one by wrapping it in purify.EDMDenoiser yourself.

Both programs write the same unconditional U-Net as a bare state dict. What the weights do not tell is taken from the
program: guided-diffusion resamples in residual blocks, attends with heads of 64 channels and was trained on 1000 linear
steps; improved-diffusion resamples by convolutions, attends with four heads and was trained on 4000 cosine steps, whose
labels it scales to [0, 1000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from purify.checkpoints.layout import Format, Layout, consistency, renamed
from purify.checkpoints.unet import unet
from purify.checks import check_count
from purify.diffusion.schedule import DiscreteVP
from purify.weights.loading import check_tensors

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "class_embedding": "label_emb",  # of class-conditional ones
}
TABLE = "label_emb.weight"
# Image sizes of both programs' channel multipliers.
SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}


@dataclass(frozen=True)
class Shape:
    """What the keys and shapes of a U-Net tell.

    Attributes:
        channels, out_channels: of the images and of the output.
        widths: channels of each level.
        blocks: residual blocks per level going down.
        attends: whether each level attends.
        residual_resampling: resampling by residual blocks instead of convolutions.
        scale_shift: the time features scale and shift instead of being added.
    """

    channels: int
    out_channels: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    residual_resampling: bool
    scale_shift: bool


def recognises(content: Mapping[str, Any]) -> bool:
    """A state dict of input and output blocks."""
    return "input_blocks.0.0.weight" in content and "out.2.weight" in content


def read(content: Mapping[str, Any], source: Path, head_channels: int | None = None) -> Layout:
    """The U-Net; ``head_channels`` where it is not the published one."""
    check_tensors(content, source)
    shape = _shape(content, source)
    heads = _published_heads(shape, source) if head_channels is None else head_channels
    check_count(heads, "head_channels")
    if any(w % heads for w in _attending(shape)):
        raise ValueError(f"head_channels = {heads} does not divide the widths {_attending(shape)} that attend.")
    network = _network(shape, heads, len(content[TABLE]) if TABLE in content else None)
    names = _names(shape, network)
    weights = renamed(content, names, source)
    flat = any(key.endswith("qkv.weight") and w.ndim == 4 for key, w in content.items())
    weights = {ours: _converted(ours, w, None if flat else heads) for ours, w in weights.items()}
    if flat:
        return consistency(network, weights, {"image_shape": _image_shape(shape)})
    return Layout(network, weights, _settings(shape))


FORMAT = Format(recognises, read)


def _shape(weights: Mapping[str, Tensor], source: Path) -> Shape:
    """Every level but the last ends, on the way up, in one module that only resamples."""
    try:
        return _shape_of_weights(weights)
    except (LookupError, ArithmeticError) as error:
        raise ValueError(
            f"{source} looks like a U-Net of guided-diffusion or improved-diffusion, but its weights describe none "
            f"({type(error).__name__}: {error})."
        ) from error


def _shape_of_weights(weights: Mapping[str, Tensor]) -> Shape:
    ups = [f"output_blocks.{i}" for i in range(_count(weights, "output_blocks"))]
    convolutions = sum(any(f"{up}.{j}.conv.weight" in weights for j in (1, 2)) for up in ups)
    residuals = sum(any(f"{up}.{j}.in_layers.0.weight" in weights for j in (1, 2)) for up in ups)
    levels = convolutions + residuals + 1
    blocks = len(ups) // levels - 1
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = tuple(weights[f"{block}.0.out_layers.3.weight"].shape[0] for block in first)
    return Shape(
        weights["input_blocks.0.0.weight"].shape[1],
        weights["out.2.weight"].shape[0],
        widths,
        blocks,
        tuple(f"{block}.1.qkv.weight" in weights for block in first),
        residuals > 0,
        weights[f"{first[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
    )


def _count(weights: Mapping[str, Any], group: str) -> int:
    return len({k.split(".")[1] for k in weights if k.startswith(f"{group}.")})


def _published_heads(shape: Shape, source: Path) -> int:
    """Channels per head: 64 in guided-diffusion; a quarter of the width in improved-diffusion."""
    if shape.residual_resampling:
        return 64
    found = _attending(shape)
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(
            f"{source} attends with four heads at widths {listed}; diffusers' UNet2DModel has one head width for all. "
            "Wrap the network in purify.ScoreModel yourself."
        )
    return found[0] // 4


def _attending(shape: Shape) -> list[int]:
    """Widths at which the network attends; the middle always does."""
    return sorted({w for w, a in zip(shape.widths, shape.attends, strict=True) if a} | {shape.widths[-1]})


def _network(shape: Shape, head_channels: int, classes: int | None) -> nn.Module:
    plain, resample = ("Resnet{}sampleBlock2D", "resnet") if shape.residual_resampling else ("{}Block2D", "conv")
    return unet(
        in_channels=shape.channels,
        out_channels=shape.out_channels,
        layers_per_block=shape.blocks,
        block_out_channels=shape.widths,
        down_block_types=tuple("AttnDownBlock2D" if a else plain.format("Down") for a in shape.attends),
        up_block_types=tuple("AttnUpBlock2D" if a else plain.format("Up") for a in reversed(shape.attends)),
        downsample_type=resample,
        upsample_type=resample,
        downsample_padding=1,
        attention_head_dim=head_channels,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if shape.scale_shift else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=classes,
    )


def _blocks(shape: Shape) -> dict[str, str]:
    """Residual and attention blocks: ours to theirs."""
    names = {f"mid_block.{b}": f"middle_block.{i}" for i, b in enumerate(["resnets.0", "attentions.0", "resnets.1"])}
    last = len(shape.widths) - 1
    index = 1
    for level in range(last + 1):
        for j in range(shape.blocks):
            names[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{index}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{index}.1"
            index += 1
        names[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{index}.0"
        index += 1
    index = 0
    for up, attends in enumerate(reversed(shape.attends)):
        for j in range(shape.blocks + 1):
            names[f"up_blocks.{up}.resnets.{j}"] = f"output_blocks.{index}.0"
            names[f"up_blocks.{up}.attentions.{j}"] = f"output_blocks.{index}.1"
            index += 1
        names[f"up_blocks.{up}.upsamplers.0"] = f"output_blocks.{index - 1}.{2 if attends else 1}"
    return names


def _names(shape: Shape, network: nn.Module) -> dict[str, str]:
    """Every parameter of the network: ours to theirs."""
    modules = dict(ENDS)
    for ours, theirs in _blocks(shape).items():
        modules |= {f"{ours}.{o}": f"{theirs}.{t}" for o, t in {**RESIDUAL, **ATTENTION}.items()}
        # A resampling convolution is called op going down and conv going up.
        modules[f"{ours}.conv"] = f"{theirs}.{'op' if 'down' in ours.rsplit('.', 2)[1] else 'conv'}"
    return {key: f"{modules[module]}.{leaf}" for key in network.state_dict() for module, leaf in [key.rsplit(".", 1)]}


def _converted(ours: str, weight: Tensor, head_channels: int | None) -> Tensor:
    """Attention weights as diffusers has them: each head's rows are its query, its key and its value, in turn.

    Without ``head_channels`` all queries come first, then all keys and all values.
    """
    if ".attentions." not in ours or ".group_norm." in ours:
        return weight
    weight = weight.flatten(1) if weight.ndim > 2 else weight  # a convolution of width 1
    parts = [i for i, part in enumerate((".to_q.", ".to_k.", ".to_v.")) if part in ours]
    if not parts:
        return weight
    if head_channels is None:
        return weight.chunk(3)[parts[0]].contiguous()
    heads = weight.unflatten(0, (-1, 3, head_channels))
    return heads[:, parts[0]].flatten(0, 1).contiguous()


def _image_shape(shape: Shape) -> tuple[int, int, int] | None:
    size = SIZES.get(tuple(w // shape.widths[0] for w in shape.widths))
    return None if size is None else (shape.channels, size, size)


def _settings(shape: Shape) -> dict[str, Any]:
    learned = shape.out_channels == 2 * shape.channels
    settings: dict[str, Any] = {
        "prediction": "learned_variance" if learned else "eps",
        "image_shape": _image_shape(shape),
    }
    if shape.residual_resampling:
        return {**settings, "schedule": DiscreteVP.linear(1000), "time_scale": 1000.0, "time_offset": 1.0}
    # Label of step k of 4000: (k - 1) * 1000 / 4000.
    return {**settings, "schedule": DiscreteVP.cosine(4000), "time_scale": 1000.0, "time_offset": 0.25}
