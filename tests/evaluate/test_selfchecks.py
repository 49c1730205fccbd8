"""Self-checks pass on a sound evaluation and fail where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn

import purify
from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, BPDA, PGD, Adaptive, FirstOrderPGD, RandomNoise, StepsPGD, Transfer
from purify.attacks.norms import BALLS
from purify.data import load_dataset
from purify.evaluate import Defence, RunFolder, Samples, evaluate, selfchecks
from purify.evaluate.metrics import worst_mean
from purify.evaluate.progress import Progress, weight
from purify.evaluate.selfchecks import (
    Recorded,
    accuracy,
    black_box_check,
    checks_work,
    convergence_checks,
    gradient_checks,
    health_checks,
    inexact_check,
    input_gradient,
    self_checks,
)
from purify.purification.calls import calls


@pytest.fixture
def samples():
    images = 0.2 + 0.6 * torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Samples(images, TinyClassifier()(images).argmax(1), torch.arange(16))


def defence(classifier=None, gradient="full", attacks=(), draws=4):
    model = DefendedClassifier(
        (classifier or TinyClassifier()).eval(), diffpure(smooth_model(), 0.1, 4, "ddpm", gradient=gradient)
    )
    return Defence("d", model, list(attacks), draws, {})


def test_exact_gradients_pass_and_approximate_ones_fail(samples):
    for gradient, passes in (("full", True), ("checkpoint", True), ("bpda", False)):
        cosine, zeros = gradient_checks(defence(gradient=gradient), samples, seed=0)
        assert cosine.passed is passes
        assert (cosine.value > 0.9999) is passes
        assert zeros.passed
        assert zeros.value == 0


def test_the_reference_gradient_recomputes_what_does_not_fit(samples, monkeypatch):
    """With room for no graph at all the answer is the same."""
    found = []
    for room in (2**30, 1):
        monkeypatch.setattr(selfchecks, "GRAPHS", room)
        found.append(input_gradient(selfchecks.reference(defence().model), samples, torch.float64, 0))
        calls = []
        double = selfchecks.reference(defence().model)
        double.purifier.score_model.network.register_forward_pre_hook(lambda m, a, calls=calls: calls.append(len(a[0])))
        input_gradient(double, samples, torch.float64, 0)
        assert (len(calls) == 4) if room > 1 else (len(calls) >= 8)
    assert torch.equal(*found)


def test_a_purifier_under_autocast_is_checked_against_one_without(samples):
    model = smooth_model().with_settings(autocast="bfloat16")
    defended = DefendedClassifier(TinyClassifier(), diffpure(model, 0.1, 4, "ddpm"))
    cosine, _ = gradient_checks(Defence("d", defended, [], 4, {}), samples, seed=0)
    assert 0.99 < cosine.value < 1 - 1e-9  # near the float64 gradient, and not it
    assert model.autocast == "bfloat16"


def test_a_score_network_read_wrongly_fails():
    images = load_dataset("digits", "test")[0][:16]
    cases = ({}, [True, True]), ({"prediction": "v"}, [False, False]), ({"time_scale": 1}, [False, False])
    for settings, passed in cases:
        score_model = zoo.score_model("digits").with_settings(**settings)
        found = selfchecks.health(DefendedClassifier(zoo.classifier("digits-standard"), diffpure(score_model)), images)
        checks = health_checks("d", found)
        assert [check.passed for check in checks] == passed
        assert found.images == 8
    assert "fits eps, continuous schedule, labels 1000 t, with" in checks[1].meaning


def test_vanishing_gradients_fail(samples):
    class Saturated(TinyClassifier):
        def forward(self, x):
            return 1e4 * super().forward(x)

    _, zeros = gradient_checks(defence(Saturated()), samples, seed=0)
    assert zeros.passed  # the margin's gradient does not vanish where that of the cross-entropy does

    class Clamped(TinyClassifier):
        def forward(self, x):
            return super().forward(x).clamp(-1e-6, 1e-6)

    _, zeros = gradient_checks(defence(Clamped()), samples, seed=0)
    assert not zeros.passed


def test_one_wrong_gradient_among_many_is_seen(samples, monkeypatch):
    """The right gradients are much larger, so that a cosine over all samples would hardly change."""
    few = samples[torch.arange(4)]

    def wrong(model, these, dtype, seed):
        gradient = input_gradient(model, these, dtype, seed)
        if dtype == torch.float32:
            gradient[0] = 1e-3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
        else:
            gradient[0] *= 1e-3
        return gradient

    monkeypatch.setattr(selfchecks, "input_gradient", wrong)
    cosine, _ = gradient_checks(defence(), few, seed=0)
    assert not cosine.passed


def write(folder, attack, right):
    for i, row in enumerate(right):
        folder.append(
            {"defence": "d", "attack": attack, "sample": i, "label": 1, "predictions": [int(r) for r in row]},
            np.zeros((1, 1, 1), np.float32),
        )


@pytest.mark.parametrize(("white", "black", "passes"), [(0.25, 0.75, True), (0.75, 0.5, False)])
def test_a_black_box_attack_must_not_win(white, black, passes, samples, tmp_path):
    """By records with known accuracies."""
    few = replace(samples[torch.arange(2)], labels=torch.ones(2, dtype=torch.long))
    folder = RunFolder(tmp_path, {}, {})
    for attack, share in (("pgd-eot", white), ("transfer", black)):
        write(folder, attack, [[k < 4 * share for k in range(4)]] * 2)
    write(folder, "random-noise", [[False] * 4] * 2)  # no attack, whatever it breaks
    noise, white_box = RandomNoise("Linf", 0.1), PGD("Linf", 0.1, steps=1, eot=1)
    attacks = [white_box, Transfer("Linf", 0.1, steps=1), noise]
    (check,) = black_box_check(Recorded(folder, defence(attacks=attacks), few), few, 0)
    assert check.passed is passes
    assert check.value == pytest.approx(white - black)
    (missing,) = black_box_check(Recorded(folder, defence(attacks=[white_box, noise]), few), few, 0)
    assert (missing.passed, missing.value) == (False, None)
    assert missing.meaning == "No black-box attack was run; add transfer or square."


class Masked(nn.Module):
    """A classifier whose gradient says nothing: it sees 8-bit images, with a slope of its own making."""

    def __init__(self, slope):
        super().__init__()
        self.inner, self.slope = zoo.classifier("digits-standard"), slope
        self.eval()

    def forward(self, x):
        rounded = (255 * x).round() / 255
        return self.inner(rounded.detach() + self.slope * (x - x.detach()).flip(2))


@pytest.mark.parametrize(
    ("model", "zeros", "black"),
    [
        (zoo.classifier("digits-standard"), True, True),
        (zoo.classifier("digits-at"), True, True),
        (Masked(0.0), False, False),
        (Masked(-1.0), True, False),
    ],
)
def test_models_without_a_purifier_are_asked_for_masked_gradients(model, zeros, black, tmp_path):
    images, labels = (t[:32] for t in load_dataset("digits", "test"))
    samples = Samples(images, labels, torch.arange(32))
    attack = PGD("Linf", 0.15, steps=10, eot=1, random_start=False)
    one = Defence("d", model, [RandomNoise("Linf", 0.15), attack], 1, {})
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [one], samples, progress=False)
    found = self_checks(folder, one, samples, seed=0)
    assert [check.passed for check in found if "zero entries" in check.name] == [zeros]
    assert [check.passed for check in found if "black-box" in check.name] == [black]


@pytest.mark.parametrize(
    ("left", "value", "passes"),
    [
        ({PGD: 0.45, BPDA: 0.40, Transfer: 0.0}, 0.05, True),
        ({PGD: 0.45, FirstOrderPGD: 0.39}, 0.06, False),
        ({PGD: 0.45, APGD: 0.35, FirstOrderPGD: 0.36, BPDA: 0.38}, -0.01, True),
        ({BPDA: 0.4, Transfer: 0.5}, None, False),
    ],
)
def test_an_inexact_gradient_must_not_lead_much_lower(left, value, passes):
    """Black-box attacks have a check of their own; a difference at the limit passes whatever its rounding."""
    (check,) = inexact_check("d", list(left.items()))
    assert check.passed is passes
    assert check.value == (None if value is None else pytest.approx(value))
    assert inexact_check("d", [(PGD, 0.4), (Transfer, 0.1), (RandomNoise, 0.0)]) == []
    (none,) = inexact_check("d", [(PGD, 0.4)], engine_exact=False)
    assert none.value is None
    assert not none.passed


def test_a_loss_at_the_limit_passes_whatever_its_rounding(samples, monkeypatch):
    for after, passes in ((0.5, True), (0.49375, False)):
        found = iter([0.55, after])
        monkeypatch.setattr(selfchecks, "accuracy", lambda *arguments, found=found: next(found))
        (check,) = convergence_checks(defence(attacks=[PGD("Linf", 0.1)], draws=1), samples, seed=0)
        assert check.value > selfchecks.LOST  # 0.55 - 0.5 is 0.050000000000000044
        assert check.passed is passes


def test_a_weak_attack_has_not_converged_and_a_strong_one_has(samples):
    def checks(steps, step_size):
        attack = PGD("Linf", 0.25, steps=steps, eot=4, step_size=step_size, random_start=False, schedule="constant")
        return convergence_checks(defence(attacks=[attack]), samples, seed=0)

    weak, _ = checks(1, 0.06)
    assert not weak.passed
    assert all(check.passed for check in checks(30, 0.05))
    (missing,) = convergence_checks(defence(attacks=[RandomNoise("Linf", 0.1)]), samples, seed=0)
    assert (missing.passed, missing.value) == (False, None)


def test_the_strongest_attack_is_the_one_that_must_have_converged(samples, tmp_path):
    weak, strong = (PGD("Linf", 0.25, steps=s, eot=2, step_size=0.06, schedule="constant") for s in (1, 3))
    strong = BPDA(**{**vars(strong), "loss": "ce"})
    one = defence(attacks=[RandomNoise("Linf", 0.2), weak, strong])
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [one], samples, progress=False)
    recorded = Recorded(folder, one, samples)
    chosen = recorded.strongest([weak, strong])
    left = recorded.accuracy(chosen)
    found = convergence_checks(one, samples, 0, recorded)[0]
    assert left < recorded.accuracy(weak if chosen is strong else strong)
    assert found.value == pytest.approx(left - accuracy(one, replace(chosen, steps=2 * chosen.steps), samples, 0))


def test_all_checks_of_a_run(samples, tmp_path):
    attacks = [RandomNoise("Linf", 0.2), PGD("Linf", 0.2, steps=10, eot=2)]
    one = defence(attacks=attacks)
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [one], samples, progress=False)
    checks = self_checks(folder, one, samples, seed=0)
    assert len(checks) == 7
    assert [check.passed for check in checks if "black-box" in check.name] == [False]  # none was run
    assert len({check.name for check in checks}) == 7
    few = samples[torch.arange(4)]
    assert convergence_checks(one, few, seed=0) == checks[5:]  # found again without the records
    two = replace(one, attacks=[*attacks, BPDA("Linf", 0.2, steps=1, eot=1)])
    evaluate(folder, [two], samples, progress=False)
    (check,) = [c for c in self_checks(folder, two, samples, seed=0) if c.name == selfchecks.INEXACT]
    recorded = Recorded(folder, two, samples)
    assert check.value == recorded.accuracy(attacks[1]) - recorded.accuracy(two.attacks[2])
    assert not [c for c in self_checks(folder, two, samples, seed=0, complete=False) if c.name == selfchecks.INEXACT]


def test_random_noise_is_keyed_and_fills_the_ball(samples):
    for norm, eps in (("Linf", 0.1), ("L2", 0.3), ("L1", 0.8)):
        attack = RandomNoise(norm, eps)
        x, y, ids = samples.images, samples.labels, samples.ids
        whole = attack(TinyClassifier(), x, y, sample_ids=ids).images
        part = attack(TinyClassifier(), x[3:5], y[3:5], sample_ids=ids[3:5]).images
        assert torch.equal(part, whole[3:5])
        size = BALLS[norm].distance(whole - x)
        assert (size <= eps + 1e-6).all()
        assert (size > 0.5 * eps).all()  # the box [0, 1] cuts some off


def test_one_attack_is_its_own_worst_case_whatever_the_number_of_draws():
    right = np.random.default_rng(0).random((50, 5)) < 0.5
    np.testing.assert_allclose(worst_mean([right]), right.mean(1))


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("strongest", [PGD, StepsPGD])  # the latter calls model.details, which has no hooks
def test_the_bar_of_the_checks_counts_their_work(samples, tmp_path, monkeypatch, strongest, complete):
    one = defence(attacks=[RandomNoise("Linf", 0.01), strongest("Linf", 0.3, steps=3, eot=2)])
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [one], samples, progress=False)
    total = checks_work(folder, one, samples, complete)
    seen = []
    monkeypatch.setattr(
        "purify.evaluate.progress.tqdm.update", lambda bar, n: setattr(bar, "n", seen.append(n) or bar.n + n)
    )
    bar = Progress(total, shown=True)
    checks = self_checks(folder, one, samples, 0, complete, bar=bar)
    assert bar.bar.n == pytest.approx(total)
    assert max(seen) < total / 5, (seen, total)
    assert sum(n > 0 for n in seen) > 15
    assert checks == self_checks(folder, one, samples, 0, complete)


@pytest.mark.parametrize("system", ["gdmp", "agdm", "ssni-l"])
def test_the_bar_counts_a_shorter_process_and_a_guide_at_their_own_price(system, monkeypatch):
    """The steps of the adaptive attack's parts add up to the planned work, and no part runs away with it."""
    model = purify.wrap("digits-standard", dataset="digits", purifier=system)
    images, labels = (t[:2] for t in load_dataset("digits", "test"))
    one = Defence("d", model, [Adaptive("Linf", 0.3, calls=2000)], 2, {})
    amount, seen = len(images) * weight(one, one.attacks[0]), []
    monkeypatch.setattr(
        "purify.evaluate.progress.tqdm.update", lambda bar, n: setattr(bar, "n", seen.append(n) or bar.n + n)
    )
    bar = Progress(amount, shown=True)
    with bar.work(one, amount):
        spent = one.attacks[0](model, images, labels).calls
    told = sum(seen[:-1])  # the last is what is left
    judged = len(images) * one.draws * calls(model).forward
    assert 0.8 * float(spent.sum()) <= told <= amount
    assert told <= float(spent.sum()) + judged
