"""Attacks that know SSNI: what they differentiate, what they reach, and where they do not apply."""

import copy
import math

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, SSNILinear, SSNISigmoid, calibrate, diffpure, zoo
from purify.attacks import (
    ATTACKS,
    PGD,
    AutoAttackRand,
    ConstantLevelAutoAttackRand,
    ConstantLevelPGD,
    LowLevelPGD,
    NormAutoAttackRand,
    NormPGD,
)
from purify.attacks.protocols import VARYING_LEVEL
from purify.cli.attack import main
from purify.diffusion.noise import derive_seed

BUDGET = {"norm": "Linf", "eps": 0.2, "steps": 4, "eot": 2}


def defended(kind=SSNISigmoid, **options):
    model = smooth_model()
    found = calibrate(model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    return DefendedClassifier(TinyClassifier(), diffpure(model, kind(0.4, found, **options), 4, "ddpm"))


def renamed(kind, name):
    """The attack under another name, and so another derived seed."""
    return type("Renamed", (kind,), {"name": name, "needs": None})


@pytest.mark.parametrize(
    ("held", "plain", "budget"),
    [
        (ConstantLevelPGD, PGD, BUDGET),
        (ConstantLevelAutoAttackRand, AutoAttackRand, {"norm": "Linf", "eps": 0.2, "steps": 3, "eot": 2}),
    ],
)
def test_constant_level_attacks_are_the_plain_ones_with_t_star_held(held, plain, budget, images, labels):
    model = defended()
    expected = renamed(plain, held.name)(**budget)(model.with_gradient(through_level=False), images, labels)
    found = held(**budget)(model, images, labels)
    assert torch.equal(found.images, expected.images)
    through = renamed(plain, held.name)(**budget)(model, images, labels)
    assert not torch.equal(found.images, through.images)


def test_the_gradient_through_the_level_is_in_the_plain_attack(images, labels):
    """One evaluation of PGD against the gradient of the mean loss, taken by hand."""
    model, attack = defended(), PGD(**BUDGET, loss="ce")
    _, (gradient,) = attack._eot(attack.target(model, images, labels, torch.arange(7), 3), images, 0)
    v = images.clone().requires_grad_()
    losses = [
        torch.nn.functional.cross_entropy(model(v, sample_ids=range(7), draw=d, seed=3), labels, reduction="sum")
        for d in range(2)
    ]
    (expected,) = torch.autograd.grad(sum(losses) / 2, v)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.7, -0.7])
