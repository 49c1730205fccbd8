"""What certificates use of the models that are given to them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from purify.diffusion.schedule import Schedule


class Classifier(Protocol):
    """Noisy images (N, C, H, W) to logits (N, K)."""

    def __call__(self, noisy: Tensor, /) -> Tensor: ...


class KeyedClassifier(Protocol):
    """A classifier with randomness of its own, as far as ``accepts_keys`` says so: a function of its keys, as
    ``Purifier.forward``."""

    @property
    def accepts_keys(self) -> bool: ...

    def __call__(self, noisy: Tensor, /, *, sample_ids: Tensor, draw: Tensor, seed: int) -> Tensor: ...


class Denoiser(Protocol):
    """Knows the noise at each time and the mean of the clean images behind noisy ones, as a ``ScoreModel`` does."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def schedule(self) -> Schedule: ...

    def denoise(self, u: Tensor, t: Tensor, /) -> Tensor: ...

    def requires_grad_(self, requires_grad: bool = True) -> object: ...
