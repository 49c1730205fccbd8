"""Input checks shared by the public entry points: each raises one sentence that says what to do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def check_images(x: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless ``x`` is a float batch (N, C, H, W) in [0, 1], of ``shape`` (C, H, W) and ``dtype``.

    The last two are checked if given.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"Images must be a torch tensor (N, C, H, W), got {type(x).__name__}.")
    if not x.is_floating_point():
        raise ValueError(f"Images must be floating point in [0, 1], got {x.dtype}; divide 8-bit images by 255.")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"Images are {x.dtype} but the score network is {dtype}; convert one of them.")
    if x.ndim != 4:
        raise ValueError(f"Images must have shape (N, C, H, W), got {tuple(x.shape)}.")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"This score network takes images of shape {tuple(shape)} (C, H, W), got {tuple(x.shape[1:])}; "
            "use the score network of this data set, or have them resized (purifier.with_resize())."
        )
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("Images contain NaN or infinite values; check the loading or the attack.")
    if float(low) < -1e-6 or float(high) > 1 + 1e-6:
        raise ValueError(f"Images must lie in [0, 1], got values from {float(low):.4g} to {float(high):.4g}.")


def check_labels(y: Tensor, n: int, num_classes: int | None = None) -> None:
    """Raise ValueError unless ``y`` holds ``n`` integer labels in [0, num_classes)."""
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
        raise ValueError("Labels must be an integer tensor (N,) of class indices.")
    if y.shape != (n,):
        raise ValueError(f"There are {n} images but labels of shape {tuple(y.shape)}; give one label per image.")
    if n and (int(y.min()) < 0 or (num_classes is not None and int(y.max()) >= num_classes)):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"Labels must be classes 0{top}, got {int(y.min())} to {int(y.max())}.")


# The same in both modes; some models (RobustBench's composite ones) do not hand their mode on to these.
_MODELESS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Softmax, nn.Sigmoid)


def check_eval(classifier: nn.Module, before: str) -> None:
    """Raise ValueError if a part of the classifier whose answer depends on it is in train mode."""
    if any(m.training for m in classifier.modules() if type(m) not in _MODELESS):
        raise ValueError(f"The classifier is in train mode; call classifier.eval() before {before}.")


def nearest(name: object, known: Iterable[str]) -> str:
    """``(did you mean 'x'?)``, or nothing where no known name resembles it."""
    plain = {re.sub(r"[^a-z0-9]", "", k.lower()): k for k in known}
    found = get_close_matches(re.sub(r"[^a-z0-9]", "", str(name).lower()), plain, n=1, cutoff=0.6)
    return f" (did you mean {plain[found[0]]!r}?)" if found else ""


def choose(name: str, registry: Mapping[str, T], what: str) -> T:
    """``registry[name]``, or a ValueError that lists the known names, and first the one that was meant."""
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"Unknown {what} {name!r}{nearest(name, registry)}; known: {', '.join(sorted(registry))}.")
    return registry[name]


def check_unique(names: Iterable[Hashable], what: str, advice: str) -> None:
    """Raise ValueError if two ``what`` have the same name: their records could not be told apart."""
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"Two {what} are called {repeated[0]!r}; {advice}.")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, finite, and not a truth value: what configs from outside must still show."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(value: int, what: str, minimum: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{what} must be a whole number of at least {minimum}, got {value!r}.")


def check_writable(path: Path) -> None:
    """Raise ValueError unless the file ``path`` can be written; makes its folder, and leaves a file as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
