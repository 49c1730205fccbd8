"""Gradients where a model's slope is 0 at exactly 0 or 1 although it is not beside it.

``clamp(x, 0, 1)`` has slope 0 at its ends from torch 2.14 on, ``hardtanh`` and two ReLUs have it in every version. A
model that clamps its own input would look robust: almost half of the pixels of digits are 0. Gradients are then taken a
little inside the box. Other models are left alone, to the bit.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from purify.answers import ask

STEP = 1e-6  # inside the box, at least
TRIES = 3  # how often a sample is asked in vain whether it is better off inside
SENTENCE = (
    "The model's gradient vanishes at pixels of exactly 0 or 1 and not beside them, as if it clamped its input; there "
    "gradients are taken a millionth inside [0, 1]."
)


def moved(z: Tensor) -> Tensor:
    """z (N, C, H, W), a little inside (0, 1)."""
    step = max(STEP, 4 * torch.finfo(z.dtype).eps)
    return z.clamp(step, 1 - step)


def blind(z: Tensor, gradient: Tensor) -> Tensor:
    """Which samples (N,) have no gradient at any of their pixels at 0, or at any at 1, but have one elsewhere.

    A sample without pixels elsewhere counts, too.
    """
    z, alive = z.flatten(1), gradient.flatten(1) != 0
    ends = z <= 0, z >= 1
    dead = [end.any(1) & ~(alive & end).any(1) for end in ends]
    return (dead[0] | dead[1]) & (alive.any(1) | (ends[0] | ends[1]).all(1))


class Inside:
    """Which of N samples have their gradients taken inside the box."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.rows = torch.zeros(n, dtype=torch.bool, device=device)
        self.tries = torch.zeros(n, dtype=torch.int64, device=device)

    def place(self, z: Tensor) -> Tensor:
        """Where gradients are taken instead of at z."""
        return torch.where(self.rows.reshape(-1, 1, 1, 1), moved(z), z)

    def ask(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Indices of samples whose gradient should be seen inside the box as well."""
        return (blind(z, gradient) & ~self.rows & (self.tries < TRIES)).nonzero()[:, 0]

    def settle(self, asked: Tensor, z: Tensor, gradient: Tensor, inner: Tensor) -> Tensor:
        """Which of the samples ``asked`` have more of a gradient inside, at ``inner``; they stay there."""
        ends = (z <= 0) | (z >= 1)
        before, after = (((g != 0) & ends).flatten(1).sum(1) for g in (gradient, inner))
        better = after > before
        self.tries[asked] += 1
        self.rows[asked] = better
        if bool(better.any()):
            warnings.warn(SENTENCE, stacklevel=2)
        return better


class Watched(nn.Module):
    """A model for attacks that are not ours, whose gradients move inside the box as soon as one was blind.

    ``model`` is anything that maps images to logits. Without gradients its values are the model's, and with them too
    until it moves.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.inside = False
        self.training = getattr(model, "training", False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._ask(x)
        if self.inside:
            return self._ask(x + (moved(x.detach()) - x.detach()))
        seen = x.view_as(x)
        seen.register_hook(lambda gradient: self._see(x.detach(), gradient))
        return self._ask(seen)

    def _ask(self, x: Tensor) -> Tensor:
        return ask(self.model, x, "The model")

    def look(self, x: Tensor) -> None:
        """Find out on a few images, before an attack; torch's generator stays as it is."""
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            torch.autograd.grad(self(z).logsumexp(1).sum(), z)

    def _see(self, x: Tensor, gradient: Tensor) -> None:
        if not self.inside and bool(blind(x, gradient).any()):
            self.inside = True
            warnings.warn(SENTENCE, stacklevel=2)
