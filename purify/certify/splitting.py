"""Splitting noise (Levine & Feizi 2021, arXiv 2103.10834) in L1: SSN by sampling, DSSN derandomized and exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from purify.certify.base import Certificate, Certifier, RandomizedSmoothing
from purify.certify.counts import NoisyCounts, NoisyModel, check_classifier, float64_twin, keys
from purify.certify.sampling import Draws
from purify.checks import check_count, is_number, short
from purify.diffusion.noise import Noise

GRID = 255  # levels of an 8-bit image
MOST_LEVELS = 100_000  # of DSSN, passes per image; lambda is then 196, and hardly anything of an image is left


def check_lam(lam: float) -> None:
    """Raise ValueError unless ``lam`` is a positive number."""
    if not (is_number(lam) and lam > 0):
        raise ValueError(f"lambda must be a positive number, got {short(lam)}.")


def check_levels(lam: float) -> None:
    """Raise ValueError unless DSSN has levels for ``lam``, and not more than can be gone through."""
    check_lam(lam)
    low, high = 0.5 / GRID, MOST_LEVELS / 2 / GRID
    if not 1 <= int(2 * lam * GRID) <= MOST_LEVELS:
        raise ValueError(f"lambda must lie in [{low:.4g}, {high:.4g}] where levels of the grid are counted, got {lam}.")


def split(x: Tensor, s: Tensor, width: float) -> Tensor:
    """The middle of the cell of [0, 1] in which each x lies, where cells (lower, upper] end at s + width * integers.

    v = width ceil((x - s) / width) + s; returns (min(v, 1) + max(v - width, 0)) / 2.
    """
    upper = width * ((x - s) / width).ceil() + s
    return (upper.clamp_max(1) + (upper - width).clamp_min(0)) / 2


def straight_through(values: Tensor, x: Tensor) -> Tensor:
    """``values`` with the gradient of ``x``: their own is zero almost everywhere, which would only hide the model."""
    return values.detach() + (x - x.detach())


@dataclass(frozen=True)
class Splitting:
    """SSN's noise: s uniform on (0, 2 lambda) for every pixel of its own."""

    lam: float

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        s = 2 * self.lam * noise.stream("certify").uniform(0, x.shape[1:], x.dtype)
        return straight_through(split(x, s, 2 * self.lam), x)


@lru_cache(maxsize=32)
def offsets(levels: int, size: int, seed: int) -> Tensor:
    """DSSN's fixed integer offset of each pixel, in [0, levels)."""
    return torch.from_numpy(np.random.RandomState(seed).randint(levels, size=size))


@dataclass(frozen=True)
class SplittingLevels:
    """DSSN's noise: the draw j = 0, ..., L-1 decides all of it, s_i = ((offset_i + j) mod L + 1/2) / 255.

    Integer arithmetic, so that no x on the grid lies on a cell's edge. Images between the grid's points are rounded.

    Args:
        lam: half the width of a cell; L = int(2 lam 255) levels.
        seed: of the offsets.
    """

    lam: float
    seed: int = 0

    @property
    def levels(self) -> int:
        """L, the number of draws that are there."""
        return int(2 * self.lam * GRID)

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        width = self.levels
        offset = offsets(width, x[0].numel(), self.seed).to(x.device).reshape(x.shape[1:])
        h = (offset + noise.draws.reshape(-1, 1, 1, 1)) % width
        k = (GRID * x.detach().double()).round().long()
        cell = -((2 * h + 1 - 2 * k).div(2 * width, rounding_mode="floor"))  # ceil((k - h - 1/2) / width)
        upper = 2 * (width * cell + h) + 1  # in half levels
        middle = (upper.clamp_max(2 * GRID) + (upper - 2 * width).clamp_min(0)).double() / (4 * GRID)
        return straight_through(middle.to(x.dtype), x)


@dataclass(frozen=True)
class SSN(RandomizedSmoothing):
    """A classifier smoothed by splitting noise, sampled: R = 2 lambda (p - 1/2) in L1.

    The bound is one-sided at alpha, as Cohen's; the published tables use two-sided intervals, which is alpha / 2 here.

    Args:
        classifier: split images, in [0, 1], to logits, in eval mode; it should be trained on splitting noise.
        lam: half the width of a cell; sqrt(3) sigma for the papers' sigma.
        max_rows: noisy images in the classifier at once (keyword).
    """

    lam: float

    norm: ClassVar[str] = "L1"

    def __post_init__(self) -> None:
        check_lam(self.lam)
        super().__post_init__()

    @property
    def perturb(self) -> Splitting:
        return Splitting(self.lam)

    @property
    def stream(self) -> str:
        return f"splitting {float(self.lam)}"

    def radius(self, probability: np.ndarray) -> np.ndarray:
        return 2 * self.lam * (probability - 0.5)

    def probability(self, radius: float) -> float:
        return 0.5 + radius / (2 * self.lam)

    def config(self) -> dict[str, Any]:
        return {"kind": "ssn", "lam": self.lam}


