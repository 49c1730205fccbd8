"""What comes out of purifications, and how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How purifications went: (N,), or (N, M) where each image has M.

    Attributes:
        t_star: noise levels, float64.
        statistic: what the noise-level rule saw, float64, in standard deviations from its mean on clean images
            (0 where the level is constant); differentiable.
        network_calls: score-network calls of each image (NFE) in all its purifications, int64 (N,); None where an
            adaptive solver decides.
        deviation: how far the reverse process departed from the forward one, if asked for; differentiable. See
            :class:`~purify.purification.process.Deviation`.
    """

    t_star: Tensor
    statistic: Tensor
    network_calls: Tensor | None
    deviation: Tensor | None = None


@dataclass(frozen=True)
class Purified(Trace):
    """Purified images (N, C, H, W) in [0, 1], and their trace (N,)."""

    images: Tensor

    @staticmethod
    def joined(parts: Sequence[Purified]) -> Purified:
        """Batches as one, without deviations, on the CPU."""
        calls = [part.network_calls for part in parts if part.network_calls is not None]
        return Purified(
            torch.cat([part.images for part in parts]).cpu(),
            t_star=torch.cat([part.t_star for part in parts]).cpu(),
            statistic=torch.cat([part.statistic for part in parts]).cpu(),
            network_calls=torch.cat(calls).cpu() if calls else None,
        )


@dataclass(frozen=True)
class Details(Trace):
    """An answer, logits or vote shares (N, K), and the trace (N, M) of the purifications behind it."""

    logits: Tensor

    @staticmethod
    def of(logits: Tensor, rows: Trace, m: int) -> Details:
        """The answer and the trace of its N * M ``rows``, image by image."""
        shape = (len(logits), m)
        calls, deviation = rows.network_calls, rows.deviation
        return Details(
            logits,
            t_star=rows.t_star.unflatten(0, shape),
            statistic=rows.statistic.unflatten(0, shape),
            network_calls=None if calls is None else calls.unflatten(0, shape).sum(1),
            deviation=None if deviation is None else deviation.unflatten(0, shape),
        )
