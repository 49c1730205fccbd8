"""CERTIFY and PREDICT against the original programs; soundness against exact Gaussian probabilities in 1-D."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import DATA, TinyClassifier, smooth_model
from scipy import stats
from torch import nn

from purify import DiscreteVP, Noise, ScoreModel
from purify.certify import (
    ABSTAIN,
    DSSN,
    SSN,
    Cascade,
    Draws,
    NoisyCounts,
    OneShotDenoised,
    Smooth,
    denoised_smoothing,
)
from purify.certify.base import predicted
from purify.certify.bounds import lower_bound
from purify.certify.gaussian import Gaussian
from purify.certify.metrics import abstentions, average_certified_radius, certified_accuracy, correct_radii


def cases(name):
    return json.loads((DATA / "certify" / f"{name}.json").read_text())["cases"]


class Step(nn.Module):
    """Class 1 where the only pixel exceeds ``edge``."""

    def __init__(self, edge=0.5):
        super().__init__()
        self.edge = edge
        self.eval()

    def forward(self, x):
        distance = x.flatten(1)[:, :1] - self.edge
        return torch.cat([-distance, distance], 1)


def pixels(value, n):
    return torch.full((n, 1, 1, 1), float(value))


# --- fixtures -----------------------------------------------------------------------------------------------------


def test_bound_and_radius_against_the_original():
    for case in cases("cohen_lcb_radius"):
        bound = lower_bound(case["NA"], case["N"], case["alpha"])
        assert float(bound) == pytest.approx(case["pABar"], rel=1e-9)
        for sigma, (answer, radius) in case["cert"].items():
            assert (answer == ABSTAIN) == bool(bound < 0.5)
            if answer != ABSTAIN:
                assert float(Smooth(Step(), float(sigma)).radius(bound)) == pytest.approx(radius, rel=1e-9)


def test_predict_against_the_original():
    for case in cases("cohen_predict"):
        assert predicted(np.array(case["counts"]), case["alpha"]) == case["pred"]


def test_times_of_sigma_against_the_original():
    for case in cases("sigma_to_t"):
        schedule = getattr(DiscreteVP, case["schedule"])(case["steps"])
        model = ScoreModel(nn.Identity(), schedule)
        denoised = OneShotDenoised(TinyClassifier(), model, case["sigma"])
        t = torch.tensor([denoised.time]).double()
        assert round(denoised.time * case["steps"]) - 1 == case["t_multiscale"]
        assert schedule.alpha(t).item() == pytest.approx(case["sqrt_alphas_cumprod"], rel=1e-7)  # a float32 table
        assert (schedule.sigma(t) / schedule.alpha(t)).item() / 2 == pytest.approx(case["sigma_at_t"], rel=1e-6)


# --- counts -------------------------------------------------------------------------------------------------------


def test_counts_against_a_plain_loop(images):
    classifier, ids = TinyClassifier(), torch.tensor([3, 1, 4, 15, 9, 2, 6])
    noise = Noise.keyed(11, ids)
    got = NoisyCounts(classifier, Gaussian(0.7), max_rows=50)(images, noise, range(5, 45))
    expected = torch.zeros(7, 5, dtype=torch.int64)
    for i in range(7):
        for draw in range(5, 45):
            z = Noise.keyed(11, ids[i : i + 1], draw).stream("certify").normal(0, (1, 4, 4))
            expected[i, classifier(images[i : i + 1] + 0.7 * z).argmax()] += 1
    assert torch.equal(got, expected)


def test_certificates_do_not_depend_on_batch_order_or_rows(images):
    ids = torch.arange(7)
    draws = Draws(20, 200)
    whole = Smooth(TinyClassifier(), 0.5).certify(images, draws, sample_ids=ids, seed=4)
    order = torch.tensor([5, 0, 3])
    part = Smooth(TinyClassifier(), 0.5, max_rows=33).certify(images[order], draws, sample_ids=ids[order], seed=4)
    assert torch.equal(part.counts, whole.counts[order])
    assert torch.equal(part.radii, whole.radii[order])
    other = Smooth(TinyClassifier(), 0.5).certify(images, draws, sample_ids=ids, seed=5)
    assert not torch.equal(other.counts, whole.counts)


def test_the_referee_decides_near_ties():
    """In float32 the logits tie and class 0 would win; in float64 class 1 is larger."""

    class Tied(nn.Module):
        def forward(self, x):
            one = torch.ones(len(x), dtype=x.dtype)
            return torch.stack([one, one + 1e-12], 1)

    noise = Noise.keyed(0, [0])
    plain = NoisyCounts(Tied(), Gaussian(1.0))(pixels(0.5, 1), noise, range(10))
    refereed = NoisyCounts(Tied(), Gaussian(1.0), referee=Tied().double())(pixels(0.5, 1), noise, range(10))
    assert plain.tolist() == [[10, 0]]
    assert refereed.tolist() == [[0, 10]]


def test_nan_and_bad_input_are_refused(images):
    class Broken(TinyClassifier):
        value = float("nan")

        def forward(self, x):
            return super().forward(x).abs() * torch.where(x.sum((1, 2, 3)) > 9, self.value, 1.0)[:, None]

    for Broken.value in (float("nan"), float("inf")):
        sentence = "On noise draw 1 the classifier answers NaN or infinity for sample 0, first in Broken"
        with pytest.raises(ValueError, match=sentence):
            Smooth(Broken(), 0.5).certify(images, Draws(10, 50))
    with pytest.raises(ValueError, match="at least two classes"):
        Smooth(TinyClassifier(classes=1), 0.5).certify(images, Draws(10, 50))
    for alpha in (0.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must lie in"):
            Smooth(TinyClassifier(), 0.5).predict(images, 10, alpha)
    with pytest.raises(ValueError, match="sigma must be a positive number"):
        Smooth(TinyClassifier(), 0.0)
    with pytest.raises(ValueError, match=r"classifier\.eval\(\)"):
        Smooth(TinyClassifier().train(), 0.5)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        Smooth(TinyClassifier(), 0.5).certify(2 * images)
    with pytest.raises(ValueError, match="one per image"):
        Smooth(TinyClassifier(), 0.5).certify(images, sample_ids=torch.arange(3))
    with pytest.raises(ValueError, match="no images"):
        Smooth(TinyClassifier(), 0.5).certify(images[:0])
    for bad in ({"n0": 0}, {"n": 0}, {"alpha": 0.0}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match="must"):
            Draws(**bad)


# --- soundness ----------------------------------------------------------------------------------------------------


def most_failures(trials, alpha):
    """More than this many failures in independent trials that fail with probability alpha: one in 10,000 runs."""
    return stats.binom.ppf(1 - 1e-4, trials, alpha)


def test_failure_rate_is_at_most_alpha():
    """The radius exceeds the exact distance to the smoothed classifier's edge in at most alpha of the runs."""
    trials, alpha, value, sigma = 4000, 0.05, 0.7, 0.5
    distance = value - 0.5  # where Phi((x - 1/2) / sigma) falls to 1/2
    found = Smooth(Step(), sigma).certify(pixels(value, trials), Draws(15, 120, alpha), seed=1)
    failures = ((found.classes == 1) & (found.radii > distance)) | (found.classes == 0)
    assert 0 < int(failures.sum()) <= most_failures(trials, alpha)