def test_direction_of_the_norm_attack(weight):
    """Unit vectors of both gradients, mixed, of unit length."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 1, 2, 2, generator=g) for _ in range(2))
    got = NormPGD("Linf", 0.1, norm_weight=weight).direction([a, b], torch.zeros_like(a), torch.zeros_like(a))
    for i in range(3):
        mixed = a[i] / a[i].norm() - weight * b[i] / b[i].norm()
        torch.testing.assert_close(got[i], mixed / mixed.norm(), rtol=1e-5, atol=1e-6)


def test_the_norm_attack_lowers_or_raises_the_statistic(images, labels):
    model = defended(SSNILinear)

    def statistic(weight):
        attack = NormPGD(**{**BUDGET, "steps": 12}, norm_weight=weight)
        ids = torch.arange(7)
        last = list(attack._iterates(attack.target(model, images, labels, ids, 0), 0, images))[-1][0]
        return model.details(last, sample_ids=range(7), draw=50).statistic.mean(1)

    low, neutral, high = (statistic(w) for w in (5.0, 0.0, -5.0))
    assert (low < neutral - 0.1).all()
    assert (high > neutral + 0.1).all()


def test_the_norm_attack_starts_clean_and_keeps_to_the_ball(images, labels):
    for norm, eps in (("Linf", 0.1), ("L2", 0.5), ("L1", 1.0)):
        attack = NormPGD(norm, eps, steps=3, eot=2)
        assert attack.mean_step(images) == pytest.approx(eps * (4 if norm == "Linf" else 1) / 6)
        assert attack.first(defended(), images, labels, torch.arange(7), 0) is images
        delta = (attack(defended(), images, labels).images - images).flatten(1)
        size = {"Linf": delta.abs().amax(1), "L2": delta.norm(dim=1), "L1": delta.abs().sum(1)}[norm]
        assert (size <= eps + 1e-5).all()


@pytest.mark.parametrize("weight", [0.7, -0.7])
def test_autoattack_on_the_norm_differentiates_a_mixture(weight, images, labels):
    """One gradient of what AutoAttack sees, against both gradients taken by hand on the same draw."""
    model = defended()
    lowering = NormAutoAttackRand(**BUDGET, norm_weight=weight).attacked(model)
    v = images.clone().requires_grad_()

    def gradient(term):
        torch.manual_seed(5)
        return torch.autograd.grad(term().sum(), v)[0]

    torch.manual_seed(5)
    logits = lowering(v)
    torch.manual_seed(5)
    assert torch.equal(logits, model(images))
    (got,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), v)
    loss = gradient(lambda: torch.nn.functional.cross_entropy(model(v), labels, reduction="sum"))
    statistic = gradient(lambda: model.details(v).statistic)
    length, other = (g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for g in (loss, statistic))
    torch.testing.assert_close(got, loss - weight * length * statistic / other, rtol=1e-4, atol=1e-6)


def test_autoattack_on_the_norm_without_weight_is_autoattack(images):
    model = defended()
    labels = torch.stack([model(images, sample_ids=range(7), draw=d) for d in range(20)]).mean(0).argmax(1)
    budget = {"norm": "L2", "eps": 3.0, "steps": 6, "eot": 2}
    plain = renamed(AutoAttackRand, NormAutoAttackRand.name)(**budget)(model, images, labels).images
    found = {w: NormAutoAttackRand(**budget, norm_weight=w)(model, images, labels).images for w in (0.0, 3.0, -3.0)}
    torch.testing.assert_close(found[0.0], plain, rtol=0, atol=1e-4)
    attacked = (plain != images).flatten(1).any(1)
    assert attacked.any()
    low, high = (model.details(found[w], sample_ids=range(7), draw=50).statistic.mean() for w in (3.0, -3.0))
    assert low < high


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_low_level_attack_climbs_at_a_share_of_the_level(share, images, labels):
    """The gradient is that of a purifier whose own rule gives that share; the value is the true loss."""
    bounds = {"t_min": 0.01, "t_max": 0.3}
    model, attack = defended(SSNILinear, **bounds), LowLevelPGD(**BUDGET, share=share)
    rule = model.purifier.level
    lower = SSNILinear(share * rule.t_star, rule.calibration, **{k: share * v for k, v in bounds.items()})
    twin = DefendedClassifier(model.classifier, diffpure(model.purifier.score_model, lower, 4, "ddpm"))
    keys = images, labels, torch.arange(7)
    value, (gradient, statistic) = attack._eot(attack.target(model, *keys, 3), images, 0)
    plain = NormPGD(**BUDGET)
    expected, (_, same) = plain._eot(plain.target(model, *keys, 3), images, 0)
    _, (below, _) = plain._eot(plain.target(twin, *keys, 3), images, 0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(statistic, same)
    torch.testing.assert_close(gradient, below, rtol=1e-4, atol=1e-6)
    last, none = attack._eot(attack.target(model, *keys, 3), images, 0, False)
    assert none == []
    torch.testing.assert_close(last, expected)
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            LowLevelPGD(**BUDGET, share=bad)


def test_the_low_level_attack_takes_the_rule_as_it_is(images, labels, monkeypatch):
    """The calibration was checked when the purifier was built: not again in a float64 copy, nor at every batch."""
    model, attack = defended(), LowLevelPGD("Linf", 0.2, steps=1, eot=1)
    images, labels = images[:2], labels[:2]
    single = attack(model, images, labels)
    double = attack(copy.deepcopy(model).double(), images.double(), labels)
    torch.testing.assert_close(double.loss.float(), single.loss, rtol=0, atol=1e-2)
    monkeypatch.setattr("purify.diffusion.score.weights_digest", None)
    assert torch.equal(attack(model, images, labels).images, single.images)
    other = diffpure(smooth_model().with_settings(time_scale=999), 0.4, 4, "ddpm")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="calibrated with another score model"):
        other.with_level(model.purifier.level)


@pytest.mark.parametrize("kind", [PGD, ConstantLevelPGD, NormPGD, LowLevelPGD])
def test_results_do_not_depend_on_batch_or_chunks(kind, images, labels):
    model, ids = defended(), torch.arange(7)
    whole = kind(**BUDGET)(model, images, labels, sample_ids=ids).images
    parts = [
        kind(**BUDGET, max_rows=3)(model, images[r], labels[r], sample_ids=ids[r]).images
        for r in (torch.tensor([6, 2]), torch.tensor([0, 1, 3, 4, 5]))
    ]
    torch.testing.assert_close(torch.cat(parts), whole[[6, 2, 0, 1, 3, 4, 5]], rtol=0, atol=1e-4)


def test_level_attacks_apply_to_varying_levels_only(images, labels):
    constant = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"))
    names = [name for name, attack in ATTACKS.items() if attack.needs is VARYING_LEVEL]
    assert len(names) == 5
    for name in names:
        attack = ATTACKS[name]("Linf", 0.1)
        assert attack.applies_to(defended())
        for model in (constant, TinyClassifier()):
            assert not attack.applies_to(model)
            with pytest.raises(ValueError, match="for a model that chooses a noise level for each image"):
                attack(model, images, labels)
    assert PGD("Linf", 0.1).applies_to(TinyClassifier())


def test_weights_have_labels_of_their_own():
    assert NormPGD("Linf", 0.1, norm_weight=0.5).label == "pgd-eot-norm(0.5)"
    assert NormPGD("Linf", 0.1, norm_weight=0.5).budget()["norm_weight"] == 0.5
    assert derive_seed(0, "pgd-eot") != derive_seed(0, "pgd-eot-norm")
    assert NormAutoAttackRand("Linf", 0.1, norm_weight=0.5).label == "autoattack-rand-norm(0.5)"
    for kind in (NormPGD, NormAutoAttackRand):
        with pytest.raises(ValueError, match="norm_weight must be a finite number"):
            kind("Linf", 0.1, norm_weight=math.nan)


# --- on the command line ------------------------------------------------------------------------------------------

OTHER = ["--score-model", "digits-calibrated"]
DIGITS = str(zoo.CALIBRATIONS / "digits.json")
SMALL = ["--n-examples", "6", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--calls", "100"]


def test_the_benchmark_shows_diffpure_and_ssni_side_by_side(tmp_path, capsys):
    levels = ["--noise-level", "constant,ssni-l,ssni-n", "--norm-weights", "0.3,1", "--steps", "3"]
    assert main([*SMALL, *levels, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    rows = ["diffpure ", "diffpure ssni-l", "diffpure ssni-n", "adversarial training", "pgd-eot-norm(1)", "mean t*"]
    assert all(row in out for row in rows)
    assert (tmp_path / "run" / "samples-diffpure-ssni-n.png").exists()


def test_the_benchmark_steps_by_dt(tmp_path):
    arguments = ["--noise-level", "ssni-n", "--dt", "0.05", "--attacks", "pgd-eot"]
    assert main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise-level", "ssni"], "Unknown noise level 'ssni' (did you mean 'ssni-n'?); known: constant"),
        (["--noise-level", "ssni-n", "--ssni-tau", "0"], "tau must be a positive number"),
        (["--noise-level", "ssni-l", "--calibration", "nowhere.json"], "cannot be read as a calibration"),
        (["--noise-level", "constant", "--attacks", "pgd-eot-norm"], "None of the attacks pgd-eot-norm says anything"),
        (["--norm-weights", "a"], "--norm-weights takes numbers"),
        (["--dt", "0"], "dt must lie in"),
        ([*OTHER, "--calibration", DIGITS, "--noise-level", "ssni-l"], "another score model"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    assert main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
