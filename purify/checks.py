"""Input checks shared by the public entry points: each raises one sentence that says what to do."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from purify.transforms import readable

T = TypeVar("T")


def short(value: object, most: int = 60) -> str:
    """``repr``, of what is long only its beginning; of tensors, arrays and modules what they are."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def missing(model: object, protocol: type) -> list[str]:
    """Members of the protocol that the model lacks.

    Not by ``isinstance``: from Python 3.12 on that sees neither submodules nor what ``torch.compile`` passes on.
    """
    names = dict.fromkeys(name for kind in protocol.__mro__ for name in vars(kind) if not name.startswith("_"))
    return [name for name in names if not hasattr(model, name)]


def has(model: object, protocol: type[T]) -> TypeGuard[T]:
    """Whether the model has all members of the protocol."""
    return not missing(model, protocol)


def check_images(x: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless ``x`` is a float batch (N, C, H, W) in [0, 1], of ``shape`` (C, H, W) and ``dtype``.

    The last two are checked if given.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"Images must be a torch tensor (N, C, H, W), got {type(x).__name__}.")
    if x.is_meta:
        raise ValueError("Images are on the meta device and hold no values; bring them to the model's device.")
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
    if not readable(x):
        return
    low, high = torch.aminmax(x.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("Images contain NaN or infinite values; check the loading or the attack.")
    if float(low) < -1e-6 or float(high) > 1 + 1e-6:
        raise ValueError(f"Images must lie in [0, 1], got values from {float(low):.4g} to {float(high):.4g}.")


def check_labels(y: Tensor, n: int, num_classes: int | None = None) -> None:
    """Raise ValueError unless ``y`` holds ``n`` integer labels in [0, num_classes)."""
    if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        advice = "use torch.as_tensor(labels).long()"
        raise ValueError(f"Labels must be an integer tensor (N,) of class indices, got {kind}; {advice}.")
    if y.shape != (n,):
        raise ValueError(f"There are {n} images but labels of shape {tuple(y.shape)}; give one label per image.")
    if n and (int(y.min()) < 0 or (num_classes is not None and int(y.max()) >= num_classes)):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"Labels must be classes 0{top}, got {int(y.min())} to {int(y.max())}.")


# The same in both modes; some models (RobustBench's composite ones) do not hand their mode on to these.
_MODELESS = (nn.Module, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Softmax, nn.Sigmoid)

# A graph's own mode changes nothing, and that of an exported program cannot be set.
_GRAPHS = ("torch.export", "torch.fx")


def check_eval(classifier: nn.Module, before: str) -> None:
    """Raise ValueError if a part of the classifier whose answer depends on it is in train mode."""
    parts = (m for m in classifier.modules() if type(m) not in _MODELESS)
    if any(m.training for m in parts if not type(m).__module__.startswith(_GRAPHS)):
        raise ValueError(f"The classifier is in train mode; call classifier.eval() before {before}.")


def check_weights(network: nn.Module, what: str) -> None:
    """Raise ValueError if a parameter of ``network`` holds NaN (it would answer NaN, or worse, a class) or nothing."""
    for name, p in network.named_parameters():
        if p.is_meta:
            raise ValueError(f"{what} is on the meta device, where weights hold no values; load them first.")
        readable = p.is_floating_point() and p.itemsize > 1 and p.numel() > 0
        if readable and bool(torch.aminmax(p.detach())[0].isnan()):
            raise ValueError(f"{what} has NaN in its weight {name}; load or train it again.")


def check_logits(logits: Any, n: int, what: str = "The classifier") -> None:
    """Raise ValueError unless ``logits`` is a tensor (n, K) of at least two classes."""
    shape = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n or logits.shape[1] < 2:
        images = "one image" if n == 1 else f"{n} images"
        advice = "" if isinstance(logits, Tensor) else "; wrap it in a module that returns the logits alone"
        raise ValueError(
            f"{what} must return logits (N, K) of at least two classes, a tensor; it returned {shape} for "
            f"{images}{advice}."
        )


NO_GRADIENT = (
    "leaves autograd (numpy, ONNX, detach or no_grad inside), so attacks have no gradient; use square, or "
    "purify.BPDAClassifier(model, surrogate), on the command line --model-gradient none or bpda"
)

# What torch says of a batch that a network cannot take. Of other failures (memory, say) it keeps its own words.
_SHAPES = re.compile("shape|size|channel|dimension|reshape|expected input|multipl|elements", re.IGNORECASE)
_KINDS = re.compile("same device|dtype|input type|scalar type|same type|to be on", re.IGNORECASE)
_NO_MEMORY = re.compile("allocat|out of memory|ALLOC_FAILED")  # CPUs, CUDA, its libraries


