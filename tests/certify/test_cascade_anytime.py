"""Anytime sampling of cascades: one scale is Cohen's, certificates are true, draws are saved, certificates kept."""

import numpy as np
import pytest
import torch
from conftest import TinyClassifier
from piecewise import Piecewise, holds
from scipy import stats
from torch import nn

from purify.certify import ABSTAIN, Anytime, Cascade, Draws, Smooth
from purify.certify.bounds import betting_bound


class Pieces(nn.Module):
    """A piecewise constant classifier of the only pixel."""

    def __init__(self, line):
        super().__init__()
        self.register_buffer("edges", torch.tensor(line.edges[1:-1]).float())
        self.register_buffer("rows", nn.functional.one_hot(torch.tensor(line.labels), line.classes).float())
        self.eval()

    def forward(self, x):
        return self.rows[torch.bucketize(x.flatten(), self.edges)]


def band(low, high):
    """Class 0 between two edges, 1 below and 2 above."""
    line = Piecewise(np.random.default_rng(0), pieces=3)
    line.edges, line.labels = np.array([-np.inf, low, high, np.inf]), np.array([1, 0, 2])
    return line


def cascade(line, sigmas):
    return Cascade(tuple(Smooth(Pieces(line), s) for s in sigmas))


def test_one_scale_is_cohen(images):
    """Draw for draw, with the looks that each image takes."""
    smooth, draws = Smooth(TinyClassifier(), 0.5), Draws(20, 300, stop=Anytime((0.0, 0.2)))
    found, cohen = Cascade((smooth,)).certify(images, draws, seed=8), smooth.certify(images, draws, seed=8)
    for field in ("classes", "draws", "selected"):
        assert torch.equal(getattr(found, field), getattr(cohen, field))
    torch.testing.assert_close(found.radii, cohen.radii, rtol=1e-12, atol=0)


def test_bounds_by_hand():
    """Two scales, three events at alpha / 3; upper bounds of all three classes share a level."""
    line, alpha = band(0.45, 0.55), 0.003
    found = cascade(line, [0.2, 0.02]).certify(torch.full((1, 1, 1, 1), 0.5), Draws(50, 4000, alpha, Anytime((0.02,))))
    assert (int(found.classes), int(found.stages)) == (0, 1)
    (chosen, passed) = found.passed[0][0]
    others = max(np.delete(passed, 0))
    high = 1 - betting_bound(sum(passed) - others, sum(passed), alpha / 3 / 3)
    low = betting_bound(int(found.counts[0, 0]), int(found.counts.sum()), alpha / 3)
    expected = min(0.02 * stats.norm.ppf(low), -0.2 * stats.norm.ppf(high))
    assert float(found.radii) == pytest.approx(expected, rel=1e-12)
    assert chosen in (0, 1, 2)
    assert int(found.draws) < 2000


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.72), (0.4, 0.65), (0.42, 0.6)])
def test_certificates_are_false_in_at_most_alpha_of_the_runs(low, high):
    """Against the exact cascade, within every radius; images differ in their draws only."""
    line, sigmas, alpha, trials = band(low, high), [0.4, 0.05], 0.1, 250
    draws = Draws(20, 800, alpha, Anytime((0.0, 0.02, 0.05)))
    found = cascade(line, sigmas).certify(torch.full((trials, 1, 1, 1), 0.5), draws, seed=1)
    assert (found.classes != ABSTAIN).sum() > trials / 5
    wrong, known = 0, {}
    for answer, radius in zip(found.classes.tolist(), found.radii.tolist(), strict=True):
        if answer != ABSTAIN:
            key = (answer, radius)
            known[key] = known.get(key) or holds(line, 0.5, Found(answer, radius), sigmas, 0.5)
            wrong += not known[key]
    assert wrong <= stats.binom.ppf(1 - 1e-4, trials, alpha)


class Found:
    def __init__(self, answer, radius):
        self.answer, self.radius = answer, radius


def test_draws_are_saved_and_certificates_kept():
    """Images along the line, from where the large scale answers to where the small one must."""
    x = torch.linspace(0, 1, 41).reshape(-1, 1, 1, 1)
    system, radii = cascade(band(0.44, 0.56), [0.4, 0.03]), (0.0, 0.02)
    full = system.certify(x, Draws(50, 5000))
    found = system.certify(x, Draws(50, 5000, stop=Anytime(radii)))
    assert len(set(found.stages.tolist())) == 2
    assert found.draws.double().mean() < 0.3 * full.draws.double().mean()
    both = (found.classes != ABSTAIN) & (full.classes != ABSTAIN)
    assert torch.equal(found.classes[both], full.classes[both])
    for radius in radii:
        easy = full.radii > radius + 0.005
        assert (found.radii[easy] >= radius).all()
    assert (found.stages <= full.stages.max()).all()


def test_batches_and_order_change_nothing(images):
    ids, draws = torch.arange(7), Draws(20, 400, 0.01, Anytime((0.0, 0.1)))
    whole = Cascade(tuple(Smooth(TinyClassifier(), s) for s in (2.0, 0.3))).certify(images, draws, sample_ids=ids)
    order = torch.tensor([5, 0, 3])
    few = Cascade(tuple(Smooth(TinyClassifier(), s, max_rows=33) for s in (2.0, 0.3)))
    part = few.certify(images[order], draws, sample_ids=ids[order])
    for field in ("classes", "radii", "counts", "draws", "selected", "stages"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[order])
    assert part.passed == [whole.passed[i] for i in order]


def test_radii_that_cannot_be_had_are_refused_before_any_draw(images):
    system = Cascade((Smooth(TinyClassifier(), 0.5), Smooth(TinyClassifier(), 0.1)))
    with pytest.raises(ValueError, match=r"100 draws at alpha 0.001 certify at most 0.6\d* under the cascade, and 3"):
        system.certify(images, Draws(10, 100, stop=Anytime((3.0,))))
    with pytest.raises(ValueError, match="every image would abstain; make at least 13 draws"):
        system.certify(images, Draws(10, 9, stop=Anytime((0.0,))))
    assert system.reachable(Draws(10, 13, stop=Anytime((0.0,)))) > 0
    with pytest.raises(ValueError, match="every image would abstain"):
        system.reachable(Draws(10, 12, stop=Anytime((0.0,))))
