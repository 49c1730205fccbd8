"""What tells two networks apart: a hash of their weights; of those without any, one of what they are made of."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purify.transforms import COMPILED

DEEP = 4  # how far objects inside a module without weights are looked into


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(module.module)
    inner = getattr(module, COMPILED, None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def is_compiled(module: nn.Module) -> bool:
    """Whether a network, perhaps inside DataParallel, is one of ``torch.compile``."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    return isinstance(getattr(module, COMPILED, None), nn.Module)


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's state; compiled or parallel, it is the same.

    Without any state it is over the classes of its parts, their source, and the plain values and tensors in them.

    Raises:
        ValueError: its weights are on the meta device, where there are none.
    """
    digest = hashlib.sha256()
    state = {name.replace(f"{COMPILED}.", ""): value for name, value in unwrapped(module).state_dict().items()}
    for name, value in sorted(state.items()):
        if value.is_meta:
            raise ValueError(f"The weight {name} is on the meta device and holds no values; load the network first.")
        value = getattr(value, "full_tensor", lambda v=value: v)()  # of one that is sharded over processes
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if not state:
        for part in _made_of(unwrapped(module), DEEP):
            digest.update(part)
    return digest.hexdigest()


def _made_of(value: Any, deep: int) -> Iterator[bytes]:
    """Bytes that are the same in another process: classes, source, numbers, texts, arrays, files; never addresses."""
    if isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        yield f"{array.dtype} {array.shape} ".encode() + array.tobytes()
    elif isinstance(value, Path) and value.is_file():
        yield hashlib.sha256(value.read_bytes()).digest()
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | torch.dtype):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _made_of(value[key], deep)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _made_of(item, deep)
    else:
        kind = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
        yield f"{getattr(kind, '__qualname__', '')} {_source(kind)}".encode()
        if kind is not value and deep > 0:
            inside = {k: v for k, v in getattr(value, "__dict__", {}).items() if k != "training" and "hook" not in k}
            yield from _made_of(inside, deep - 1)


def _source(kind: Any) -> str:
    """Source of a class or function; where there is none, nothing."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
