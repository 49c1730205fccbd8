"""Geometry of the threat models: projection onto {z in [0,1]^d: ||z - x|| <= eps}, ascent directions, starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from purify.diffusion.score import per_sample


def unit(v: Tensor) -> Tensor:
    """Each sample scaled to L2 norm 1; zero where it is zero."""
    largest = per_sample(v.abs().flatten(1).amax(1), v)  # keeps tiny gradients from underflowing
    scaled = v / torch.where(largest > 0, largest, 1.0)
    return scaled / per_sample(scaled.flatten(1).norm(dim=1), scaled).clamp_min(1e-12)


class Ball(ABC):
    """What lies within a radius ``eps`` of images x in the box [0, 1]."""

    unit: ClassVar[str] = ""  # of eps, where it has one

    @abstractmethod
    def size(self, z: Tensor, x: Tensor) -> Tensor:
        """How far each point z is from x, as eps counts: (N, C, H, W) twice -> (N,)."""

    @abstractmethod
    def project(self, z: Tensor, x: Tensor, eps: float) -> Tensor:
        """A point within ``eps`` of ``x`` and inside [0, 1], close to ``z``."""

    @abstractmethod
    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """Ascent direction of unit norm at the iterate ``z`` around ``x``; zero where the gradient is zero."""

    @abstractmethod
    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        """A random start in the ball (L2, L1: on its surface), from ``uniform`` in (0, 1) of the shape of ``x``."""

    def enter(self, x: Tensor) -> Tensor:
        """Images as points, which may have more to them."""
        return x

    def leave(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Points as images, and sizes (N,) by name that images alone do not tell."""
        return z, None

    def step(self, eps: float) -> float:
        """Mean length of an attack's steps along :meth:`direction`."""
        return eps

    def check(self, x: Tensor) -> None:  # noqa: B027 - most are for all images
        """Raise ValueError unless distances from images x can be taken, before any long work."""


class NormBall(Ball):
    """A ball in a norm."""

    @abstractmethod
    def distance(self, delta: Tensor) -> Tensor:
        """Norm of each sample's perturbation: (N, C, H, W) -> (N,)."""

    def size(self, z: Tensor, x: Tensor) -> Tensor:
        return self.distance(z - x)


class LinfBall(NormBall):
    """max |delta| <= eps; the projection is exact."""

    def distance(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)

    def project(self, z: Tensor, x: Tensor, eps: float) -> Tensor:
        return torch.minimum(torch.maximum(z, (x - eps).clamp_min(0)), (x + eps).clamp_max(1))

    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return gradient.sign()

    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        return self.project(x + eps * (2 * uniform - 1), x, eps)


class SummedBall(NormBall):
    """A sum over pixels: the nearest point of ball and box shrinks all moves alike, and caps each at its room."""

    @abstractmethod
    def shrunk(self, moves: Tensor, amount: Tensor) -> Tensor:
        """The sizes ``moves`` (N, C, H, W), shrunk: as they are at amount 0, the less the greater it is."""

    @abstractmethod
    def whole(self, moves: Tensor) -> Tensor:
        """The amount (N,) that leaves nothing."""

    def project(self, z: Tensor, x: Tensor, eps: float) -> Tensor:
        delta, x64 = (z - x).double(), x.double()
        room = torch.where(delta > 0, 1 - x64, x64)  # how far each pixel may move in its direction
        moves = delta.abs()
        inside = self.distance(torch.minimum(moves, room)) <= eps
        if inside.all():
            return z.clamp(0, 1)
        low = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        high = self.whole(moves)
        for _ in range(60):
            middle = (low + high) / 2
            capped = torch.minimum(self.shrunk(moves, per_sample(middle, moves)), room)
            too_long = self.distance(capped) > eps
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
        amount = per_sample(torch.where(inside, 0.0, high), moves)
        nearest = torch.minimum(self.shrunk(moves, amount), room)
        return (x64 + delta.sign() * nearest).to(z.dtype).clamp(0, 1)


class L2Ball(SummedBall):
    """||delta||_2 <= eps; the projection onto ball and box together is exact."""

    def distance(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1)

    def shrunk(self, moves: Tensor, amount: Tensor) -> Tensor:
        return moves * (1 - amount)

    def whole(self, moves: Tensor) -> Tensor:
        return torch.ones(len(moves), dtype=moves.dtype, device=moves.device)

    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return unit(gradient)

    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        return self.project(x + unit(2 * uniform - 1) * eps, x, eps)


@dataclass(frozen=True)
class L1Ball(SummedBall):
    """||delta||_1 <= eps with the exact projection onto ball and box together (Croce & Hein 2021).

    Of the pixels that can still move, the ascent direction moves the k with the largest gradients: the share
    ``sparsity`` of all pixels (Tramer & Boneh 2019, SLIDE); or, if that is None, as many as L1-APGD (Croce & Hein 2021,
    section 4): k = ||z - x||_0 / 1.5, there of the best iterate at checkpoints, here of each iterate, and a twentieth
    of the pixels at x itself. The paper's larger radii at the start are not used.
    """

    sparsity: float | None = 0.05

    def distance(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).sum(1)

    def shrunk(self, moves: Tensor, amount: Tensor) -> Tensor:
        return (moves - amount).clamp_min(0)

    def whole(self, moves: Tensor) -> Tensor:
        return moves.flatten(1).amax(1)

    def direction(self, gradient: Tensor, z: Tensor, x: Tensor) -> Tensor:
        movable = ((gradient > 0) & (z < 1)) | ((gradient < 0) & (z > 0))
        size = torch.where(movable, gradient.abs(), 0.0).flatten(1)
        count = (self._share(z, x) * size.shape[1]).round().clamp_min(1)
        values, pixels = size.sort(dim=1, descending=True, stable=True)
        among = (torch.arange(size.shape[1], device=z.device) < count) & (values > 0)
        chosen = torch.zeros_like(size).scatter(1, pixels, among.to(size.dtype))
        unit = chosen / chosen.sum(1, keepdim=True).clamp_min(1)
        return unit.reshape(gradient.shape) * gradient.sign()

    def _share(self, z: Tensor, x: Tensor) -> Tensor:
        """Of all pixels, those that a step moves; (N, 1)."""
        if self.sparsity is not None:
            return torch.full((len(z), 1), self.sparsity, dtype=torch.float64, device=z.device)
        moved = (z != x).flatten(1).double().mean(1, keepdim=True)
        return torch.where(moved > 0, moved / 1.5, 0.05)

    def start(self, x: Tensor, eps: float, uniform: Tensor) -> Tensor:
        return self.project(x + eps * (2 * uniform - 1), x, eps)


BALLS: dict[str, NormBall] = {"Linf": LinfBall(), "L2": L2Ball(), "L1": L1Ball()}
