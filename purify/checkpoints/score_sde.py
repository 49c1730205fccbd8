"""score_sde (Song et al. 2021): ``checkpoint_8.pth`` of CIFAR-10 VP DDPM++, and networks of its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify.checkpoints.layout import Format, Layout, renamed
from purify.diffusion.schedule import ContinuousVP
from purify.networks.ddpmpp import AttentionBlock, DDPMpp, ResidualBlock, Stage
from purify.weights.loading import check_tensors, refuse

RESIDUAL = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "skip": "Conv_2",
}
ATTENTION = {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"}
PREFIX = "all_modules."


def recognises(content: Mapping[str, Any]) -> bool:
    """A training state with its moving average, or a state dict of numbered modules."""
    if "ema" in content:
        return isinstance(content["ema"], Mapping) and "shadow_params" in content["ema"] and "model" in content
    return any(k.removeprefix("module.").startswith(PREFIX) for k in content)


def read(content: Mapping[str, Any], source: Path, head_channels: int | None = None) -> Layout:
    """The averaged (EMA) weights; the raw ones beside them only lend their names and shapes."""
    if head_channels is not None:
        raise ValueError("A score_sde network attends with one head; leave head_channels out.")
    weights = _averaged(content, source) if "ema" in content else _named(content, source)
    check_tensors(weights, source)
    network, attention = _network(weights, source)
    names, turned = {}, set()
    for index, (ours, module) in enumerate(_numbered(network)):
        parts = RESIDUAL if isinstance(module, ResidualBlock) else ATTENTION
        inner = parts if isinstance(module, (ResidualBlock, AttentionBlock)) else {"": ""}
        for key in module.state_dict():
            part, leaf = key.rsplit(".", 1) if "." in key else ("", key)
            theirs = inner[part]
            if theirs.startswith("NIN"):  # y = x W + b, so W is the transpose of a Linear's weight
                leaf = {"weight": "W", "bias": "b"}[leaf]
                turned |= {f"{ours}.{key}"} if leaf == "W" else set()
            names[f"{ours}.{key}"] = ".".join(p for p in (f"{PREFIX}{index}", theirs, leaf) if p)
    mapped = renamed(weights, names, source)
    mapped = {k: w.t().contiguous() if k in turned else w for k, w in mapped.items()}
    channels = network.conv_in.in_channels
    # Published networks attend at 16 x 16.
    shape = (channels, *2 * (16 * 2 ** attention[0],)) if len(attention) == 1 else None
    settings = {"schedule": ContinuousVP(), "prediction": "eps", "time_scale": 999.0, "time_offset": 0.0}
    return Layout(network, mapped, {**settings, "image_shape": shape})


FORMAT = Format(recognises, read)


def _named(state: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """Parameters by name; ``sigmas`` is a buffer that the network does not use."""
    check_tensors(state, source)
    if not all(isinstance(k, str) for k in state):
        raise ValueError(f"{source} holds parameters without names; it is damaged.")
    named = {k.removeprefix("module."): v for k, v in state.items()}
    return {k: v for k, v in named.items() if k != "sigmas"}


def _averaged(content: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The moving average is a bare list in the order of the parameters."""
    raw, shadow = _named(content["model"], source), content["ema"]["shadow_params"]
    if not isinstance(shadow, (list, tuple)) or not all(isinstance(w, Tensor) for w in shadow):
        raise ValueError(f"{source} holds no list of tensors as its averaged weights; it is damaged.")
    if len(raw) != len(shadow):
        raise ValueError(f"{source} has {len(raw)} parameters but {len(shadow)} averaged ones; it is damaged.")
    refuse(
        [
            f"the average of {k} has shape {tuple(a.shape)} instead of {tuple(w.shape)}"
            for (k, w), a in zip(raw.items(), shadow, strict=True)
            if a.shape != w.shape
        ],
        source,
    )
    return dict(zip(raw, shadow, strict=True))


def _network(weights: Mapping[str, Tensor], source: Path) -> tuple[DDPMpp, list[int]]:
    """The network on the meta device, and the levels that attend, read off the numbered modules."""
    try:
        numbers = sorted({int(k.split(".")[1]) for k in weights})
        residual = [i for i in numbers if f"{PREFIX}{i}.Conv_0.weight" in weights]
        attends = {i for i in numbers if f"{PREFIX}{i}.NIN_0.W" in weights}
        shapes = {i: weights[f"{PREFIX}{i}.Conv_0.weight"].shape[:2] for i in residual}
        # A block that resamples has a skip convolution although its channels stay.
        resamples = [i for i in residual if _resamples(weights, i)]
        levels = len(resamples) // 2 + 1
        blocks = (len(residual) - 2 - 2 * (levels - 1) - levels) // (2 * levels)
        width, channels = weights[f"{PREFIX}2.weight"].shape[:2]
        firsts = [residual[level * (blocks + 1)] for level in range(levels)]
        multipliers = [shapes[i][0] // width for i in firsts]
        attention = [level for level, i in enumerate(firsts) if i + 1 in attends]
        with torch.device("meta"):
            return DDPMpp(channels, width, multipliers, blocks, attention), attention
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source} is no DDPM++ of score_sde; its other networks (fir=True, Fourier features, progressive "
            "inputs) are not supported."
        ) from error


def _resamples(weights: Mapping[str, Tensor], index: int) -> bool:
    out, channels = weights[f"{PREFIX}{index}.Conv_0.weight"].shape[:2]
    return f"{PREFIX}{index}.Conv_2.weight" in weights and out == channels


def _numbered(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What score_sde numbers, in its order."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, Stage)):
            yield from _numbered(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
