"""Clopper-Pearson bounds of a binomial probability: one-sided and exact, float64, for arrays of any shape."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def lower_bound(successes: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """A number that lies above the true probability in at most a share ``alpha`` of all samples; 0 if none hit."""
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    return np.where(k > 0, stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)


def upper_bound(successes: ArrayLike, n: ArrayLike, alpha: float) -> np.ndarray:
    """A number that lies below the true probability in at most a share ``alpha`` of all samples; 1 if all hit."""
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    return np.where(k < n, stats.beta.ppf(1 - alpha, k + 1, np.maximum(n - k, 1)), 1.0)
