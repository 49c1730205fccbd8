"""Noise-level rules: how far each sample is diffused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from purify.noise import Noise
from purify.score import ScoreModel


class NoiseLevel(ABC):
    """``rule(model, u, noise) -> t_star``: float64 (N,) in (0, 1] for images u (N, C, H, W) in [-1, 1] space."""

    @abstractmethod
    def __call__(self, model: ScoreModel, u: Tensor, noise: Noise) -> Tensor: ...


@dataclass(frozen=True)
class Constant(NoiseLevel):
    """The same t* in (0, 1] for every sample (DiffPure)."""

    t_star: float

    def __post_init__(self) -> None:
        if not 0 < self.t_star <= 1:
            raise ValueError(f"t_star must lie in (0, 1], got {self.t_star}.")

    def __call__(self, model: ScoreModel, u: Tensor, noise: Noise) -> Tensor:
        return torch.full((len(u),), self.t_star, dtype=torch.float64, device=u.device)


LEVELS: dict[str, type[NoiseLevel]] = {"constant": Constant}
