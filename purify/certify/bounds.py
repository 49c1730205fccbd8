"""One-sided bounds of a binomial probability, float64, for arrays of any shape: Clopper-Pearson's, exact at one number
of draws, and one by betting, which may be looked at after every draw."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# The capital is split over gamblers who stake these shares of what they have on every draw. Half of it goes to the
# first, who loses all at the first miss: the unanimous images at the largest radii need most draws, and so they pay
# log(2) for the split. How many draws others take hardly depends on the other stakes.
STAKES = np.array([1.0, 0.97, 0.9, 0.75, 0.5, 0.3, 0.17, 0.1, 0.05])
CAPITAL = np.array([0.5, *[0.5 / 8] * 8])


def lower_bound(successes: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """A number that lies above the true probability in at most a share ``alpha`` of all samples; 0 if none hit."""
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    return np.where(k > 0, stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)


def upper_bound(successes: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """A number that lies below the true probability in at most a share ``alpha`` of all samples; 1 if all hit."""
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    return np.where(k < n, stats.beta.ppf(1 - alpha, k + 1, np.maximum(n - k, 1)), 1.0)


def log_wealth(successes: ArrayLike, n: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Log of what a capital of 1 has become by betting ``n`` times that a draw hits, at odds fair for ``p`` in (0, 1].

    A gambler who stakes the share f multiplies his capital by 1 + f (1 - p) / p at a hit and by 1 - f at a miss:
    on average by 1 if hits have probability p, and by less if they have a smaller one. Falls in ``p``.
    """
    k, n, p = np.broadcast_arrays(*(np.asarray(v, np.float64)[..., None] for v in (successes, n, p)))
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(n > k, (n - k) * np.log1p(-STAKES), 0.0)
    return np.logaddexp.reduce(np.log(CAPITAL) + lost + k * np.log1p(STAKES * (1 - p) / p), axis=-1)


def betting_bound(successes: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """The probability at whose odds the gamblers of :func:`log_wealth` have made 1 / alpha of their capital; 0 if none.

    With probability 1 - alpha it lies below the true one at every n at once (Ville's inequality; Waudby-Smith & Ramdas
    2024, arXiv 2010.09686), so that the largest over all looks does, however they were chosen.
    """
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    low, high = np.zeros(k.shape), np.ones(k.shape)
    for _ in range(60):  # halvings of [0, 1]; the lower end is kept, where they have made it
        middle = (low + high) / 2
        made = log_wealth(k, n, middle) >= -math.log(alpha)
        low, high = np.where(made, middle, low), np.where(made, high, middle)
    return low
