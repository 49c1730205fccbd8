"""Anytime sampling: betting against its definition, coverage at the margin by simulation, what it saves and keeps."""

import numpy as np
import pytest
import torch
from conftest import TinyClassifier
from scipy import stats
from torch import nn

from purify.certify import ABSTAIN, SSN, Anytime, Draws, EarlyStop, Smooth
from purify.certify.bounds import CAPITAL, STAKES, betting_bound, log_wealth, lower_bound
from purify.certify.sampling import FUTILE, Goals, clear


class Step(nn.Module):
    """Class 1 where the only pixel exceeds 1/2."""

    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        distance = x.flatten(1)[:, :1] - 0.5
        return torch.cat([-distance, distance], 1)


def pixels(*values):
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def most_failures(trials, alpha):
    """More than this many failures in independent trials that fail with probability alpha: one in 10,000 runs."""
    return stats.binom.ppf(1 - 1e-4, trials, alpha)


# --- the bound ----------------------------------------------------------------------------------------------------


def test_the_wealth_is_that_of_gamblers_who_bet_draw_by_draw():
    rng, p = np.random.default_rng(0), 0.6
    draws = rng.random(50) < 0.8
    capital = CAPITAL.copy()
    for n, hit in enumerate(draws, 1):
        capital *= 1 + STAKES * ((1 - p) / p if hit else -1)
        assert float(log_wealth(draws[:n].sum(), n, p)) == pytest.approx(np.log(capital.sum()))


@pytest.mark.parametrize("odds", [0.5, 0.84, 0.999])
@pytest.mark.parametrize("n", [1, 20, 300])
def test_bets_are_fair_at_their_odds_and_lose_below(n, odds):
    """Over all numbers of hits, exactly: capital stays 1 on average where hits have the probability of the odds."""
    hits = np.arange(n + 1)
    wealth = np.exp(log_wealth(hits, n, odds))
    assert (stats.binom.pmf(hits, n, odds) * wealth).sum() == pytest.approx(1)
    for less in (0.9 * odds, 0.999 * odds):
        assert (stats.binom.pmf(hits, n, less) * wealth).sum() <= 1


def test_the_bound_is_where_the_wealth_is_one_over_alpha():
    assert CAPITAL.sum() == 1
    hits = np.arange(1, 201)
    for alpha in (0.05, 0.001):
        bound = betting_bound(hits, 200, alpha)
        inside = bound > 0
        np.testing.assert_allclose(log_wealth(hits, 200, bound)[inside], -np.log(alpha), atol=1e-9)
        assert (np.diff(bound) >= 0).all()  # more hits, a larger bound
        assert (bound <= lower_bound(hits, 200, alpha)).all()  # one look at all draws could say more
    assert float(betting_bound(0, 10, 0.01)) == 0


# --- coverage -----------------------------------------------------------------------------------------------------


def simulate(p, radii, draws, images, seed=0):
    """Best bounds and draws of images whose class has probability ``p``, by the rule that certificates follow."""
    rng, goals = np.random.default_rng(seed), Goals(draws, lambda r: float(stats.norm.cdf(r)), images)
    hits, spent, best = np.zeros(images, int), np.zeros(images, int), np.zeros(images)
    alive, done = np.arange(images), 0
    for made in draws.looks:
        hits[alive] += rng.binomial(made - done, p, len(alive))
        spent[alive], done = made, made
        values, where = np.unique(hits[alive], return_inverse=True)
        best[alive] = np.maximum(best[alive], draws.bound(values, made)[where])
        alive = alive[goals.open(alive, hits[alive], made)]
        if not len(alive):
            break
    return best, spent


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0, 2.0])
def test_coverage_at_the_margin(radius, alpha):
    """10^5 images whose class has exactly the probability that the radius asked for needs: a bound above it, at any of
    the looks, would certify what is false. Also with radii on both sides, which change when drawing stops."""
    images, p = 100_000, float(stats.norm.cdf(radius))
    for radii in ((radius,), (0.8 * radius, radius, radius + 0.3)):
        draws = Draws(100, 1000, alpha, Anytime(radii))
        best, _ = simulate(p, radii, draws, images)
        assert 0.05 * alpha * images < (best > p).sum() <= alpha * images


def test_looking_often_without_accounting_would_fail():
    """Why it needs a bound of its own: the best of many exact ones at level alpha is wrong far more often."""
    rng, trials, alpha, p = np.random.default_rng(0), 4000, 0.05, 0.65
    hits = (rng.random((trials, 128)) < p).cumsum(1)
    looks = np.array([8, 16, 32, 64, 128])
    wrong = lower_bound(hits[:, looks - 1], looks, alpha).max(1) > p
    right = betting_bound(hits[:, looks - 1], looks, alpha).max(1) > p
    assert wrong.sum() > most_failures(trials, alpha) >= right.sum()


def test_certificates_are_false_in_at_most_alpha_of_the_runs():
    """The radius exceeds the exact distance to the smoothed classifier's edge, 0.2, in at most alpha of the runs."""
    trials, alpha = 1500, 0.05
    found = Smooth(Step(), 0.5).certify(pixels(0.7).repeat(trials, 1, 1, 1), Draws(15, 300, alpha, Anytime((0.1, 0.2))))
    failures = ((found.classes == 1) & (found.radii > 0.2)) | (found.classes == 0)
    assert 0 < int(failures.sum()) <= most_failures(trials, alpha)