def ran_out(error: RuntimeError) -> bool:
    """Whether this is torch's word for no memory left: on CPUs it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)) is not None


@contextmanager
def fitting(x: Tensor, what: str) -> Iterator[None]:
    """Turns torch's words for images x (N, C, H, W) that ``what``, called within, cannot take into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if ran_out(error):
            raise
        if _KINDS.search(reason):
            kind = f"images of {x.dtype} on {x.device}"
            raise ValueError(f"{what} cannot take {kind}; bring both to one type and device ({reason}).") from error
        if "that requires grad" in reason:  # numpy() was called on it
            raise ValueError(f"{what} {NO_GRADIENT}.") from error
        if not _SHAPES.search(reason):
            raise
        if len(x) == 0:
            raise ValueError(f"{what} cannot take an empty batch; leave it out ({reason}).") from error
        channels, last = x.shape[1], x.shape[-1]
        advice = "use images of the channels and size that it was trained on"
        if last in (1, 3) and channels not in (1, 3):
            advice = "they look like (N, H, W, C), use images.permute(0, 3, 1, 2)"
        shape = f"{tuple(x.shape[1:])} (C, H, W)"
        raise ValueError(f"{what} cannot take images of shape {shape}; {advice} ({reason}).") from error


def whole_numbers(values: Any, what: str, device: torch.device | None = None) -> Tensor:
    """``values`` as a tensor; what is no number at all raises ValueError."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what} must be whole numbers, one per image, got {short(values)}.") from error


def sample_keys(values: Any, images: Tensor) -> Tensor:
    """The ``sample_ids`` of ``images`` on their device, default 0..N-1; ValueError unless there is one per image."""
    ids = torch.arange(len(images)) if values is None else whole_numbers(values, "sample_ids")
    if ids.shape != (len(images),):
        raise ValueError(f"There are {len(images)} images but {ids.numel()} sample_ids; give one per image.")
    return ids.to(images.device)


def check_seed(seed: Any) -> int:
    """The seed as an int.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        return operator.index(seed)
    except TypeError as error:
        raise ValueError(f"seed must be a whole number, got {short(seed)}.") from error


def check_flag(value: Any, what: str) -> None:
    """Raise ValueError unless ``value`` is True or False: any text would pass for True."""
    if not isinstance(value, (bool, np.bool_, int)):
        raise ValueError(f"{what} must be True or False, got {short(value)}.")


def check_shape(value: Any) -> tuple[int, int, int]:
    """``value`` as (C, H, W).

    Raises:
        ValueError: it is something else.
    """
    try:
        shape = tuple(value)
    except TypeError:
        shape = ()
    if len(shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {short(value)}.")
    for n in shape:
        check_count(n, "each of image_shape (C, H, W)")
    return shape[0], shape[1], shape[2]


def nearest(name: object, known: Iterable[str]) -> str:
    """``(did you mean 'x'?)``, or nothing where no known name resembles it."""
    plain = {_plain(k): k for k in known}
    found = get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    return f" (did you mean {plain[found[0]]!r}?)" if found else ""


def _plain(name: object) -> str:
    """Letters and digits; float16 is fp16, whose letters resemble it less than they do float32's."""
    found = re.sub(r"[^a-z0-9]", "", str(name).lower())
    return found.replace("bfloat16", "bf16").replace("float16", "fp16")


def choose(name: str, registry: Mapping[str, T], what: str) -> T:
    """``registry[name]``, or a ValueError that lists the known names, and first the one that was meant."""
    if not isinstance(name, str) or name not in registry:
        known = ", ".join(sorted(registry))
        raise ValueError(f"Unknown {what} {short(name)}{nearest(name, registry)}; known: {known}.")
    return registry[name]


def check_unique(names: Iterable[Hashable], what: str, advice: str) -> None:
    """Raise ValueError if two ``what`` have the same name: their records could not be told apart."""
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"Two {what} are called {repeated[0]!r}; {advice}.")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, finite, and not a truth value: what configs from outside must still show."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def check_count(value: int, what: str, minimum: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{what} must be a whole number of at least {minimum}, got {short(value)}.")


def check_weight(value: float, what: str) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{what} must be a number of at least 0, got {value}.")


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise ValueError unless the file ``path`` can be written; makes its folder, and leaves a file as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); choose another {option}.") from error
