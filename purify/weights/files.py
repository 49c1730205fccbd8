"""Reading weights from files without running any code in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

# A score_sde file holds its learning rate as a numpy.float64. Files written with numpy 1 and 2 name the same
# function differently. Nothing else is allowed beyond what torch allows.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALAR: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]


def read(path: Path) -> dict[str, Any]:
    """The content of a safetensors file, or of a torch file by ``weights_only=True``; tensors stay mapped to the file.

    Raises:
        ValueError: missing, truncated, compressed or foreign file; one that would run code; content that is not a dict
            with names for keys; tensors that are not dense or not on the CPU.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights; save a state_dict.")
    foreign = next((key for key in content if not isinstance(key, str)), None)
    if foreign is not None:
        raise ValueError(f"{path} holds a dict with the key {foreign!r}, not weights by name; save a state_dict.")
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}".replace("torch.", "")
            raise ValueError(f"{path} holds a tensor that is {kind}; save dense tensors that are on the CPU.")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(value)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        raise ValueError(f"{path} is not a readable safetensors file ({_reason(error)}); fetch it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
        stored = not mapped or _stored(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable torch file ({_reason(error)}); fetch it again.") from error
    if not stored:  # mapped, the compressed bytes would pass for weights
        raise ValueError(f"{path} is a compressed archive, which torch does not write; fetch the original file again.")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALAR):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged file makes the reader stumble over
        name = _refused(error)
        if name is None:
            raise ValueError(f"{path} is not a readable torch file ({_reason(error)}); fetch it again.") from error
        raise ValueError(
            f"{path} holds more than weights (it asks for {name}) and was not loaded; take it only from its publisher, "
            "or save its state_dict as safetensors."
        ) from error


def _stored(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _refused(error: Exception) -> str | None:
    """The function or class that torch's unpickler would not call."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error))
    return found and (found[1] or found[2])


def _reason(error: Exception) -> str:
    """What went wrong, in one line; without torch's advice to read the file in an unsafe way."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "it is damaged or foreign" if "weights_only" in line else line
