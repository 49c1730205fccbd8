"""Accuracies over repeated purifications, with 95 % intervals.

Input is ``correct`` (N, R): whether sample i was classified right in purification r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:5.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: int, n: int) -> Estimate:
    """Share of successes in n independent trials with Wilson's interval."""
    interval = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, interval.low, interval.high)


def mean_accuracy(correct: np.ndarray, seed: int = 0) -> Estimate:
    """Mean over samples and draws. Bootstrap over samples (percentile), Wilson where all draws of a sample agree."""
    per_sample = correct.mean(1)
    if np.isin(per_sample, (0.0, 1.0)).all():
        return wilson(int(per_sample.sum()), len(per_sample))
    result = stats.bootstrap(
        (per_sample,), np.mean, confidence_level=LEVEL, n_resamples=5000, method="percentile", rng=seed
    )
    return Estimate(float(per_sample.mean()), *map(float, result.confidence_interval))


def any_of_accuracy(correct: np.ndarray) -> Estimate:
    """Share of samples that are right in all R draws: what is left if an attacker may submit R times."""
    return wilson(int(correct.all(1).sum()), len(correct))


def majority_accuracy(predictions: np.ndarray, labels: np.ndarray) -> Estimate:
    """Share of samples whose most frequent prediction (smallest class on ties) is the label."""
    votes = np.array([np.bincount(row).argmax() for row in predictions])
    return wilson(int((votes == labels).sum()), len(labels))


def summarize(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    """The three accuracies of ``predictions`` (N, R)."""
    correct = predictions == labels[:, None]
    return {
        "mean": mean_accuracy(correct),
        "any_of_r": any_of_accuracy(correct),
        "majority": majority_accuracy(predictions, labels),
    }


def worst_case(predictions: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """For each sample the predictions (N, R) of the attack under which it is right least often."""
    stacked = np.stack(predictions)
    accuracy = (stacked == labels[None, :, None]).mean(2)
    return stacked[accuracy.argmin(0), np.arange(len(labels))]
