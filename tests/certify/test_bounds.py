"""Which interval certificates use, at the edges where libraries differ: exact values in closed form and by mpmath."""

import mpmath
import numpy as np
import pytest
from scipy.stats import binom, binomtest

from purify.certify import ABSTAIN
from purify.certify.base import predicted
from purify.certify.bounds import CAPITAL, betting_bound, lower_bound, upper_bound
from purify.certify.multiscale import MODES, decide

SIZES = [(2, 0.05), (10, 0.001), (1000, 0.001), (100_000, 0.0005)]


def all_but_one_or_more(n, alpha):
    """p at which n - 1 or n of n draws hit with probability alpha: n p^(n-1) - (n-1) p^n = alpha."""
    mpmath.mp.dps = 60
    low, high = mpmath.mpf(0), mpmath.mpf(1)
    for _ in range(180):
        middle = (low + high) / 2
        reached = n * middle ** (n - 1) - (n - 1) * middle**n >= alpha
        low, high = (low, middle) if reached else (middle, high)
    return high


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_one_sided_clopper_pearson_at_the_edges(n, alpha):
    """All of alpha on one side: 0, 1, n - 1 and n of n draws."""
    a, size = mpmath.mpf(alpha), mpmath.mpf(n)
    nearly = all_but_one_or_more(n, a)
    lower = [0, 1 - (1 - a) ** (1 / size), nearly, a ** (1 / size)]
    upper = [1 - a ** (1 / size), 1 - nearly, (1 - a) ** (1 / size), 1]
    hits = np.array([0, 1, n - 1, n])
    np.testing.assert_allclose(lower_bound(hits, n, alpha), [float(v) for v in lower], rtol=1e-12)
    np.testing.assert_allclose(upper_bound(hits, n, alpha), [float(v) for v in upper], rtol=1e-12)


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_the_sides_are_scipys(n, alpha):
    """scipy's alternative "greater" bounds from below; statsmodels' of the same name bounds from above."""
    for hits in (0, 1, n // 2, n - 1, n):
        low, high = (
            binomtest(hits, n, alternative=side).proportion_ci(1 - alpha, "exact") for side in ("greater", "less")
        )
        assert float(lower_bound(hits, n, alpha)) == pytest.approx(low.low, rel=1e-9)
        assert float(upper_bound(hits, n, alpha)) == pytest.approx(high.high, rel=1e-9)


def test_in_between_they_are_clopper_pearsons():
    """At the bound, as many hits or more (fewer) have probability alpha."""
    for k, n, alpha in ((3, 10, 0.01), (700, 1000, 0.001)):
        low, high = (float(b(k, n, alpha)) for b in (lower_bound, upper_bound))
        assert binom.sf(k - 1, n, low) == pytest.approx(alpha)
        assert binom.cdf(k, n, high) == pytest.approx(alpha)


@pytest.mark.parametrize(("n", "alpha"), SIZES[1:])
def test_betting_at_the_edges(n, alpha):
    """No hit, no bound. Unanimous: below the exact bound, above what the first gambler, who stakes all, has alone."""
    assert float(betting_bound(0, n, alpha)) == 0
    alone = (alpha * CAPITAL[0]) ** (1 / n)
    assert alone <= float(betting_bound(n, n, alpha)) <= alpha ** (1 / n)
    assert float(betting_bound(n - 1, n, alpha)) < float(betting_bound(n, n, alpha)) < 1


@pytest.mark.parametrize("mode", MODES)
def test_unanimous_votes_certify_no_more_than_their_draws_allow(mode):
    """No interval shrinks to a point at unanimous votes (one by Sison and Glaz does), in a cascade either."""
    n, alpha = 1000, 0.001
    unanimous = np.array([n, 0, 0])
    level = MODES[mode].level(alpha, 0, 2)
    assert decide([unanimous], [0], [1.0, 0.5], alpha, 0.5, mode).radius == pytest.approx(
        float(mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(level) ** (mpmath.mpf(1) / n) - 1)), rel=1e-9
    )
    other = MODES[mode].highest_other(unanimous, 0, level)
    assert 1 - level ** (1 / n) <= other < 0.05  # at least the bound of a single other class


def test_the_two_sided_test_of_predict_at_the_edges():
    """p-values 2 / 2^n of n against none, and 2 (n + 1) / 2^n of n - 1 against one."""
    n = 12
    for counts, pvalue in (([n, 0], 2 / 2**n), ([n - 1, 1], 2 * (n + 1) / 2**n)):
        assert predicted(np.array(counts), pvalue * 1.001) == 0
        assert predicted(np.array(counts), pvalue * 0.999) == ABSTAIN
