"""Classifiers without a gradient of their own: those that leave autograd, and those whose gradient says nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purify.answers import ask
from purify.checks import check_eval
from purify.purification.gradients import with_gradient_of


class BlackBox(nn.Module):
    """A classifier that is asked for values only, outside autograd: numpy or ONNX may be inside.

    Attacks that take a gradient refuse it in one sentence; square and random-noise work.

    Args:
        classifier: images (N, C, H, W) in [0, 1] to logits (N, K), in eval mode.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        check_eval(classifier, "attacking it")
        self.classifier = classifier
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) without a graph."""
        with torch.no_grad():
            return ask(self.classifier, x.detach()).detach()


class BPDAClassifier(BlackBox):
    """The values of one classifier, bit for bit, and the gradient of another (BPDA, Athalye et al. 2018).

    For classifiers that leave autograd, quantise their input or saturate: what an attack finds is judged by the
    classifier itself, but a gradient that is not its own may miss much. The nearer the surrogate, the better.

    Args:
        classifier: as for :class:`BlackBox`.
        surrogate: a differentiable classifier of the same classes, in eval mode; its weights are frozen.

    Raises:
        ValueError: a classifier in train mode; at the call: the surrogate has other classes.
    """

    def __init__(self, classifier: nn.Module, surrogate: nn.Module) -> None:
        super().__init__(classifier)
        check_eval(surrogate, "attacking it")
        self.surrogate = surrogate.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of the classifier, with the surrogate's graph."""
        value = super().forward(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        proxy = ask(self.surrogate, x, "The surrogate")
        if proxy.shape != value.shape:
            raise ValueError(
                f"The surrogate answers {proxy.shape[1]} classes and the classifier {value.shape[1]}; take a surrogate "
                "of the same."
            )
        return with_gradient_of(value.to(proxy), proxy)
