"""Gradients taken inside of steps, such that steps can still be recomputed, and differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purify.transforms import compiled_in_words


def check_frozen(networks: Sequence[nn.Module | None], u: Tensor) -> None:
    """Raise ValueError if a gradient through ``u`` would be wanted by weights, which :class:`Rebuilt` gives none."""
    if not (torch.is_grad_enabled() and u.requires_grad):
        return
    if any(p.requires_grad for network in networks if network is not None for p in network.parameters()):
        raise ValueError("Gradients of guided steps do not reach weights; freeze all networks (requires_grad_(False)).")


def gradient_of(distance: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """grad_w of the sum of ``distance``, itself differentiable under torch's grad mode."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        w = w if again and w.requires_grad else w.detach().requires_grad_()
        total = distance(w).sum()
        if not total.requires_grad:  # a network that ignores its input
            return torch.zeros_like(w)
        with compiled_in_words():
            (gradient,) = torch.autograd.grad(total, w, create_graph=again, retain_graph=again, allow_unused=True)
    return torch.zeros_like(w) if gradient is None else gradient


class Rebuilt(torch.autograd.Function):
    """``function(*inputs)``, a tuple of tensors, whose graph exists in the backward pass only.

    A gradient taken inside a checkpointed step would ask for that step's graph at once, and hold on to it: nothing
    would be saved. Here the first pass takes it outside of any graph. Tensors that ``function`` closes over count as
    constants.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        kind = inputs[0].device.type
        ctx.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(kind)
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        # Not the tensors themselves: a part of the graph that nobody runs back would hold on to itself.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, itself):
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # Views end the gradient at this function's inputs, whatever those were computed from.
            inputs = [
                x.view_as(x) if again else x.detach().requires_grad_(n)
                for x, n in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.function(*inputs)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        found: list[Tensor | None] = [None] * len(inputs)
        wanted = [i for i, n in enumerate(needed) if n]
        if pairs:
            ends, starts = zip(*pairs, strict=True)
            with compiled_in_words():
                gradients = torch.autograd.grad(
                    ends, [inputs[i] for i in wanted], starts, create_graph=again, allow_unused=True
                )
            for i, gradient in zip(wanted, gradients, strict=True):
                found[i] = gradient
        return None, *found


def itself(x: Tensor) -> Tensor:
    return x


class Straight(torch.autograd.Function):
    """``value`` forward, bit for bit; the gradient of ``proxy`` backward."""

    @staticmethod
    def forward(ctx: Any, proxy: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
