"""The cascade against the published program, and its soundness against exact Gaussian probabilities in 1-D."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DATA, TinyClassifier
from piecewise import Piecewise, falling, holds
from scipy import stats

from purify import Noise, derive_seed
from purify.certify import ABSTAIN, Anytime, Cascade, Draws, Smooth
from purify.certify.bounds import lower_bound, upper_bound
from purify.certify.multiscale import decide, mixed_logits, pool, reached


def cases(name):
    return json.loads((DATA / "certify" / f"{name}.json").read_text())["cases"]


def run(counts, selected, sigmas, alpha, p0=0.5, mode="strict"):
    """The cascade on counts of all stages."""
    for stage in range(len(counts)):
        seen = [np.array(c) for c in counts[: stage + 1]]
        found = decide(seen, selected[: stage + 1], sigmas, alpha, p0, mode)
        if found is not None:
            return found
    raise AssertionError("the last stage always decides")


def run_case(case, mode):
    return run(
        case["counts_high_sigma_first"], case["selected"], case["sigmas_high_first"], case["alpha"], case["p0"], mode
    )


# --- fixtures -----------------------------------------------------------------------------------------------------


def test_reference_mode_against_the_original():
    for case in cases("cascade"):
        found, expected = run_case(case, "reference"), case["expected"]
        assert found.stage == expected["stage"], case
        if expected["pred"] >= 0:
            assert found.answer == expected["pred"], case
            assert found.radius == pytest.approx(expected["radius"], rel=1e-9), case
        else:
            assert found.answer == ABSTAIN, case
            assert (found.why == "undecided") == (expected["pred"] == -2), case


def test_pooled_bins_against_the_original():
    found = 0
    for case in cases("cascade"):
        for stage in case["expected"]["per_stage"]:
            if stage["reduced_counts"] is not None:
                counts = np.array(case["counts_high_sigma_first"][stage["stage"]])
                assert pool(counts, case["selected"][case["expected"]["stage"]]) == stage["reduced_counts"]
                found += 1
    assert found > 5


def test_strict_never_certifies_more_than_the_reference_where_scales_were_passed():
    """At the first stage, too: alpha / (2K - 1) is less than alpha."""
    passed = 0
    for case in cases("cascade"):
        strict, reference = run_case(case, "strict"), run_case(case, "reference")
        if strict.answer != ABSTAIN and reference.answer != ABSTAIN and strict.stage == reference.stage:
            assert strict.answer == reference.answer
            assert strict.radius < reference.radius or len(case["sigmas_high_first"]) == 1, case
            passed += strict.stage > 0
    assert passed > 3


def test_threshold_above_one_half_is_smaller_in_strict_mode():
    """The fixture with p0 > 1/2."""
    (case,) = (c for c in cases("cascade") if c["p0"] > 0.5)
    assert 0 < run_case(case, "strict").radius < run_case(case, "reference").radius


def test_uncertified_prediction_against_the_original():
    for case in cases("cascade_predict"):
        counts = [np.array(c) for c in case["counts_high_sigma_first"]]
        stage, answer = reached(counts, case["p0"])
        assert (stage, answer) == (case["stage"], case["pred0"])
        logits = np.array(case["clean_logits"])
        outputs = logits if answer == ABSTAIN else mixed_logits(counts[stage], logits, case["unif_w"])
        np.testing.assert_allclose(outputs, case["outputs"], rtol=1e-9)
        assert outputs.argmax() == case["prediction"]


# --- the rule -----------------------------------------------------------------------------------------------------


def test_one_scale_is_cohen(images):
    smooth, draws = Smooth(TinyClassifier(), 0.5), Draws(20, 300)
    cascade = Cascade((smooth,)).certify(images, draws, seed=8)
    cohen = smooth.certify(images, draws, seed=8)
    assert torch.equal(cascade.counts, cohen.counts)
    assert torch.equal(cascade.classes, cohen.classes)
    torch.testing.assert_close(cascade.radii, cohen.radii, rtol=1e-12, atol=0)


def test_strict_bounds_by_hand():
    """Two scales, three events at alpha / 3; two other classes share the upper level."""
    counts = [np.array([250, 400, 350]), np.array([980, 15, 5])]
    found = run(counts, [1, 0], [1.0, 0.5], 0.003)
    low = stats.beta.ppf(0.001, 980, 21)
    high = stats.beta.ppf(1 - 0.0005, 401, 600)
    expected = min(0.5 * stats.norm.ppf(low), -1.0 * stats.norm.ppf(high))
    assert (found.answer, found.stage) == (0, 1)
    assert found.radius == pytest.approx(expected, rel=1e-12)
    assert high == pytest.approx(float(upper_bound(400, 1000, 0.0005)))


def test_the_class_itself_needs_no_bound_at_passed_scales():
    """Halting there would give the same answer: its count does not limit the radius."""
    near = run([[480, 260, 260], [999, 1, 0]], [1, 0], [1.0, 0.5], 0.001)
    far = run([[300, 260, 440], [999, 1, 0]], [1, 0], [1.0, 0.5], 0.001)
    assert near.radius > far.radius > 0


def test_only_images_that_pass_a_scale_are_asked_again():
    """Classes 0 and 1 left and right of a band of class 2: wide noise is undecided in it, narrow noise is not."""

    class Band(torch.nn.Module):
        def forward(self, x):
            v = x.flatten(1)[:, :1]
            return torch.cat([0.45 - v, v - 0.55, 0.05 - (v - 0.5).abs()], 1)

    x = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    small, large = (Smooth(Band().eval(), s) for s in (0.02, 0.4))
    found = Cascade((small, large)).certify(x, Draws(50, 5000), seed=0)
    assert found.classes.tolist() == [0, 2, 1]
    assert found.stages.tolist() == [0, 1, 0]
    assert found.draws.tolist() == [5050, 10100, 5050]
    assert float(found.radii[1]) < 0.05
    # Scales share no noise: each certificate is made of the draws of its own sigma.
    alone = small.certify(x, Draws(50, 5000), seed=0)
    assert torch.equal(found.counts[1], alone.counts[1])


def test_prediction_against_all_stages_at_once(images):
    """Image by image: counts of every scale, the first that reaches p0, and the mixed logits."""
    scales, logits = tuple(Smooth(TinyClassifier(), s) for s in (2.0, 1.0, 0.1)), torch.randn(7, 5).mul(0.3)
    cascade, stages = Cascade(scales, p0=0.6), []
    got = cascade.predict(images, logits, 200, seed=6)
    for i in range(7):
        counts = [
            s.counts(images[i : i + 1], Noise.keyed(derive_seed(6, "predict", s.stream), [i]), range(200))[0].numpy()
            for s in cascade.scales
        ]
        stage, answer = reached(counts, 0.6)
        clean = logits[i].double().numpy()
        assert got[i] == (clean if answer == ABSTAIN else mixed_logits(counts[stage], clean)).argmax()
        stages.append(stage)
    assert len(set(stages)) > 1


def test_bad_input_is_refused(images):
    smooth = Smooth(TinyClassifier(), 0.5)
    for p0 in (0.49, 0.0, 1.0):
        with pytest.raises(ValueError, match=r"p0 must lie in \[1/2, 1\)"):
            Cascade((smooth,), p0)
    with pytest.raises(ValueError, match="different sigmas"):
        Cascade((smooth, smooth))
    with pytest.raises(ValueError, match="at least one scale"):
        Cascade(())
    with pytest.raises(ValueError, match="Unknown cascade mode 'loose'; known: reference, strict"):
        Cascade((smooth,), mode="loose")
    with pytest.raises(ValueError, match="The published program makes all draws; leave anytime sampling out"):
        Cascade((smooth,), mode="reference").certify(images, Draws(stop=Anytime((0.0,))))


# --- soundness ----------------------------------------------------------------------------------------------------


def test_no_change_inside_the_radius():
    """Counts that state the probabilities to seven digits: radii are those of an oracle, up to the bounds' width."""
    rng, answered, later, n = np.random.default_rng(0), 0, 0, 10**8
    while answered < 1000:
        f, x, sigmas, p0 = Piecewise(rng), rng.uniform(-2, 2), falling(rng), rng.choice([0.5, 0.5, 0.6])
        exact = [f.probabilities(np.array([x]), s)[0] for s in sigmas]
        counts = [np.floor(p * n).astype(int) for p in exact]
        found = run(counts, [int(p.argmax()) for p in exact], sigmas, 0.001, p0)
        if found.answer != ABSTAIN:
            assert holds(f, x, found, sigmas, p0)
            answered, later = answered + 1, later + (found.stage > 0)
    assert later > 50  # the passed scales mattered


