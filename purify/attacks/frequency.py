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

from purify.attacks.pgd import PGD, Target
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

    Purification removes fine structure and keeps coarse one; so steps, and after each of them the perturbation, are
    confined to the lowest spatial frequencies, and then brought back into the ball and into [0, 1]. That puts some of
    the higher frequencies back. In the threat model ``lpips`` its bound is theirs; they also filter the image by
    kernels that they learn, and pay for LPIPS beyond the bound instead of coming back to it.

    Args:
        cutoff: share of the frequencies that is kept, in each direction.
    """

    cutoff: float = 0.5

    name: ClassVar[str] = "low-frequency-eot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.cutoff) and 0 < self.cutoff <= 1):
            raise ValueError(f"The cutoff of the low-frequency attack must lie in (0, 1], got {self.cutoff}.")

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        # In L1 the number of pixels in a step follows how many have moved; here all have, so it is that of the start.
        step = super().direction([low_pass(gradients[0], self.cutoff)], z, z if self.norm == "L1" else x)
        return low_pass(step, self.cutoff)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        return super().project(x + low_pass(z - x, self.cutoff), x)

    def _start(self, target: Target, restart: int, first: Tensor | None) -> Tensor:
        return self.project(super()._start(target, restart, first), target.x)
