"""Layouts of public checkpoints and networks with known outputs, made with the original programs.

Small networks have seeded weights, a function of each tensor's name and shape alone, so that only inputs and outputs
are kept in tests/data/networks. ``layouts.json.gz`` holds the names and shapes of the small and the full-size files.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import DATA
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from purify import ScoreModel, load_score_model

FOLDER = DATA / "networks"
# What the weights of the small networks do not tell.
SMALL: dict[str, dict[str, int]] = {"score_sde": {}, "guided": {"head_channels": 16}, "improved": {"head_channels": 8}}
LAYOUTS: dict[str, dict[str, Any]] = json.loads(gzip.decompress((FOLDER / "layouts.json.gz").read_bytes()))


def small_weights(name: str) -> dict[str, Tensor]:
    """Weights of a small network under its program's own keys."""
    layout = LAYOUTS["small"][name]
    return {k: _seeded(k, shape, layout) for k, shape in layout["shapes"].items() if k != "sigmas"}


def _seeded(key: str, shape: list[int], layout: dict[str, Any]) -> Tensor:
    u = 2 * np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape) - 1
    if len(shape) == 1:
        value = 1 + 0.2 * u if key.endswith(".weight") else 0.1 * u
    else:
        fan_in = shape[0] if key.endswith(".W") else np.prod(shape[1:])
        gain = 0.05 if key == layout["first_conv"] else 1.5 if key in layout["attn_in"] else 1.0
        value = gain * np.sqrt(3 / fan_in) * u
    return torch.from_numpy(value.astype(np.float32))


def random_weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Small random tensors of these shapes."""
    g = torch.Generator().manual_seed(seed)
    return {k: 0.02 * torch.randn(shape, generator=g) for k, shape in shapes.items() if k != "sigmas"}


def full_size_file(name: str, folder: Path) -> Path:
    """The public file of that name in ``LAYOUTS``, with random weights: of diffusers its folder, ``folder``."""
    layout = LAYOUTS["full"][name]
    weights = random_weights(layout["shapes"])
    if name == "diffusers":
        for part in ("config", "scheduler_config"):
            (folder / f"{part}.json").write_text(json.dumps(layout[part]))
        old = layout["legacy_attention_key_names"]
        written(folder / "diffusion_pytorch_model.bin", {old.get(k, k): w for k, w in weights.items()})
        return folder
    if name != "score_sde":
        return written(folder / "full.pt", weights)
    named = OrderedDict({"module.sigmas": torch.zeros(1000, dtype=torch.float64)})
    named |= {f"module.{k}": w for k, w in weights.items()}
    groups = [{"lr": np.float64(2e-4), "params": list(range(len(weights)))}]
    averaged = random_weights(layout["shapes"], seed=1)
    state = {
        "optimizer": {"state": {}, "param_groups": groups},
        "model": named,
        "ema": {"decay": 0.9999, "num_updates": 1, "shadow_params": list(averaged.values())},
        "step": 1,
    }
    return written(folder / "checkpoint_8.pth", state)


def example(name: str) -> dict[str, Tensor]:
    """Inputs x, t and outputs that the original program gave."""
    with np.load(FOLDER / f"{name}_io.npz") as f:
        return {k: torch.from_numpy(v) for k, v in f.items()}


def written(path: Path, weights: Any) -> Path:
    """``path``, with the weights in it."""
    if path.suffix == ".safetensors":
        save_file({k: w.contiguous() for k, w in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def small_model(name: str, tmp_path: Path, **settings: Any) -> ScoreModel:
    """A small network through a file of its program."""
    return load_score_model(written(tmp_path / f"{name}.pt", small_weights(name)), **SMALL[name], **settings)


def small_unet() -> UNet2DModel:
    """A small U-Net of diffusers with attention, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip


def saved_pipeline(
    folder: Path, model: UNet2DModel, legacy: bool = False, flat: bool = False, **scheduler: Any
) -> Path:
    """``folder``, with the network and its scheduler as diffusers lays them out, now or formerly."""
    unet_folder = folder if flat else folder / "unet"
    model.save_pretrained(unet_folder, safe_serialization=not legacy)
    DDPMScheduler(**scheduler).save_pretrained(folder if flat else folder / "scheduler")
    if legacy:
        state = model.state_dict()
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for k, w in state.items():
            new = next((n for n in old if f".{n}." in k), None)
            renamed[k if new is None else k.replace(f".{new}.", f".{old[new]}.")] = w
        torch.save(renamed, unet_folder / "diffusion_pytorch_model.bin")
    return folder
