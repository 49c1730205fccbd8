"""Whether a classifier can be meant for the data: its classes, and how many clean images it gets right."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from purify.attacks.base import keyed
from purify.evaluate.metrics import wilson

MOST = 64  # images that are asked about


def check_classes(name: str, found: int | None, classes: int | None) -> None:
    """Raise ValueError if a model tells fewer classes apart than the data has; warn of more."""
    if found is None or classes is None or found == classes:
        return
    sentence = f"{name} tells {found} classes apart, the data has {classes}"
    if found < classes:
        raise ValueError(f"{sentence}; take a classifier of these classes.")
    warnings.warn(f"{sentence}: an attack may end in a class that the data does not know.", stacklevel=2)


@torch.no_grad()
def check_clean(name: str, model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> None:
    """Warn if a model without randomness is hardly better than guessing on the first images (N, C, H, W)."""
    x, y, ids = images[:MOST], labels[:MOST], ids[:MOST].to(images.device)
    logits = keyed(model, 0, name)(x, ids, torch.zeros_like(ids))
    right = int((logits.argmax(1) == y).sum())
    known = len(y.unique())  # own data may hold images of some classes only
    chance = 1 / (logits.shape[1] if known == 1 else min(known, logits.shape[1]))
    if wilson(right, len(x)).high < 1 - (1 - chance) ** 2:  # fewer than two guesses get right
        warnings.warn(
            f"{name} is right on {right} of {len(x)} clean images, hardly more than guessing: does it expect images "
            "that are normalised, or other classes? It gets them in [0, 1].",
            stacklevel=2,
        )
