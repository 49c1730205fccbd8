"""Strict loading of weights: every key, shape and type must fit, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def assign(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Make ``weights`` the parameters of ``network``, which may live on the meta device; nothing is copied.

    Raises:
        ValueError: missing or unexpected keys, other shapes or types, NaN or infinity; the first few are listed.
    """
    wanted = network.state_dict()
    check_tensors(weights, source)
    refuse(differences(wanted, weights), source)
    problems = [
        f"{k} has shape {tuple(weights[k].shape)} instead of {tuple(w.shape)}"
        for k, w in wanted.items()
        if weights[k].shape != w.shape
    ]
    problems += [
        f"{k} is {weights[k].dtype} instead of {w.dtype}" for k, w in wanted.items() if weights[k].dtype != w.dtype
    ]
    refuse(problems, source)
    refuse([f"{k} holds NaN or infinity" for k, w in weights.items() if not _finite(w)], source)
    network.load_state_dict(weights, assign=True)


def differences(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """Which keys are missing and which are unexpected, in words."""
    wanted, found = dict.fromkeys(wanted), dict.fromkeys(found)
    return [f"missing {k}" for k in wanted if k not in found] + [f"unexpected {k}" for k in found if k not in wanted]


def check_tensors(weights: Any, source: str | Path) -> None:
    """Raise ValueError unless ``weights`` is a dict of tensors, none of them empty."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"{source} holds a {type(weights).__name__} in the place of its weights; it is damaged.")
    problems = [f"{k} is a {type(w).__name__}, not a tensor" for k, w in weights.items() if not isinstance(w, Tensor)]
    problems += [f"{k} is empty" for k, w in weights.items() if isinstance(w, Tensor) and w.numel() == 0]
    refuse(problems, source)


def refuse(problems: list[str], source: str | Path) -> None:
    """Raise ValueError if there are any."""
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{source} does not fit this network: {listed}.")


def _finite(tensor: Tensor) -> bool:
    # Unlike isfinite().all(), this needs no memory: a NaN or an infinity is the least or the greatest value.
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return all(bool(v.isfinite()) for v in torch.aminmax(tensor))
