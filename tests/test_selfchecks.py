"""Self-checks pass on a sound evaluation and fail where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, diffpure
from purify.attacks import PGD, RandomNoise
from purify.attacks.norms import BALLS
from purify.evaluate import Defence, RunFolder, Samples, evaluate
from purify.evaluate.metrics import worst_mean
from purify.evaluate.selfchecks import black_box_check, convergence_checks, gradient_checks, self_checks


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


def test_vanishing_gradients_fail(samples):
    class Saturated(TinyClassifier):
        def forward(self, x):
            return 1e4 * super().forward(x)

    _, zeros = gradient_checks(defence(Saturated()), samples, seed=0)
    assert not zeros.passed


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
    for attack, share in (("pgd-eot", white), ("random-noise", black)):
        write(folder, attack, [[k < 4 * share for k in range(4)]] * 2)
    attacks = [PGD("Linf", 0.1, steps=1, eot=1), RandomNoise("Linf", 0.1)]
    (check,) = black_box_check(folder, defence(attacks=attacks), few)
    assert check.passed is passes
    assert check.value == pytest.approx(white - black)


def test_a_weak_attack_has_not_converged_and_a_strong_one_has(samples):
    def checks(steps, step_size):
        attack = PGD("Linf", 0.25, steps=steps, eot=4, step_size=step_size, random_start=False, schedule="constant")
        return convergence_checks(defence(attacks=[attack]), samples, seed=0)

    weak, _ = checks(1, 0.06)
    assert not weak.passed
    assert all(check.passed for check in checks(30, 0.05))


def test_all_checks_of_a_run(samples, tmp_path):
    attacks = [RandomNoise("Linf", 0.2), PGD("Linf", 0.2, steps=10, eot=2)]
    one = defence(attacks=attacks)
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [one], samples, progress=False)
    checks = self_checks(folder, one, samples, seed=0)
    assert len(checks) == 5
    assert len({check.name for check in checks}) == 5
    few = samples[torch.arange(4)]
    assert convergence_checks(one, few, seed=0) == checks[3:]  # found again without the records


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
