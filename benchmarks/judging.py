"""Test images, attacks on them and fresh purifications that judge those: what scripts on defences have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from purify import DefendedClassifier
from purify.attacks import Attack
from purify.data import load_dataset
from purify.evaluate.metrics import Estimate, estimate


@dataclass(frozen=True)
class Judge:
    """Test images ``first`` to ``first + images``, and how many purifications say whether one is robust."""

    dataset: str
    images: int
    first: int
    draws: int

    def attacked(self, attack: Attack, model: nn.Module) -> Tensor:
        """What the attack makes of the images; of a model without randomness it asks once."""
        attack = attack if isinstance(model, DefendedClassifier) else attack.on_deterministic()
        images, labels = self._data()
        return attack(model, images, labels, sample_ids=self._ids(), seed=2).images

    @torch.no_grad()
    def accuracy(self, model: nn.Module, x: Tensor | None = None) -> Estimate:
        """Of images ``x``, or of the clean ones."""
        images, labels = self._data()
        x, ids = images if x is None else x, self._ids()
        if isinstance(model, DefendedClassifier):
            right = [model(x, sample_ids=ids, seed=1, draw=d).argmax(1) == labels for d in range(self.draws)]
        else:
            right = [model(x).argmax(1) == labels]
        return estimate(torch.stack(right).double().mean(0).numpy())

    def _ids(self) -> Tensor:
        return torch.arange(self.first, self.first + self.images)

    def _data(self) -> tuple[Tensor, Tensor]:
        images, labels = (t[self.first : self.first + self.images] for t in load_dataset(self.dataset, "test"))
        return images, labels


def read(found: Mapping[str, float]) -> Estimate:
    """An accuracy from a file, whatever stands beside it."""
    return Estimate(found["value"], found["low"], found["high"])


def shown(found: Mapping[str, float]) -> str:
    """A value with its interval, in %."""
    return str(read(found)).strip()
