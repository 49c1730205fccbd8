"""Which iterate is returned: a race on purifications that neither the gradients nor the judges use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from purify.attacks.base import KeyedCall
from purify.attacks.losses import margin_loss
from purify.attacks.submitted import Submitted
from purify.memory import Parts


@dataclass(frozen=True)
class Race:
    """Successive halving (Karnin et al. 2013): each round the better half goes on, with twice the draws.

    All candidates of an image see the same draws, so that they differ by themselves alone.

    Args:
        candidates: how many start.
        forwards: draws of one image in all rounds together, at most.
        first: the first draw; others have been used.
    """

    candidates: int
    forwards: int
    first: int = 0

    def rounds(self) -> list[tuple[int, int]]:
        """Candidates and draws for each, of every round; none without a choice to make or a draw for each.

        As many as halve the candidates to one, or fewer: in the first every candidate meets a draw.
        """
        if self.candidates == 1:
            return []
        count = min(math.ceil(math.log2(self.candidates)), self.forwards // self.candidates)
        sizes = [-(-self.candidates // 2**r) for r in range(count)]
        return [(size, self.forwards // (count * size)) for size in sizes]

    @property
    def used(self) -> int:
        """Forward passes of one image."""
        return sum(size * draws for size, draws in self.rounds())

    @property
    def draws(self) -> int:
        """Draws that the winner has met."""
        return sum(draws for _, draws in self.rounds())

    @torch.no_grad()
    def run(self, call: KeyedCall, candidates: Tensor, y: Tensor, ids: Tensor, max_rows: int) -> Winner:
        """The winner of ``candidates`` (K, N, C, H, W)."""
        n = candidates.shape[1]
        alive = torch.arange(len(candidates), device=y.device)[:, None].expand(-1, n)
        submitted = Submitted(n, y.device)
        margins = torch.empty(len(candidates), n, 0, device=y.device)
        first = self.first
        for size, draws in self.rounds():
            alive, margins = _best(alive, margins, size)
            images = candidates.gather(0, alive.reshape(*alive.shape, 1, 1, 1).expand(-1, -1, *candidates.shape[2:]))
            new = _margins(call, images, y, ids, first, draws, max_rows)
            submitted.add(new.transpose(0, 1).flatten(1))
            margins = torch.cat([margins, new], 2)
            first += draws
        alive, margins = _best(alive, margins, 1)
        rows = torch.arange(n, device=y.device)
        return Winner(candidates[alive[0], rows], margins[0], submitted)


@dataclass(frozen=True)
class Winner:
    """The images (N, C, H, W) of a race, their margins (N, R) on the draws that they met, and all its answers."""

    images: Tensor
    margins: Tensor
    submitted: Submitted

    @property
    def broken(self) -> Tensor:
        """(N,): wrong on every draw, of which there were enough to say so."""
        enough = self.margins.shape[1] >= ENOUGH
        return (self.margins > 0).all(1) & enough

    @property
    def loss(self) -> Tensor:
        """Mean margin (N,); NaN without draws."""
        return self.margins.mean(1)

    @property
    def score(self) -> Tensor:
        """What tells it from winners of other races on the same draws, (N,): inf where broken; NaN without draws."""
        return score(self.margins).masked_fill(self.broken, torch.inf)


SOFTNESS = 2.0  # margin that counts as clearly wrong
ENOUGH = 16  # draws, all wrong, after which no more is spent on an image


def score(margins: Tensor) -> Tensor:
    """What wins, (..., R) -> (...): a softened share of wrong answers, ties broken by how wrong they are."""
    return (margins / SOFTNESS).sigmoid().mean(-1)


def _best(alive: Tensor, margins: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The ``size`` best of each image, the earlier among equals; the last ones if nothing was asked."""
    if size == len(alive) or margins.shape[2] == 0:
        return alive[-size:], margins[-size:]
    order = score(margins).sort(dim=0, descending=True, stable=True).indices[:size]
    return alive.gather(0, order), margins.gather(0, order[..., None].expand(-1, -1, margins.shape[2]))


def _margins(call: KeyedCall, images: Tensor, y: Tensor, ids: Tensor, first: int, draws: int, max_rows: int) -> Tensor:
    """Margins (K, N, R) of images (K, N, C, H, W) on R draws."""
    k, n = images.shape[:2]
    flat = images.flatten(0, 1)

    def margin(part: Tensor) -> Tensor:
        row, draw = part // draws, first + part % draws
        return margin_loss(call(flat[row], ids[row % n], draw), y[row % n])

    rows = torch.arange(k * n * draws, device=y.device)
    return torch.cat([found for _, found in Parts(max_rows).of(rows, margin)]).reshape(k, n, draws)
