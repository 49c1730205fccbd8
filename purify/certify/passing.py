"""When a scale of a cascade has been asked enough, where sampling is anytime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.stats import norm

from purify.certify.bounds import betting_bound, lower_bound, upper_bound
from purify.certify.sampling import FUTILE, Anytime, Draws, Goals


class Passing:
    """Which of N images need more draws at a scale: those for which it may still answer, or reach a radius asked for
    that the scales before allow; and, once it will not answer, those for which it is unclear whether it is passed, or
    which radii the other classes' bounds here leave to smaller scales.

    Args:
        draws: the budget, with the radii asked for.
        level: of each bound.
        classes: how many there are, among which ``level`` is shared by upper bounds.
        sigma, p0: of the scale and the cascade.
        chosen: int (N,), the class that the selection draws chose.
        caps: float (N,), the largest radius that the scales before allow if that class is answered.
        last: whether there is no smaller scale.

    Attributes:
        kept: int (N, classes), the counts that decide: of the look with the best lower bound if that reaches p0, else
            of the last one. All looks hold at once, so any may be chosen.
    """

    def __init__(
        self,
        draws: Draws,
        level: float,
        classes: int,
        sigma: float,
        p0: float,
        chosen: np.ndarray,
        caps: np.ndarray,
        last: bool,
    ) -> None:
        assert draws.stop is not None
        any_radius, edge, n = Anytime((0.0,)), norm.ppf(p0), len(chosen)
        radii = Anytime((0.0, *draws.stop.radii))
        shared = replace(draws, alpha=level / classes, stop=radii)

        def missed(radius: float) -> float:
            """A class stays below p0 within ``radius`` if draws miss it with this probability."""
            return float(norm.cdf(radius / sigma - edge))

        self.answers = Goals(replace(draws, alpha=level, stop=radii), lambda r: float(norm.cdf(edge + r / sigma)), n)
        self.others = Goals(shared, missed, n)
        self.own = Goals(replace(shared, stop=any_radius), missed, n)  # if another class is answered
        for goals in (self.answers, self.others):  # what cannot be had is as good as settled
            goals.certified |= np.array(radii.radii)[:, None] > np.maximum(caps, 0)
        self.looks, self.level, self.p0, self.chosen, self.last = draws.looks, level, p0, chosen, last
        self.kept, self.best = np.zeros((len(chosen), classes), int), np.full(len(chosen), -1.0)

    def __call__(self, rows: np.ndarray, counts: np.ndarray, look: int) -> np.ndarray:
        """Which of images ``rows``, with ``counts`` (len(rows), classes) at a look, need more draws."""
        made, chosen = self.looks[look], self.chosen[rows]
        hits = counts[np.arange(len(rows)), chosen]
        self._keep(rows, counts, betting_bound(hits, made, self.level))
        more = self.answers.open(rows, hits, made)
        if self.last:
            return more
        others = np.where(np.arange(counts.shape[1]) == chosen[:, None], 0, counts).max(1)
        unclear = upper_bound(hits, made, FUTILE) >= self.p0
        unclear |= self.own.open(rows, made - hits, made)
        unclear |= self.others.open(rows, made - others, made)
        passes = ~self.answers.certified[0, rows] & (lower_bound(hits, made, FUTILE) < self.p0)
        return more | (passes & unclear)

    def _keep(self, rows: np.ndarray, counts: np.ndarray, low: np.ndarray) -> None:
        """Keep counts at a look with lower bounds ``low``, unless an earlier one answers with a better bound."""
        better = (low >= self.best[rows]) | (self.best[rows] < self.p0)
        self.kept[rows[better]], self.best[rows[better]] = counts[better], low[better]
