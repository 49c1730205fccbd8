"""Classifiers of the real line whose cascades are known exactly."""

import numpy as np
from scipy import stats

from purify.certify import ABSTAIN


class Piecewise:
    """A random piecewise constant classifier of the real line, whose smoothed probabilities are known exactly."""

    def __init__(self, rng, classes=3, pieces=6):
        self.edges = np.concatenate([[-np.inf], np.sort(rng.uniform(-2, 2, pieces - 1)), [np.inf]])
        self.labels, self.classes = rng.integers(classes, size=pieces), classes

    def probabilities(self, x, sigma):
        """(N,) -> (N, C)."""
        mass = np.diff(stats.norm.cdf((self.edges[None] - x[:, None]) / sigma), axis=1)
        return np.stack([mass[:, self.labels == c].sum(1) for c in range(self.classes)], 1)

    def cascade(self, x, sigmas, p0):
        """The answers of the cascade of true probabilities, ABSTAIN where no class reaches p0 anywhere."""
        answer = np.full(len(x), ABSTAIN)
        for sigma in sigmas:  # falling
            p = self.probabilities(x, sigma)
            halts = (answer == ABSTAIN) & (p.max(1) >= p0)
            answer[halts] = p.argmax(1)[halts]
        return answer


def holds(f, x, found, sigmas, p0):
    """Whether the cascade answers the same at 201 points within the radius."""
    around = x + found.radius * (1 - 1e-9) * np.linspace(-1, 1, 201)
    return bool((f.cascade(around, sigmas, p0) == found.answer).all())


def falling(rng):
    return sorted(rng.uniform(0.1, 1.2, rng.integers(1, 4)), reverse=True)
