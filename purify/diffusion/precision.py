"""Mixed precision whose gradients do not depend on the scale of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from purify.diffusion.classes import call
from purify.transforms import compiled_in_words

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT32 = "float32"
COMPILE = "+compile"


@dataclass(frozen=True)
class Precision:
    """How a score network runs under attack, or in a certificate.

    Attributes:
        autocast: a type of ``AUTOCAST``; None: the network's own.
        compiled: by ``torch.compile``; equal to the network itself up to rounding.
    """

    autocast: str | None = None
    compiled: bool = False

    def check_twice(self, what: str) -> None:
        """Raise ValueError where ``what`` takes second derivatives, which these networks do not have."""
        if self.compiled:
            raise ValueError(
                f"{what} takes second derivatives, which compiled networks do not have; use a precision without "
                f"{COMPILE}."
            )
        if self.autocast == "float16":
            raise ValueError(f"{what} takes second derivatives, which vanish in fp16; use the precision bf16.")


HALVES = {"bf16": "bfloat16", "fp16": "float16"}
PLAIN = {FLOAT32: Precision(), **{name: Precision(autocast) for name, autocast in HALVES.items()}}
PRECISIONS = PLAIN | {name + COMPILE: replace(plain, compiled=True) for name, plain in PLAIN.items()}
RECOMPILE_LIMIT = 64  # inference and gradients, one image and several, three types: beyond 8 torch stops compiling


def compiled(network: nn.Module) -> nn.Module:
    """``torch.compile(network)``, with room for all graphs of a run; see :func:`mark_batch`."""
    known = signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT} if "recompile_limit" in known else {}
    return cast("nn.Module", torch.compile(network, **limit))


def mark_batch(*inputs: Tensor | None) -> None:
    """Has one graph serve batches of every size above 1."""
    for value in inputs:
        if value is not None and len(value) > 1:
            torch._dynamo.maybe_mark_dynamic(value, 0)


def evaluate(
    network: nn.Module, u: Tensor, labels: Tensor, autocast: str | None, classes: Tensor | None = None
) -> Tensor:
    """``network(u, labels)``, its ``.sample`` if it has one, under autocast to a type of ``AUTOCAST`` if not None.

    ``classes``: a third argument, see :func:`purify.diffusion.classes.call`.

    Gradients below 6e-8 vanish in float16. There, the gradient that enters the network is brought to about 1 for each
    sample by a power of two, and what leaves it is scaled back: exactly, whatever the loss is multiplied by. That
    supposes that samples do not mix and weights are frozen. bfloat16, which has the range of float32, needs no scaling.

    Raises:
        ValueError: autocast of a float64 network; ``create_graph`` through float16 (second derivatives reach the
            network's inner graph unscaled, where they could not be told apart, and vanish).
    """
    if autocast is None:
        return _plain(network, u, labels, classes)
    check_autocast(network, autocast)
    frozen = not any(p.requires_grad for p in network.parameters())
    scaled = autocast == "float16" and torch.is_grad_enabled() and frozen
    scale = _Scale()
    if scaled:
        u, labels = (_Leave.apply(v, scale) for v in (u, labels))
        if classes is not None and classes.is_floating_point():
            classes = _Leave.apply(classes, scale)
    with torch.autocast(u.device.type, dtype=AUTOCAST[autocast]):
        output = _plain(network, u, labels, classes)
    output = output.to(u.dtype)
    return _Enter.apply(output, scale) if scaled else output


def check_autocast(network: nn.Module, autocast: str) -> None:
    """Raise ValueError for a network of float64, which ``torch.autocast`` leaves as it is."""
    if any(p.dtype == torch.float64 for p in network.parameters()):
        raise ValueError(f"A float64 network does not run in {autocast}; convert it to float32, or leave autocast out.")


def rounds_to_tf32(device: torch.device) -> bool:
    """Whether convolutions of float32 on this device are TF32, with 10 bits of the 23: PyTorch's default on GPUs."""
    conv: Any = getattr(torch.backends.cudnn, "conv")  # noqa: B009 - untyped
    return device.type == "cuda" and conv.fp32_precision == "tf32"


@contextmanager
def float32_proper() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32, to which PyTorch's convolutions default on GPUs."""
    parts: tuple[Any, ...] = (getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul)  # noqa: B009 - untyped
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def _plain(network: nn.Module, u: Tensor, labels: Tensor, classes: Tensor | None) -> Tensor:
    with compiled_in_words():
        output = call(network, u, labels, classes)
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ValueError(f"The network must return a tensor, or an object with .sample, it returned a {kind}.")
    return output


class _Scale:
    """The factors of one evaluation, one per sample, as its backward pass finds them."""

    def __init__(self) -> None:
        self.exponent: Tensor | None = None

    def find(self, grad: Tensor) -> None:
        if torch.is_grad_enabled():  # in a backward pass: create_graph
            raise ValueError("Second derivatives (create_graph, guidance) vanish in float16; use autocast='bfloat16'.")
        largest = grad.detach().flatten(1).abs().amax(1)
        exponent = torch.frexp(largest).exponent.clamp(-120, 120)
        self.exponent = torch.where(largest.isfinite() & (largest > 0), exponent, 0)

    def multiply(self, grad: Tensor, sign: int) -> Tensor:
        """grad * 2^(sign * exponent), exactly."""
        if self.exponent is None:
            return grad
        factor = torch.ldexp(torch.ones_like(self.exponent, dtype=grad.dtype), sign * self.exponent)
        return grad * factor.reshape(-1, *[1] * (grad.ndim - 1))


class _Enter(torch.autograd.Function):
    """Identity after the network; its backward pass comes first, and scales."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.scale.find(grads[0])
        return ctx.scale.multiply(grads[0], -1), None


class _Leave(torch.autograd.Function):
    """Identity before the network; its backward pass comes last, and scales back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.scale.multiply(grads[0], 1), None