@dataclass(frozen=True)
class DSSN(Certifier):
    """Derandomized splitting noise: the answer over all L draws there are, with an exact L1 radius; never abstains.

    The certificate speaks of images on the grid k/255: of this one and of those it may be perturbed to.
    The answer is the same in any batch and process: rows nearly tied in float32 are decided in float64, and TF32 is
    switched off. (Unless rounding moves a logit by more than a thousandth of the largest.)

    Args:
        classifier: split images, in [0, 1], to logits, in eval mode; it should be trained on this noise.
        lam: half the width of a cell; sqrt(3) sigma for the papers' sigma.
        offset_seed: of the fixed offsets; a classifier is trained for one.
        max_rows: noisy images in the classifier at once.

    Raises:
        ValueError: lambda is below half a level, the classifier is in train mode.
    """

    classifier: nn.Module
    lam: float
    offset_seed: int = 0
    max_rows: int | None = None
    referee: nn.Module = field(init=False, repr=False, compare=False)

    norm: ClassVar[str] = "L1"
    drawn: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_levels(self.lam)
        check_count(self.offset_seed, "offset_seed", 0)
        if self.offset_seed >= 2**32:
            raise ValueError(f"offset_seed must lie in [0, 2^32), got {self.offset_seed}.")
        check_classifier(self.classifier, self.max_rows)
        object.__setattr__(self, "referee", float64_twin(self.classifier))

    @property
    def perturb(self) -> SplittingLevels:
        """The noise."""
        return SplittingLevels(self.lam, self.offset_seed)

    def certify(
        self,
        images: Tensor,
        draws: Draws | None = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Certificate:
        """Certificates of images (N, C, H, W) on the grid; nothing is drawn, the other arguments change nothing.

        Raises:
            ValueError: images off the grid (see :func:`to_grid`).
        """
        noise = keys(images, sample_ids, seed)
        check_grid(images)
        counter = NoisyCounts(self.classifier, self.perturb, self.max_rows, self.referee)
        counts = counter(images, noise, range(self.perturb.levels)).cpu()
        classes, steps = answer_and_steps(counts)
        return Certificate(classes, steps.double() / GRID, counts, counts.sum(1), classes)

    def recompute(self, found: Certificate, draws: Draws) -> Certificate:
        return found  # exact at any alpha

    def reachable(self, draws: Draws) -> float:
        return self.perturb.levels // 2 / GRID

    def covered(self, perturbed: Tensor, image: Tensor, radius: float) -> Tensor:
        """The image on the grid: steps are rounded towards ``image``, and what is left of the radius goes to the pixels
        that lost most."""
        delta = GRID * (perturbed - image).double().flatten()
        steps = delta.trunc()
        lost = delta - steps
        left = max(int(round(GRID * radius) - float(steps.abs().sum())), 0)
        most = lost.abs().argsort(descending=True)[:left]
        steps[most] += lost[most].sign()
        return to_grid(image + (steps / GRID).reshape(image.shape).to(image.dtype))

    def noisy_models(self) -> dict[str, NoisyModel]:
        return {"splitting levels": NoisyModel(self.classifier, self.perturb)}

    def config(self) -> dict[str, Any]:
        return {"kind": "dssn", "lam": self.lam, "offset_seed": self.offset_seed}


def answer_and_steps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """DSSN from counts over all levels, int64 (N, K): the answers (N,), the smallest class on ties, and the radii (N,)
    in steps of the grid: the least over other classes c of floor((n_answer - n_c - [c < answer]) / 2), inclusive."""
    classes = torch.arange(counts.shape[1])
    best = counts.amax(1, keepdim=True)
    answer = torch.where(counts == best, classes, len(classes)).amin(1)
    gap = best - counts - (classes < answer[:, None]).long()
    steps = gap.div(2, rounding_mode="floor")
    own = classes == answer[:, None]
    return answer, steps.masked_fill(own, int(counts.sum(1).max())).amin(1)


def check_grid(images: Tensor) -> None:
    """Raise ValueError unless all values are k/255 up to the rounding of float32."""
    off = (images.double() * GRID - (images.double() * GRID).round()).abs().amax()
    if float(off) > 1e-4:
        raise ValueError(
            f"DSSN certifies images on the grid k/{GRID}; these are off it by up to {float(off):.2g} levels. Use "
            "purify.certify.to_grid(images) first and certify what it returns."
        )


def to_grid(images: Tensor) -> Tensor:
    """The nearest images on the grid k/255: 8-bit images, as floats. Raises ValueError for what are no floats."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Images must be a floating point tensor in [0, 1], got {kind}; divide 8-bit images by 255.")
    return (images.clamp(0, 1) * GRID).round() / GRID