def test_radii_are_not_needlessly_small():
    """Some oracle radii are tight: just outside, the answer changes."""
    rng, tight, n = np.random.default_rng(1), 0, 10**8
    for _ in range(400):
        f, x, sigmas = Piecewise(rng, classes=2, pieces=2), rng.uniform(-1, 1), falling(rng)
        exact = [f.probabilities(np.array([x]), s)[0] for s in sigmas]
        found = run([np.floor(p * n).astype(int) for p in exact], [int(p.argmax()) for p in exact], sigmas, 0.001)
        if found.answer != ABSTAIN:
            outside = f.cascade(x + 1.01 * (found.radius + 1e-3) * np.array([-1.0, 1.0]), sigmas, 0.5)
            tight += bool((outside != found.answer).any())
    assert tight > 100


def test_below_one_half_the_certificate_is_false():
    """Why p0 < 1/2 is refused: the same search finds violations."""
    rng, wrong, n = np.random.default_rng(2), 0, 10**8
    for _ in range(2000):
        f, x, sigmas, p0 = Piecewise(rng, classes=4, pieces=8), rng.uniform(-2, 2), falling(rng), 0.3
        exact = [f.probabilities(np.array([x]), s)[0] for s in sigmas]
        found = run([np.floor(p * n).astype(int) for p in exact], [int(p.argmax()) for p in exact], sigmas, 0.001, p0)
        wrong += found.answer != ABSTAIN and not holds(f, x, found, sigmas, p0)
    assert wrong > 10


