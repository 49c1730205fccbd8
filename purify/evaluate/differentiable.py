"""Whether gradients of a model can be had, and say anything: without them every model looks robust."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from purify.answers import ask
from purify.attacks.kinks import moved
from purify.checks import NO_GRADIENT
from purify.evaluate.runner import Defence
from purify.purification.defended import DefendedClassifier

FEW = 2  # images that are asked about


def check_gradient(defence: Defence, images: Tensor) -> None:
    """Raise ValueError if attacks that take gradients get none of a network; warn where it is zero everywhere.

    Networks are asked one by one: around a score network that leaves autograd the purifier itself still has a gradient,
    which is not that of what runs.
    """
    if not any(attack.takes_gradient for attack in defence.attacks):
        return
    x, model = moved(images[:FEW]), defence.model
    if not isinstance(model, DefendedClassifier):
        _check(defence.name, model, x)
        return
    _check(f"The classifier of {defence.name}", model.classifier, x)
    purifier = model.purifier
    if not purifier.engine.exact:
        return
    t = torch.full((len(x),), purifier.level.highest, dtype=torch.float64, device=x.device)
    slope = _slope(lambda u: purifier.score_model.eps(u, t), 2 * purifier.resized(x) - 1)
    if slope is None:
        raise ValueError(
            f"The score network of {defence.name} leaves autograd (numpy, ONNX, detach or no_grad inside), so exact "
            "gradients would miss it; use --gradient bpda."
        )


def is_differentiable(model: nn.Module, images: Tensor, name: str) -> bool:
    """Whether the answers to images (N, C, H, W) in [0, 1] have a gradient with respect to them, be it zero."""
    return _slope(lambda z: ask(model, z, name), images[:1]) is not None


def _check(name: str, model: nn.Module, x: Tensor) -> None:
    slope = _slope(lambda z: ask(model, z, name).topk(2, dim=1).values.diff(dim=1), x)
    if slope is None:
        raise ValueError(f"{name} {NO_GRADIENT}.")
    if not bool(slope.any()):
        warnings.warn(
            f"{name} has a gradient of zero at every pixel of the first images, so attacks that follow it find "
            "nothing; add square, or take a surrogate's: --model-gradient bpda.",
            stacklevel=4,
        )


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The gradient of the sum, like x, or None if there is no graph; torch's generator stays as it is."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        z = x.detach().clone().requires_grad_()
        try:
            total = function(z).sum()
        except ValueError as error:
            if NO_GRADIENT in str(error):
                return None
            raise
        return torch.autograd.grad(total, z, allow_unused=True)[0] if total.requires_grad else None
