"""Layouts of public checkpoints and networks with known outputs, made with the original programs.

Small networks have seeded weights, a function of each tensor's name and shape alone, so that only inputs and outputs
are kept in tests/data/networks. ``layouts.json.gz`` holds the names and shapes of the small and the full-size files.
"""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import torch
from conftest import DATA
from torch import Tensor

FOLDER = DATA / "networks"
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


def example(name: str) -> dict[str, Tensor]:
    """Inputs x, t and outputs that the original program gave."""
    with np.load(FOLDER / f"{name}_io.npz") as f:
        return {k: torch.from_numpy(v) for k, v in f.items()}
