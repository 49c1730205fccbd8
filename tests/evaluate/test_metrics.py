"""Accuracies and intervals by hand and by simulation."""

import numpy as np
import pytest
from scipy import stats

from purify.evaluate.metrics import bootstrap, bounded, difference, estimate, summarize, wilson, worst_case, worst_mean


def test_wilson_by_its_formula():
    k, n, z = 7, 20, stats.norm.ppf(0.975)
    centre = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    estimate = wilson(k, n)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((k / n, centre - half, centre + half))


def test_three_accuracies_by_hand():
    labels = np.array([1, 0, 2])
    predictions = np.array([[1, 1, 1, 1], [0, 0, 0, 3], [2, 2, 1, 1]])
    found = summarize(predictions, labels)
    assert found["mean"].value == pytest.approx((4 + 3 + 2) / 12)
    assert found["any_of_r"].value == pytest.approx(1 / 3)
    assert found["majority"].value == pytest.approx(2 / 3)  # a tie goes to the smaller class


def easy(g, n):
    """Accuracies spread over samples; mean 2/3."""
    return g.beta(2, 1, size=n), 2 / 3


def nearly_all_broken(g, n):
    """A few samples hold, the others are right once in a thousand."""
    return np.where(g.random(n) < 0.007, 1.0, 0.001), 0.007 + 0.993 * 0.001


@pytest.mark.parametrize("law", [easy, nearly_all_broken])
def test_intervals_cover_the_truth(law):
    """95 % intervals hold the mean in about 95 % of 200 simulations, also where a bootstrap would collapse."""
    g = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        p, truth = law(g, 128)
        found = estimate((g.random((128, 10)) < p[:, None]).mean(1))
        hits += found.low <= truth <= found.high
    assert hits / 200 >= 0.9


def test_a_single_sample_has_an_interval():
    found = summarize(np.array([[1, 0, 1]]), np.array([1]))["mean"]
    assert found.low <= 2 / 3 <= found.high


def test_one_draw_falls_back_to_wilson():
    predictions = np.array([[1]] * 8 + [[0]] * 2)
    assert summarize(predictions, np.ones(10, dtype=int))["mean"] == wilson(8, 10)


def test_worst_case_takes_the_worst_attack_of_each_sample():
    labels = np.array([0, 1])
    a, b = np.array([[0, 0, 0, 0], [1, 2, 2, 2]]), np.array([[0, 3, 3, 3], [1, 1, 1, 1]])
    # Whichever draw is left out, the others choose b for sample 0 and a for sample 1, right in 1 of 4 draws each.
    assert worst_case([a, b], labels)["mean"].value == 0.25
    assert worst_case([a, b], labels)["any_of_r"].value == 0.0
    # Right in 3 of 8 but the majority holds, right in 4 of 8 but the majority (a tie) is broken: broken.
    plural, tied = [1, 1, 1, 0, 0, 2, 3, 4], [1, 1, 1, 1, 0, 0, 0, 0]
    found = worst_case([np.array([plural]), np.array([tied])], np.array([1]))
    assert found["majority"].value == 0.0
    assert found["any_of_r"].value == 0.0


def test_worst_mean_by_hand():
    a, b = np.array([[True, False, True]]), np.array([[False, True, True]])
    # Without draw 0: a 1/2, b 1: a, right in draw 0. Without 1: a 1, b 1/2: b, right in 1. Without 2: a tie, both right
    # in 2. That would be 1; either attack alone brings 2/3, which is lower.
    assert worst_mean([a, b]).tolist() == [pytest.approx(2 / 3)]
    # A second sample on which b is much worse settles it: (1 + 0) / 2 against 5/6 and 1/3; then against c.
    c, d = np.vstack([a, [[True] * 3]]), np.vstack([b, [[False] * 3]])
    assert worst_mean([c, d]).tolist() == [pytest.approx(2 / 3), 0.0]
    assert worst_mean([a]).tolist() == [pytest.approx(2 / 3)]  # one attack is its own worst case, for any R
    assert worst_mean([a[:, :1], b[:, :1]]).tolist() == [0.0]  # one draw: the minimum


def test_worst_mean_of_unequal_attacks_is_close_to_the_truth():
    """Each of three attacks breaks some samples; the truth is their minimum per sample."""
    g = np.random.default_rng(1)
    p = g.beta(0.6, 1.5, size=(3, 4000, 1))
    right = [g.random((4000, 20)) < q for q in p]
    truth = p.min(0).mean()
    assert truth - 0.005 < worst_mean(right).mean() < truth + 0.025


def test_choosing_among_equal_attacks_does_not_lower_the_mean():
    """Taking the minimum on the draws that are reported would: here from 0.5 to 0.34."""
    g = np.random.default_rng(0)
    right = [g.random((4000, 10)) < 0.5 for _ in range(4)]
    naive = np.min([r.mean(1) for r in right], axis=0).mean()
    assert naive < 0.36
    assert worst_mean(right).mean() == pytest.approx(0.5, abs=0.01)


def test_the_mean_of_equal_radii_has_an_interval():
    """A law that gives 0.6 with probability p and 0 otherwise: 32 equal radii are likely for p near 1."""
    found = bounded(np.full(32, 0.6), 0.0, np.inf, spread=0.6)
    assert found.value == pytest.approx(0.6)
    assert found.low <= 0.6 * 0.05 ** (1 / 32) < 0.6 <= found.high
    varied = np.linspace(0, 1, 40)
    assert bounded(varied, 0.0, np.inf, 1.0) == bootstrap(varied)


def test_a_difference_that_hardly_varies_gets_an_interval_that_does_not_collapse():
    same = np.ones(30)
    found = difference(same, same)
    assert (found.value, found.low, found.high) == (0.0, pytest.approx(-0.1), pytest.approx(0.1))
    g = np.random.default_rng(0)
    ours, theirs = g.random(200), g.random(200)
    found = difference(ours, theirs)
    half = 1.96 * (ours - theirs).std() / np.sqrt(200)
    assert found.value == pytest.approx((ours - theirs).mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01)
