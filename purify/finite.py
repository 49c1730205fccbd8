"""Numbers that are none: which rows have them, and which layer of a network made the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from purify.fingerprint import unwrapped
from purify.transforms import run_plainly

HALF = (torch.float16, torch.bfloat16)


def broken(values: Tensor) -> Tensor:
    """Which rows of ``values`` (N, ...) hold NaN or infinity, (N,)."""
    return ~values.detach().flatten(1).isfinite().all(1)


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)`` that makes NaN of infinity, where clamping would make a number of it."""
    return torch.where(x.isinf(), torch.nan, x.clamp(low, high))


@dataclass(frozen=True)
class Origin:
    """Where NaN or infinity arose: in which of the networks, and in which layer of it, of what kind and type."""

    network: str
    layer: str
    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        place = f"first in layer {self.layer!r} ({self.kind})" if self.layer else f"first in {self.kind}"
        if self.dtype in HALF:
            other = "bfloat16 or float32" if self.dtype == torch.float16 else "float32"
            return f"{place}, which overflows {str(self.dtype).removeprefix('torch.')}; use {other}"
        return f"{place}; check its weights and input"


def origin(networks: Mapping[str, nn.Module | None], work: Callable[[], Any]) -> Origin | None:
    """The first layer of the ``networks``, by name, that makes NaN or infinity of finite input while ``work`` runs."""
    found: list[Origin] = []

    def see(network: str, layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
        made = [t for t in _tensors(output) if not _finite(t)]
        if made and not found and all(map(_finite, _tensors(inputs))):
            found.append(Origin(network, layer, type(module).__name__, made[0].dtype))

    with ExitStack() as hooks, torch.no_grad(), run_plainly():
        for name, network in networks.items():
            for layer, module in () if network is None else unwrapped(network).named_modules():
                hooks.enter_context(module.register_forward_hook(partial(see, name, layer)))
        work()
    return found[0] if found else None


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.detach().isfinite().all())


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns."""
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple | list) else ()
    return [t for part in parts for t in _tensors(part)]
