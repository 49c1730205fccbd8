"""PGD+EOT with perturbations of low spatial frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

from purify.attacks.norms import BALLS
from purify.attacks.pgd import PGD
from purify.checks import is_number


@cache
def projector(size: int, cutoff: float) -> Tensor:
    """The (size, size) projection onto the first ``ceil(cutoff * size)`` cosines (DCT-II) of a line of pixels."""
    basis = dct(np.eye(size), axis=0, norm="ortho")[: int(np.ceil(cutoff * size))]
    return torch.from_numpy(basis.T @ basis)


def low_pass(v: Tensor, cutoff: float) -> Tensor:
    """v (N, C, H, W) without the cosines above ``cutoff`` in either direction."""
    rows, columns = (projector(n, cutoff).to(v) for n in v.shape[-2:])
    return rows @ v @ columns


@dataclass(frozen=True)
class LowFrequencyPGD(PGD):
    """PGD+EOT in a low-pass basis, after the low-frequency attack of DiffBreak (Kassis et al. 2024).

    Purification removes fine structure and keeps coarse one; so the perturbation is confined to the lowest spatial
    frequencies and scaled back, not clipped, into the ball. Its perceptual budget is the threat model's ball (theirs is
    perceptual and larger).

    Args:
        cutoff: share of the frequencies that is kept, in each direction.
    """

    cutoff: float = 0.5

    name: ClassVar[str] = "low-frequency-eot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.cutoff) and 0 < self.cutoff <= 1):
            raise ValueError(f"The cutoff of the low-frequency attack must lie in (0, 1], got {self.cutoff}.")

    def direction(self, gradients: Sequence[Tensor], z: Tensor) -> Tensor:
        step = low_pass(gradients[0], self.cutoff)
        scale = step.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
        step = step / torch.where(scale > 0, scale, 1.0)  # keeps tiny gradients from underflowing
        length = BALLS[self.norm].distance(step).reshape(-1, 1, 1, 1)
        return step / torch.where(length > 0, length, 1.0)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        delta = low_pass(z - x, self.cutoff)
        length = BALLS[self.norm].distance(delta).clamp_min(torch.finfo(z.dtype).tiny)
        inside = x + delta * (self.eps / length).clamp_max(1).reshape(-1, 1, 1, 1)
        return BALLS[self.norm].project(inside, x, self.eps)

    def _start(self, x: Tensor, ids: Tensor, seed: int, restart: int, first: Tensor | None) -> Tensor:
        return self.project(super()._start(x, ids, seed, restart, first), x)
