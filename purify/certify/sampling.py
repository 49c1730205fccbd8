"""How much is drawn for a certificate: always the same, or until the radii asked for are settled."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from purify.certify.bounds import betting_bound, log_wealth, lower_bound, upper_bound
from purify.checks import check_count, is_number, short

# An image leaves once a radius seems out of reach at this level. That may cost an answer, never make one false.
FUTILE = 0.01
FIRST, GROWTH = 8, 1.1  # draws between two looks: at least so many, or a tenth of those made


@dataclass(frozen=True)
class Anytime:
    """Stop drawing for an image once each of ``radii`` is settled: certified, or out of reach.

    The bound is by betting (:func:`~purify.certify.bounds.betting_bound`), true at all looks at once with probability
    1 - alpha, so that stopping at any of them is sound. A radius is given up once an upper bound of the probability
    falls below the share of hits with which all n draws would certify it.

    Args:
        radii: what is asked for, in the certificate's norm; 0: whether there is an answer at all.

    Raises:
        ValueError: no radii, or not numbers of at least 0.
    """

    radii: tuple[float, ...]

    def __post_init__(self) -> None:
        given = self.radii
        if not (isinstance(given, Sequence) and given and all(is_number(r) and r >= 0 for r in given)):
            raise ValueError(f"radii must be numbers of at least 0, as (0.25, 0.5), got {short(given)}.")
        object.__setattr__(self, "radii", tuple(sorted({float(r) for r in given})))


def EarlyStop(radius: Any = 0.0, looks: Any = None) -> Anytime:
    """The old name of :class:`Anytime` with one radius; ``looks`` means nothing any more."""
    sentence = "EarlyStop(radius) is now Anytime((radius,)), which needs no looks; the old name goes with 0.3."
    warnings.warn(sentence, DeprecationWarning, stacklevel=2)
    return Anytime((radius,))


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha`` is a probability of failure below 1/2."""
    if not (is_number(alpha) and 0 < alpha < 0.5):
        raise ValueError(f"alpha must lie in (0, 0.5), got {short(alpha)}.")


@dataclass(frozen=True)
class Draws:
    """How much is drawn, and the probability of failure.

    Args:
        n0: draws that choose the class; at most so many where drawing stops early.
        n: fresh draws that bound its probability; likewise.
        alpha: a certificate is false with probability at most alpha. Bounds are one-sided.
        stop: stops early; None: all draws are made.
    """

    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    stop: Anytime | None = None

    def __post_init__(self) -> None:
        check_count(self.n0, "n0")
        check_count(self.n, "n")
        check_alpha(self.alpha)
        if not isinstance(self.stop, Anytime | None):
            raise ValueError(f"stop must be a purify.certify.Anytime(radii) or None, got {short(self.stop)}.")

    @property
    def looks(self) -> list[int]:
        """Draws after which the bound is looked at, ascending."""
        if self.stop is None:
            return [self.n]
        steps = itertools.accumulate(itertools.repeat(FIRST), lambda made, _: max(made + FIRST, int(made * GROWTH)))
        return [*itertools.takewhile(lambda made: made < self.n, steps), self.n]

    @property
    def selections(self) -> list[int]:
        """Draws after which it is asked whether the class is clear, ascending."""
        if self.stop is None:
            return [self.n0]
        doubled = itertools.accumulate(itertools.repeat(FIRST), lambda made, _: 2 * made)
        return [*itertools.takewhile(lambda made: made < self.n0, doubled), self.n0]

    def bound(self, hits: np.ndarray, made: np.ndarray | int) -> np.ndarray:
        """Lower bound of the class's probability after ``hits`` of ``made`` draws: of all n, or at a look."""
        return (lower_bound if self.stop is None else betting_bound)(hits, made, self.alpha)


class Goals:
    """Which of the radii asked for are still open, of each of N images.

    Args:
        draws: the budget; nothing is asked for if it does not stop early.
        probability: the bound that certifies a radius.
        images: N.
    """

    def __init__(self, draws: Draws, probability: Callable[[float], float], images: int) -> None:
        self.draws = draws
        self.bounds = [] if draws.stop is None else [probability(r) for r in draws.stop.radii]
        every = np.arange(draws.n + 1)
        # Hits among all n draws that certify; n + 1 if none do.
        self.needed = [int(np.append(self._won(every, draws.n, b), True).argmax()) for b in self.bounds]
        self.certified = np.zeros((len(self.bounds), images), bool)

    def _won(self, hits: np.ndarray, made: int, bound: float) -> np.ndarray:
        """Whether hits among the draws made certify the bound."""
        return log_wealth(hits, made, bound) >= -math.log(self.draws.alpha)

    def open(self, rows: np.ndarray, hits: np.ndarray, made: int) -> np.ndarray:
        """Of images ``rows`` with ``hits`` of ``made`` draws, which have a radius neither certified nor given up."""
        n, left = self.draws.n, self.draws.n - made
        values, where = np.unique(hits, return_inverse=True)  # few: as many as draws at most, of any number of images
        high, found = upper_bound(values, made, FUTILE), np.zeros(len(rows), bool)
        for bound, needed, certified in zip(self.bounds, self.needed, self.certified, strict=True):
            certified[rows] |= self._won(values, made, bound)[where]
            found |= ~certified[rows] & ((values + left >= needed) & (high >= needed / n))[where]
        return found


def clear(counts: np.ndarray) -> np.ndarray:
    """Whether the commonest class of counts (N, K) has more than half of the probability, at the level of FUTILE."""
    return lower_bound(counts.max(1), counts.sum(1), FUTILE) > 0.5


def as_draws(draws: Draws | None) -> Draws:
    """The draws asked for, or the default ones.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(draws, Draws | None):
        raise ValueError(f"draws must be a purify.certify.Draws, as Draws(n0=100, n=10_000), got {short(draws)}.")
    return draws or Draws()
