"""What torch's transforms of functions (compile, export, func) may do with a purification, and what they are told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
COMPILED = "_orig_mod"  # where torch.compile keeps the network


def readable(x: Tensor) -> bool:
    """Whether the value of a tensor can be looked at: not inside ``torch.func.vmap``, where there are several."""
    try:
        bool(x.detach().flatten()[:1].any())
    except RuntimeError as error:
        if "vmap" in str(error):
            return False
        raise
    return True


def set_mode(module: nn.Module, mode: bool) -> None:
    """``module.train(mode)`` for parts that have a mode: an exported program keeps that of its export."""
    with suppress(NotImplementedError):
        module.train(mode)


def copied(module: Module) -> Module:
    """A deep copy, which computes the same; raises as :func:`check_copies`."""
    check_copies(module)
    return copy.deepcopy(module)


def check_copies(module: nn.Module) -> None:
    """Raise ValueError if a part is compiled and has hooks of its own, which copies lose (PyTorch 2.14.1)."""
    for part in module.modules():
        hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
        if isinstance(getattr(part, COMPILED, None), nn.Module) and any(hooks):
            raise ValueError(
                "Copies of a compiled network lose the hooks that were registered on it, and its float64 copy is "
                "needed; register them on the network before torch.compile."
            )


def run_eagerly(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """``function(...)``; where ``torch.compile`` traces the caller, as plain Python, which gives the same values.

    Raises:
        ValueError: ``torch.export`` traces it, which has no room for plain Python.
    """
    if torch.compiler.is_exporting():
        raise ValueError(
            "A purification cannot be exported: it draws noise and decides by values; export the classifier and the "
            "score network, and build the purifier around them."
        )
    if torch.compiler.is_compiling():
        return torch._dynamo.disable(function)(*args, **options)
    return function(*args, **options)


def run_plainly() -> AbstractContextManager[Any]:
    """Within, compiled networks run layer by layer, so that hooks see all layers; torch 2.4 and 2.5 cannot."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


@contextmanager
def compiled_in_words() -> Iterator[None]:
    """Turns what compiled networks say of second derivatives, or of what cannot be compiled, into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        kind = type(error)
        if kind.__name__ == "TorchRuntimeError":  # the network's own
            advice = "use images of the channels and size that it was trained on"
            raise ValueError(f"The compiled network cannot take these images; {advice}.") from error
        if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).partition("\n\n")[0].split()).rstrip(".")
            raise ValueError(
                f"The network cannot be compiled here ({reason}); use a precision without +compile, or pass the "
                "network as it is."
            ) from error
        if "donated buffers" in str(error) or "double backward" in str(error):
            raise ValueError(
                "Attacks on guided steps take second derivatives, which networks inside torch.compile do not have; "
                "pass the auxiliary network (and under through_score the score network) as they are."
            ) from error
        raise


@contextmanager
def func_in_words() -> Iterator[None]:
    """Turns what ``torch.func`` says of engines and plans that it cannot differentiate or map into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if "saved tensor hooks" in str(error) or "autograd.Function with functorch" in str(error):
            raise ValueError(
                "torch.func differentiates the gradient engine full only, without guidance and float16; take "
                "defended.with_gradient('full'), or torch.autograd.grad."
            ) from error
        if str(error).startswith("vmap: It looks like you're"):  # looking at a value, of which there are several
            raise ValueError(
                "Under torch.func.vmap the number of steps must not depend on the image; give steps instead of a step "
                "length (dt)."
            ) from error
        raise
