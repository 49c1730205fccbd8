"""APGD (Croce & Hein 2020) with expectation over transformation, on the margin or any other loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from purify.attacks.pgd import PGD, Target

MOMENTUM = 0.75  # share of the new step; the rest repeats the last one
RHO = 0.75  # share of steps that must raise the loss for the step size to stay


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step size is reconsidered: shares 0.22, then intervals shorter by 0.03 down to 0.06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({-(-round(share * steps * 1000) // 1000) for share in shares[1:] if share < 1})


@dataclass(frozen=True)
class APGD(PGD):
    """APGD with EOT: momentum, and a step size of each sample's own that halves where progress ends.

    Arguments as for :class:`PGD`; steps start at twice ``step_size`` (default: 2 eps, as published), ``schedule`` is
    not used. AutoAttack's ``rand`` runs APGD on cross-entropy and DLR, batch by batch under torch's generator; this
    one is keyed, per sample, keeps the iterate with the best mean loss over draws, and climbs the margin by default.
    """

    name: ClassVar[str] = "apgd-margin-eot"

    def _iterates(self, target: Target, restart: int, first: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        x = target.x
        z = previous = self._start(target, restart, first)
        pace = _Pace(len(x), 2 * self.mean_step(x), x.device)
        marks = checkpoints(self.steps)
        for step in range(self.steps + 1):
            first_draw = (restart * (self.steps + 1) + step) * self.eot
            loss, gradients = self._eot(target, z, first_draw, step < self.steps)
            yield z, loss
            if step == self.steps:
                return
            pace.see(z, loss, gradients[0])
            back = pace.reconsider(step - max([m for m in marks if m < step], default=0)) if step in marks else None
            gradient = gradients[0]
            if back is not None:
                z, gradient = torch.where(back, pace.best, z), torch.where(back, pace.best_gradient, gradient)
                previous = torch.where(back, z, previous)
            moved = self.project(z + pace.size * self.direction([gradient], z, x), x)
            share = MOMENTUM if step else 1.0
            z, previous = self.project(z + share * (moved - z) + (1 - share) * (z - previous), x), z


class _Pace:
    """Step sizes (N, 1, 1, 1) and the best point of one run, per sample."""

    def __init__(self, n: int, size: float, device: torch.device) -> None:
        self.size = torch.full((n, 1, 1, 1), size, device=device)
        self.best_loss = torch.full((n,), -torch.inf, device=device)
        self.loss = -self.best_loss
        self.rises = torch.zeros(n, device=device)
        self.best = self.best_gradient = torch.empty(0)
        self.best_at_mark, self.halved = self.best_loss, torch.ones(n, dtype=torch.bool, device=device)

    def see(self, z: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Take an iterate with its loss and gradient into account."""
        if self.best.numel() == 0:
            self.best, self.best_gradient = z, gradient
        better = (loss > self.best_loss).reshape(-1, 1, 1, 1)
        self.best = torch.where(better, z, self.best)
        self.best_gradient = torch.where(better, gradient, self.best_gradient)
        self.best_loss = torch.maximum(loss, self.best_loss)
        self.rises = self.rises + (loss > self.loss)
        self.loss = loss

    def reconsider(self, interval: int) -> Tensor:
        """Halve the step where too few steps rose, or nothing was gained since the last mark; there (N, 1, 1, 1)."""
        few = self.rises < RHO * interval
        stuck = ~self.halved & (self.best_loss <= self.best_at_mark)
        self.halved = few | stuck
        self.best_at_mark, self.rises = self.best_loss, torch.zeros_like(self.rises)
        back = self.halved.reshape(-1, 1, 1, 1)
        self.size = torch.where(back, self.size / 2, self.size)
        return back
