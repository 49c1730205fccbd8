"""Accuracies over repeated purifications, with 95 % intervals.

Input is ``predictions`` (N, R): the class of sample i in purification r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of shares, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:5.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: int, n: int) -> Estimate:
    """Share of successes in n independent trials with Wilson's interval."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, interval.low, interval.high)


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of per-sample values in [0, 1], (N,), with its interval over samples.

    Bootstrap (percentile); where fewer than ten samples differ from the commonest value it would collapse, and
    Wilson's interval at the nearest count, which is wider, takes over. Yes-or-no values always get Wilson's.
    """
    varied = len(values) - np.unique(values, return_counts=True)[1].max()
    if varied < 10 or np.isin(values, (0.0, 1.0)).all():
        interval = wilson(round(float(values.sum())), len(values))
        mean = float(values.mean())
        return Estimate(mean, min(interval.low, mean), max(interval.high, mean))
    return bootstrap(values, seed)


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of per-sample values (N,), of any size and sign, with its percentile bootstrap interval over samples."""
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    options: dict[str, Any] = {"confidence_level": LEVEL, "n_resamples": 5000, "method": "percentile", "rng": seed}
    return Estimate(mean, *map(float, stats.bootstrap((values,), np.mean, **options).confidence_interval))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Mean of ours - theirs over the same samples, (N,) each in [0, 1], with its paired interval."""
    return bounded(ours - theirs, -1.0, 1.0, spread=1.0)


def bounded(values: np.ndarray, low: float, high: float, spread: float) -> Estimate:
    """Mean of per-sample values (N,) in [low, high] with its bootstrap interval.

    Where fewer than ten samples differ from the commonest value it would collapse, and is widened by what was never
    seen: with 95 % confidence less than 3 / N of all samples, each by at most ``spread``.
    """
    found = bootstrap(values)
    if len(values) - np.unique(values, return_counts=True)[1].max() >= 10:
        return found
    unseen = min(3 / len(values), 1.0) * spread
    return Estimate(found.value, max(found.low - unseen, low), min(found.high + unseen, high))


def mean_correct(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of a sample's purifications that are right."""
    return (predictions == labels[:, None]).mean(1)


def all_correct(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether all R are right: what is left if an attacker may submit R times."""
    return (predictions == labels[:, None]).all(1).astype(float)


def majority_correct(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the most frequent prediction (the smallest class on ties) is the label."""
    votes = np.array([np.bincount(row).argmax() for row in predictions])
    return (votes == labels).astype(float)


# Each maps predictions (N, R) and labels (N,) to a value in [0, 1] per sample.
CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": mean_correct,
    "any_of_r": all_correct,
    "majority": majority_correct,
}


def summarize(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    """The three accuracies of ``predictions`` (N, R)."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 2 or predictions.size == 0 or labels.shape != predictions.shape[:1]:
        given = f"{predictions.shape} and {labels.shape}"
        raise ValueError(f"Accuracies need predictions (N, R) of at least one sample, and labels (N,), got {given}.")
    if not all(np.issubdtype(v.dtype, np.integer) for v in (predictions, labels)):
        raise ValueError(f"Predictions and labels must be whole numbers, got {predictions.dtype} and {labels.dtype}.")
    return worst_case([predictions], labels)


def worst_case(predictions: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, Estimate]:
    """The three accuracies if each sample meets the attack that is worst for it; the mean by :func:`worst_mean`.

    Whether all draws are right, or the majority, is said of one attacked image; a sample counts only if it holds
    under every attack.
    """
    worst = {name: np.min([criterion(p, labels) for p in predictions], axis=0) for name, criterion in CRITERIA.items()}
    worst["mean"] = worst_mean([p == labels[:, None] for p in predictions])
    return {name: estimate(values) for name, values in worst.items()}


def aimed_success(predictions: np.ndarray, labels: np.ndarray, wanted: int) -> Estimate | None:
    """Share of the answers to images of other classes that are the class ``wanted``; None without such images."""
    other = labels != wanted
    return estimate((predictions[other] == wanted).mean(1)) if other.any() else None


FOLDS = 10


def worst_mean(right: Sequence[np.ndarray]) -> np.ndarray:
    """Share right per sample (N,) under the attack that is worst for it, from which draws were right (N, R) under each.

    Cross-fitted: the draws are cut into ten parts (fewer if there are fewer draws); the attack is chosen on nine of
    them and scored on the tenth, in turn, so that the luck of the draws that chose it does not count. If the choice is
    so noisy that one attack alone brings the mean lower, that attack is the worst case. With a single draw the minimum
    is taken.
    """
    draws = min(r.shape[1] for r in right)
    if len(right) == 1 or draws < 2:
        return np.min([r.mean(1) for r in right], axis=0)
    stacked = np.stack([r.astype(float) for r in right])  # (attacks, N, R)
    total = np.zeros(stacked.shape[1])
    for fold in range(min(FOLDS, draws)):
        scored = np.zeros(draws, dtype=bool)
        scored[fold::FOLDS] = True
        choosing = stacked[:, :, ~scored].mean(2)
        chosen = np.isclose(choosing, choosing.min(0))  # ties count equally
        total += (stacked[:, :, scored].sum(2) * chosen).sum(0) / chosen.sum(0)
    return min([total / draws, *(r.mean(1) for r in right)], key=np.mean)