def test_the_passed_scale_bounds_the_radius():
    """A classifier whose smaller scale is sure and whose larger one nearly answers otherwise: the larger one's upper
    bounds, and nothing else, keep the certificate true. Without them all late answers would be false."""
    rng, sigmas, alpha, n = np.random.default_rng(4), [1.0, 0.15], 0.1, 2000
    f = Piecewise(rng)
    f.edges, f.labels = np.array([-np.inf, -0.5, 0.5, 1.0, np.inf]), np.array([0, 1, 0, 2])
    exact = [f.probabilities(np.array([0.0]), s)[0] for s in sigmas]
    late = failures = unbounded = 0
    for _ in range(300):
        drawn = [rng.multinomial(n, p) for p in exact]
        found = run(drawn, [int(p.argmax()) for p in exact], sigmas, alpha)
        if found.answer != ABSTAIN and found.stage == 1:
            late, failures = late + 1, failures + (not holds(f, 0.0, found, sigmas, 0.5))
            own = sigmas[1] * stats.norm.ppf(lower_bound(drawn[1][found.answer], n, alpha / 3))
            unbounded += not holds(f, 0.0, replace(found, radius=own), sigmas, 0.5)
    assert late > 200
    assert failures <= stats.binom.ppf(1 - 1e-4, late, alpha)
    assert unbounded == late


def test_strict_failure_rate_is_at_most_alpha():
    """Monte Carlo with few draws: the certificate is false in at most alpha of the runs, problem by problem."""
    rng, alpha, trials, n, worst = np.random.default_rng(3), 0.1, 2000, 60, 0
    for _ in range(8):
        f, x, sigmas = Piecewise(rng), rng.uniform(-1, 1), [0.8, 0.4, 0.2]
        exact = [f.probabilities(np.array([x]), s)[0] for s in sigmas]
        chosen = [rng.multinomial(20, p, trials).argmax(1) for p in exact]
        drawn = [rng.multinomial(n, p, trials) for p in exact]
        results = {}  # equal counts give equal decisions
        failures = 0
        for i in range(trials):
            key = tuple(int(c[i]) for c in chosen) + tuple(np.concatenate([d[i] for d in drawn]).tolist())
            if key not in results:
                found = run([d[i] for d in drawn], list(key[:3]), sigmas, alpha)
                results[key] = found.answer != ABSTAIN and not holds(f, x, found, sigmas, 0.5)
            failures += results[key]
        worst = max(worst, failures)
        assert failures <= stats.binom.ppf(1 - 1e-4, trials, alpha)
    assert worst > 0


