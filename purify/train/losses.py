"""What the networks of ours are trained on; each loss is ``loss(module, images, labels, generator) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad

from purify.score import ScoreModel, per_sample

T_MIN = 1e-3  # the smallest time that score networks see
T_PURIFY = 0.4  # half of the training times lie below this one, where purification happens


def training_times(n: int, generator: torch.Generator) -> Tensor:
    """Times (n,) float64, half of them uniform on (T_MIN, T_PURIFY) and half on (T_MIN, 1)."""
    top = torch.where(torch.arange(n) < n // 2, T_PURIFY, 1.0).double()
    return T_MIN + (top - T_MIN) * torch.rand(n, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class EpsLoss:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14). The module is a :class:`ScoreModel`."""

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        t = training_times(len(images), generator)
        z = torch.randn(images.shape, generator=generator)
        u = 2 * images - 1
        u_t = per_sample(module.schedule.alpha(t), u) * u + per_sample(module.schedule.sigma(t), u) * z
        return (module.eps(u_t, t) - z).square().mean()


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy on images shifted by up to ``shift`` pixels."""

    shift: int = 0

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(module(shifted(images, self.shift, generator)), labels)


@dataclass(frozen=True)
class AdversarialCrossEntropy:
    """Cross-entropy at L_inf adversarial images (Madry et al. 2018): PGD of ``attack_steps`` from a random start."""

    eps: float
    attack_steps: int = 10
    shift: int = 0

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        images = shifted(images, self.shift, generator)
        adversarial = ascend(
            module, images, self.eps, self.attack_steps, generator, lambda logits: cross_entropy(logits, labels)
        )
        return cross_entropy(module(adversarial), labels)


@dataclass(frozen=True)
class Trades:
    """TRADES (Zhang et al. 2019, eq. 5): cross-entropy on x plus ``beta`` KL(p(x) || p(x')), L_inf.

    x' is the image within ``eps`` of x that raises that divergence: PGD of ``attack_steps`` from a random start.
    """

    eps: float
    beta: float = 6.0
    attack_steps: int = 10

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            target = log_softmax(module.eval()(images), 1)
        adversarial = ascend(
            module, images, self.eps, self.attack_steps, generator, lambda logits: divergence(target, logits)
        )
        logits = module(images)
        return cross_entropy(logits, labels) + self.beta * divergence(log_softmax(logits, 1), module(adversarial))


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean of KL(p || q) from log p (N, K) and the logits of q."""
    return kl_div(log_softmax(logits, 1), target, log_target=True, reduction="batchmean")


def ascend(
    module: nn.Module,
    x: Tensor,
    eps: float,
    steps: int,
    generator: torch.Generator,
    objective: Callable[[Tensor], Tensor],
) -> Tensor:
    """Images (N, C, H, W) in [0, 1], at most ``eps`` from x, whose logits raise ``objective``; PGD in eval mode."""
    module.eval().requires_grad_(False)
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    adversarial = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(module(adversarial)), adversarial)
        step = 2.5 * eps / steps * gradient.sign()
        adversarial = torch.minimum(torch.maximum(adversarial.detach() + step, low), high)
    module.train().requires_grad_(True)
    return adversarial


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own random offset of up to ``shift`` pixels, edges filled with 0."""
    if shift == 0:
        return images
    n, _, height, width = images.shape
    padded = pad(images, (shift,) * 4)
    dy, dx = torch.randint(2 * shift + 1, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.arange(width)
    index = torch.arange(n)
    return padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