def test_radius_is_exact_for_a_half_space():
    """For a half-space the certificate from the exact probability is the distance to its edge."""
    smooth = Smooth(Step(0.3), 0.25)
    for value in (0.35, 0.5, 0.9):
        p = stats.norm.cdf((value - 0.3) / 0.25)
        assert smooth.radius(np.array(p)) == pytest.approx(value - 0.3)
        assert smooth.probability(value - 0.3) == pytest.approx(p)


def test_predict_abstains_at_the_edge_and_answers_elsewhere():
    smooth = Smooth(Step(), 0.25)
    answers = smooth.predict(torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1), 500, seed=2)
    assert answers.tolist() == [0, ABSTAIN, 1]
    wrong = smooth.predict(pixels(0.52, 3000), 100, alpha=0.05) == 0
    assert int(wrong.sum()) <= most_failures(3000, 0.05)


# --- the one-shot denoiser ----------------------------------------------------------------------------------------


def test_one_shot_denoiser_against_the_formula(images):
    """u0_hat of sqrt(abar) (u + 2 sigma z), clipped, in [0, 1]."""
    model, classifier, sigma = smooth_model(), TinyClassifier(), 0.5
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    u = 2 * images - 1
    abar = 1 / (1 + (2 * sigma) ** 2)  # ratio sigma_t / alpha_t = 2 sigma
    t = torch.full((7,), model.schedule.time_of_sigma(2 * sigma)).double()
    u_t = math.sqrt(abar) * (u + 2 * sigma * z)
    u0 = (u_t - math.sqrt(1 - abar) * model.eps(u_t, t)) / math.sqrt(abar)
    expected = classifier((u0.clamp(-1, 1) + 1) / 2)
    got = OneShotDenoised(classifier, model, sigma)(images + sigma * z)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_denoised_smoothing_is_smoothing_of_the_denoised_classifier(images):
    model, classifier = smooth_model(), TinyClassifier()
    got = denoised_smoothing(classifier, model, 0.5, max_rows=64).certify(images, Draws(10, 100), seed=3)
    expected = Smooth(OneShotDenoised(classifier, model, 0.5), 0.5).certify(images, Draws(10, 100), seed=3)
    assert torch.equal(got.counts, expected.counts)
    assert not any(p.requires_grad for p in model.parameters())