# --- draws --------------------------------------------------------------------------------------------------------


def test_it_saves_draws_and_keeps_what_was_asked():
    smooth, n, x = Smooth(Step(), 0.5), 4096, torch.linspace(0, 1, 21).reshape(-1, 1, 1, 1)
    full = smooth.certify(x, Draws(50, n))
    for radii in ((0.0,), (0.3,), (0.0, 0.3)):
        found = smooth.certify(x, Draws(50, n, stop=Anytime(radii)))
        assert found.draws.double().mean() < 0.3 * full.draws.double().mean()
        for radius in radii:  # what all draws certify with room to spare
            easy = full.radii > radius + 0.05
            assert (found.classes[easy] == full.classes[easy]).all()
            assert (found.radii[easy] >= radius).all()
        assert (found.radii <= full.radii + 0.1).all()
    assert (full.draws == 50 + n).all()


def test_hopeless_images_stop_at_once_and_unanimous_ones_when_the_bet_is_won():
    class Fixed(nn.Module):
        def forward(self, x):
            """Class 0 of bright images; of dark ones each of five classes as often."""
            noise = (x.flatten(1)[:, 1] * 1e4).long() % 5
            return torch.eye(5)[torch.where(x.flatten(1)[:, 0] > 0, 0, noise)]

    images = torch.zeros(2, 1, 1, 2)
    images[0, 0, 0, 0] = 1
    found = Smooth(Fixed().eval(), 0.01).certify(images - 0.0, Draws(100, 10_000, stop=Anytime((0.01, 0.02))))
    unanimous = betting_bound(np.array(Draws(stop=Anytime((0.0,))).looks), Draws(stop=Anytime((0.0,))).looks, 0.001)
    first = int((unanimous >= stats.norm.cdf(2)).argmax())
    assert found.draws[0] == 8 + Draws(stop=Anytime((0.0,))).looks[first]
    assert found.classes.tolist()[0] == 0
    assert found.radii[0] >= 0.02


def test_selection_draws_choose_only_and_are_no_more_than_it_takes():
    """Fresh draws bound the probability, from draw n0 on; those that choose end once the class is clear."""
    asked = []

    class Spy(Smooth):
        @property
        def counts(self):
            counter = super().counts

            def count(images, noise, draws):
                asked.append((len(images), draws))
                return counter(images, noise, draws)

            return count

    draws = Draws(40, 500, stop=Anytime((0.25,)))
    found = Spy(Step(), 0.5).certify(pixels(1.0, 0.5, 0.02), draws)
    chosen = [(rows, drawn) for rows, drawn in asked if drawn.start < 40]
    assert [drawn for _, drawn in chosen] == [range(0, 8), range(8, 16), range(16, 32), range(32, 40)][: len(chosen)]
    assert chosen[0][0] == 3
    assert chosen[-1][0] < 3
    assert asked[len(chosen)][1].start == 40
    assert int(found.draws.sum()) == sum(rows * len(drawn) for rows, drawn in asked)
    assert clear(np.array([[8, 0], [7, 1], [4, 4]])).tolist() == [True, False, False]
    assert FUTILE > 0.5**8


def test_batches_and_order_change_nothing(images):
    ids, draws = torch.arange(7), Draws(20, 400, 0.01, Anytime((0.0, 0.2)))
    whole = Smooth(TinyClassifier(), 0.5).certify(images, draws, sample_ids=ids, seed=4)
    order = torch.tensor([5, 0, 3])
    part = Smooth(TinyClassifier(), 0.5, max_rows=33).certify(images[order], draws, sample_ids=ids[order], seed=4)
    for field in ("classes", "radii", "counts", "draws", "selected", "hits"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[order])
    assert torch.equal(whole.hits.amax(1), whole.counts.gather(1, whole.selected[:, None])[:, 0])


def test_splitting_noise_too():
    found = SSN(Step(), 0.25).certify(pixels(0.9, 0.5), Draws(50, 2000, stop=Anytime((0.05, 0.1))))
    assert found.classes[0] == 1
    assert found.radii[0] >= 0.1
    assert (found.draws < 500).all()
    assert found.classes[1] in (0, 1, ABSTAIN)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_radii_that_cannot_be_had_are_refused_before_any_draw():
    smooth = Smooth(TinyClassifier(), 0.5)
    smooth.classifier.forward = lambda x: pytest.fail("it drew")
    with pytest.raises(ValueError, match=r"100 draws at alpha 0.001 certify at most 0.7\d* under this noise"):
        smooth.certify(torch.rand(1, 1, 4, 4), Draws(10, 100, stop=Anytime((3.0, 5.0))))
    with pytest.raises(ValueError, match="every image would abstain; make at least 11 draws"):
        smooth.certify(torch.rand(1, 1, 4, 4), Draws(10, 9, stop=Anytime((0.0,))))
    assert smooth.reachable(Draws(10, 11, stop=Anytime((0.0,)))) > 0
    for bad in ((), 0.5, (0.1, -1), (float("nan"),), "0.5"):
        with pytest.raises(ValueError, match=r"radii must be numbers of at least 0, as \(0.25, 0.5\)"):
            Anytime(bad)


def test_the_old_name_still_works():
    with pytest.warns(DeprecationWarning, match=r"is now Anytime\(\(radius,\)\)"):
        assert EarlyStop(0.25, 4) == Anytime((0.25,))
