"""Reading weights from files without running any code in them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
        ValueError: missing, truncated or foreign file; one that would run code; content that is not a dict.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights; save a state_dict.")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or train it again.") from error


def _read_torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be mapped
    try:
        with torch.serialization.safe_globals(NUMPY_SCALAR):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights, or is damaged, and was not loaded ({_first_line(error)}); "
            "take it only from its publisher, or save its state_dict as safetensors."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a readable torch file ({_first_line(error)}); fetch it again.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