# --- metrics ------------------------------------------------------------------------------------------------------


def test_whatever_denoises_will_do(images):
    """A denoiser of one's own, here of a score model's parts, gives that model's logits."""

    class Own(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.network, self.schedule = model.network, model.schedule
            self.denoise = model.denoise

    model = smooth_model()
    expected = OneShotDenoised(TinyClassifier(), model, 0.5)(images)
    assert torch.equal(OneShotDenoised(TinyClassifier(), Own(model), 0.5)(images), expected)
    with pytest.raises(ValueError, match=r"denoiser must be a purify\.ScoreModel, got a TinyClassifier"):
        OneShotDenoised(TinyClassifier(), TinyClassifier(), 0.5)


def test_metrics_by_hand():
    correct = correct_radii(np.array([1, 2, ABSTAIN, 0]), np.array([0.5, 0.8, 0.0, 0.25]), np.array([1, 1, 1, 0]))
    assert correct.tolist() == [0.5, -1, -1, 0.25]
    assert certified_accuracy(correct, [0, 0.25, 0.3, 0.5, 0.6]).tolist() == [0.5, 0.5, 0.25, 0.25, 0]
    assert average_certified_radius(correct) == pytest.approx(0.1875)
    assert abstentions(np.array([1, 2, ABSTAIN, 0])) == 0.25


@pytest.mark.parametrize("n", [20, 60, 1000])
def test_what_draws_can_reach_is_what_a_constant_classifier_gets(n):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.5]).expand(len(x), 3)

    constant, draws = Constant().eval(), Draws(5, n)
    split = SSN(constant, 0.5)
    two = Cascade((Smooth(constant, 0.25), Smooth(constant, 0.5)))
    for certifier in (Smooth(constant, 0.5), split, two, DSSN(constant, 0.1)):
        radii = certifier.certify(torch.zeros(2, 1, 2, 2), draws).radii
        torch.testing.assert_close(radii, torch.full_like(radii, certifier.reachable(draws)))


@pytest.mark.parametrize(("n", "needed"), [(1, 10), (5, 10), (9, 10)])
def test_draws_that_certify_nothing_are_refused_before_any_is_made(n, needed):
    classifier = TinyClassifier()
    classifier.forward = lambda x: pytest.fail("it drew")
    with pytest.raises(ValueError, match=f"every image would abstain; make at least {needed} draws"):
        Smooth(classifier, 0.5).certify(torch.rand(1, 1, 8, 8), Draws(5, n, 0.001))
    assert Smooth(classifier, 0.5).reachable(Draws(5, needed, 0.001)) > 0
    with pytest.raises(ValueError, match=r"a certificate needs 0.7: every image would abstain; make at least 20 draws"):
        Cascade((Smooth(classifier, 0.5),), p0=0.7).certify(torch.rand(1, 1, 8, 8), Draws(5, n))