def pooled(others):
    """An independent reading: bins of five or more stay; of the smaller ones, falling, the shortest runs that make five
    become bins; the last bin takes the rest."""
    stay, small = (sorted(filter(keep, others)) for keep in (lambda v: v >= 5, lambda v: v < 5))
    bins = stay[::-1]
    while sum(small) >= 5:
        length = min(k for k in range(1, len(small) + 1) if sum(small[-k:]) >= 5)
        bins.append(sum(small[-length:]))
        del small[-length:]
    if not bins:
        return [sum(small)]
    return [*bins[:-1], bins[-1] + sum(small)]


@pytest.mark.parametrize("others", range(1, 10))
def test_pooling_by_brute_force(others):
    """All counts of up to ten classes, each from none to seven."""
    for counts in itertools.combinations_with_replacement(range(8), others):
        found = pool(np.array([6, *counts]), 0)
        assert found == [6, *pooled(counts)]
        assert sum(found[1:]) == sum(counts)
        assert min(found[1:]) >= min(5, sum(counts))


def test_pooling_is_of_counts_in_any_order_whichever_the_answer():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts, answer = rng.integers(0, 9, 10), int(rng.integers(10))
        assert pool(counts, answer) == [counts[answer], *pooled(np.delete(counts, answer).tolist())]


def test_pooling_as_published():
    """Small counts make bins of their own, the largest first, and leave large bins alone but for the rest."""
    counts = np.array([4000, 2994, 2994, 3, 3, 3, 3, 0, 0, 0])
    assert pool(counts, 0) == [4000, 2994, 2994, 6, 6]
    found = run([counts, [9000, 600, 400, *[0] * 7]], [0, 0], [1.0, 0.5, 0.25], 0.001, mode="reference")
    assert (found.stage, found.radius) == (1, pytest.approx(0.476945, abs=5e-7))
    assert pool(np.array([50, 10, 3, 3, 3]), 0) == [50, 10, 9]
    assert pool(np.array([50, 4, 3, 3, 3, 3]), 0) == [50, 7, 9]
    assert pool(np.array([50, 2, 1]), 0) == [50, 3]
    assert pool(np.array([50, 0, 0]), 0) == [50, 0]


def test_the_published_branch_for_two_bins_would_certify_what_is_false():
    """The example of docs/certify.md: two classes, p0 = 0.6; the large scale chose class 1 (58 %) and was passed, the
    small one answers 0. The branch takes one minus class 1's own lower bound, 44 %, for an upper bound of class 1."""
    rng, sigmas, p0, n, alpha = np.random.default_rng(4), [1.0, 0.1], 0.6, 10_000, 0.001
    f = Piecewise(rng, classes=2, pieces=3)
    f.edges, f.labels = np.array([-np.inf, -0.4, 0.725, np.inf]), np.array([1, 0, 1])
    exact = [f.probabilities(np.array([0.0]), s)[0] for s in sigmas]
    assert exact[0][1] == pytest.approx(0.58, abs=0.002)
    drawn = [np.round(p * n).astype(int) for p in exact]
    found = run(drawn, [1, 0], sigmas, alpha, p0, "reference")
    assert (found.answer, found.stage) == (0, 1)
    assert holds(f, 0.0, found, sigmas, p0)
    high = 1 - lower_bound(drawn[0][1], n, alpha / 2)
    assert high == pytest.approx(0.438, abs=5e-4)
    branch = sigmas[0] * (stats.norm.ppf(p0) - stats.norm.ppf(high))
    own = sigmas[1] * (stats.norm.ppf(lower_bound(drawn[1][0], n, alpha / 2)) - stats.norm.ppf(p0))
    assert not holds(f, 0.0, replace(found, radius=min(branch, own)), sigmas, p0)
