"""PGD+EOT against closed-form optima and loops; projections against brute force; independence from the batch."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import Linear, TinyClassifier, smooth_model
from scipy.optimize import minimize

from purify import DefendedClassifier, diffpure
from purify.attacks import (
    APGD,
    ATTACKS,
    BPDA,
    PGD,
    AutoAttackRand,
    LowFrequencyPGD,
    RandomNoise,
    Square,
    StepsPGD,
    SurrogatePGD,
    Transfer,
)
from purify.attacks.counting import heard
from purify.attacks.norms import BALLS, L1Ball
from purify.attacks.pgd import LOSSES, STEP_SCHEDULES

NORMS = ("Linf", "L2", "L1")
EPS = {"Linf": 0.1, "L2": 0.5, "L1": 1.2}


def defended(t_star=0.3, **kwargs):
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), t_star, 4, "ddpm", **kwargs))


# --- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_inside_and_leaves_inner_points_alone(norm):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 3, 3, generator=g)
    z = x + 0.5 * torch.randn(x.shape, generator=g)
    p = BALLS[norm].project(z, x, EPS[norm])
    assert (BALLS[norm].distance(p - x) <= EPS[norm] + 1e-5).all()
    assert p.min() >= 0
    assert p.max() <= 1
    torch.testing.assert_close(BALLS[norm].project(p, x, EPS[norm]), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "room"), [("L1", lambda d: 0.7 - d.sum()), ("L2", lambda d: 0.7**2 - (d**2).sum())])
def test_projection_is_the_nearest_point_of_ball_and_box(norm, room):
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.rand(1, 1, 2, 3, generator=g, dtype=torch.float64)
        z = x + torch.randn(x.shape, generator=g, dtype=torch.float64)
        p = BALLS[norm].project(z, x, 0.7)
        xv, zv = x.flatten().numpy(), z.flatten().numpy()
        # Split into positive and negative parts: a smooth problem that scipy solves.
        bounds = [(0, 1 - a) for a in xv] + [(0, a) for a in xv]
        best = minimize(
            lambda d, xv=xv, zv=zv: ((xv + d[:6] - d[6:] - zv) ** 2).sum(),
            np.full(12, 1e-3),
            bounds=bounds,
            constraints={"type": "ineq", "fun": room},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert ((p - z) ** 2).sum().item() == pytest.approx(best.fun, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_directions_are_unit_ascent_and_scale_free(norm):
    gradient = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    z = torch.full_like(gradient, 0.5)
    ball = BALLS[norm]
    x = z - 0.1 * (torch.arange(16).reshape(4, 4) < 6)  # L1: four pixels move
    d = ball.direction(gradient, z, x)
    torch.testing.assert_close(ball.distance(d), torch.ones(5))
    assert ((d * gradient).flatten(1).sum(1) > 0).all()
    torch.testing.assert_close(ball.direction(gradient * 1e-30, z, x), d)
    assert (ball.direction(torch.zeros_like(z), z, x) == 0).all()


def test_l1_direction_skips_pixels_that_cannot_move():
    gradient = torch.tensor([[[[5.0, 1.0], [-4.0, 0.5]]]])
    z = torch.tensor([[[[1.0, 0.5], [0.0, 0.5]]]])
    assert BALLS["L1"].direction(gradient, z, z).flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_l1_direction_moves_two_thirds_as_many_pixels_as_have_moved():
    """Of each sample's own; a twentieth of all pixels where none has."""
    gradient = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    x, moved = torch.full_like(gradient, 0.5), torch.tensor([0, 1, 9, 25])
    z = x + 0.1 * (torch.arange(25) < moved[:, None]).reshape(x.shape)
    d = L1Ball(sparsity=None).direction(gradient, z, x).flatten(1)
    for i, count in enumerate((1, 1, 6, 17)):
        largest = gradient[i].flatten().abs().argsort(descending=True)[:count]
        expected = torch.zeros(25)
        expected[largest] = gradient[i].flatten()[largest].sign() / count
        torch.testing.assert_close(d[i], expected)


# --- optima -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", STEP_SCHEDULES)
@pytest.mark.parametrize("norm", NORMS)
def test_reaches_the_optimum_of_a_linear_classifier(norm, schedule):
    model = Linear()
    x = torch.full((3, 1, 4, 4), 0.5)
    result = PGD(norm, 0.2, steps=100, eot=1, schedule=schedule)(model, x, torch.ones(3, dtype=torch.int64))
    drop = ((x - result.images).flatten(1) @ model.w).tolist()
    dual = {"Linf": model.w.abs().sum(), "L2": model.w.norm(), "L1": model.w.abs().max()}[norm]
    assert drop == pytest.approx([0.2 * dual.item()] * 3, rel=1e-3)
    assert max(drop) <= 0.2 * dual.item() * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_breaks_a_tiny_classifier(loss, images, labels):
    model = TinyClassifier().requires_grad_(False)
    y = model(images).argmax(1)
    result = PGD("Linf", 0.4, steps=30, eot=1, loss=loss)(model, images, y)
    assert (model(result.images).argmax(1) == y).float().mean() <= 0.3


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    assert LOSSES["margin"](logits, torch.tensor([0])).item() == -2.0
    assert LOSSES["margin"](logits, torch.tensor([2])).item() == 3.0
    assert LOSSES["dlr"](logits, torch.tensor([0])).item() == pytest.approx(-2 / 3)


def test_all_schedules_walk_equally_far():
    for shape in STEP_SCHEDULES.values():
        assert np.mean([shape(i / 1000) for i in range(1000)]) == pytest.approx(1, abs=2e-3)


# --- EOT ----------------------------------------------------------------------------------------------------------


def test_eot_is_the_mean_over_draws(images, labels):
    """One batched evaluation equals a loop over single draws."""
    model = defended()
    attack = PGD("Linf", 0.1, steps=3, eot=4, loss="ce")
    ids = torch.arange(7)

    loss, (gradient,) = attack._eot(attack.target(model, images, labels, ids, 5), images, 8)
    losses, gradients = [], []
    for draw in range(8, 12):
        x = images.clone().requires_grad_()
        each = LOSSES["ce"](model(x, sample_ids=ids, draw=draw, seed=5), labels)
        losses.append(each.detach())
        gradients.append(torch.autograd.grad(each.sum(), x)[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.stack(gradients).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_samples_result_does_not_depend_on_the_batch(norm, images, labels):
    model = defended()
    attack = PGD(norm, EPS[norm], steps=5, eot=3, restarts=2)
    whole = attack(model, images, labels, sample_ids=torch.arange(7), seed=4)
    order = torch.tensor([4, 0, 6])
    part = attack(model, images[order], labels[order], sample_ids=order, seed=4)
    torch.testing.assert_close(part.images, whole.images[order], rtol=0, atol=2e-5)
    few_rows = dataclasses.replace(attack, max_rows=5)(model, images, labels, sample_ids=torch.arange(7), seed=4)
    torch.testing.assert_close(few_rows.images, whole.images, rtol=0, atol=2e-5)
    other = attack(model, images, labels, sample_ids=torch.arange(7), seed=5)
    assert not torch.allclose(other.images, whole.images)


def test_the_best_iterate_is_returned(images, labels):
    """Its loss is at least that of every iterate, and is the loss at the returned image for the same draws."""
    model = defended()
    attack = PGD("Linf", 0.2, steps=6, eot=2, restarts=2)
    seen = []

    class Spy(PGD):
        def _iterates(self, *args):
            for z, loss in super()._iterates(*args):
                seen.append((z, loss))
                yield z, loss

    result = Spy(**{f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)})(model, images, labels)
    losses = torch.stack([loss for _, loss in seen])
    assert len(seen) == 2 * 7
    assert torch.equal(result.loss, losses.amax(0))
    for i, k in enumerate(losses.argmax(0)):
        assert torch.equal(result.images[i], seen[k][0][i])
    assert (losses.argmax(0) != len(seen) - 1).any()


def test_the_attack_beats_random_noise_and_its_images_are_valid(images):
    model = defended(0.1)
    y = torch.stack([model(images, sample_ids=range(7), draw=k) for k in range(20)]).mean(0).argmax(1)
    result = PGD("Linf", 0.3, steps=15, eot=4)(model, images, y)
    noise = (images + 0.3 * torch.randn_like(images).sign()).clamp(0, 1)

    def accuracy(x):
        right = [model(x, sample_ids=range(7), draw=k, seed=99).argmax(1) == y for k in range(20)]
        return torch.stack(right).float().mean().item()

    assert accuracy(result.images) < accuracy(noise) - 0.2
    assert (result.images - images).abs().max() <= 0.3 + 1e-6
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_eps_zero_returns_the_image(images, labels):
    for norm in NORMS:
        assert torch.equal(PGD(norm, 0.0, steps=2, eot=1)(defended(), images, labels).images, images)


def test_start_at_the_clean_image(images, labels):
    attack = PGD("Linf", 0.1, steps=1, eot=1, random_start=False)
    asked = TinyClassifier(), images, labels, torch.arange(7), 0
    first, _ = next(attack._iterates(attack.target(*asked), 0, attack.first(*asked)))
    assert torch.equal(first, images)


# --- gradient attacks on other engines ----------------------------------------------------------------------------


def test_bpda_and_surrogate_are_pgd_on_another_gradient(images, labels):
    model = defended()
    settings = {"norm": "Linf", "eps": 0.2, "steps": 4, "eot": 2}
    for kind, engine in ((BPDA, "bpda"), (SurrogatePGD, "surrogate")):

        class Renamed(PGD):
            name = kind.name  # the same derived seed

        expected = Renamed(**settings)(model.with_gradient(engine), images, labels)
        assert torch.equal(kind(**settings)(model, images, labels).images, expected.images)
        assert not torch.equal(expected.images, PGD(**settings)(model, images, labels).images)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD("Linf", -0.1), "eps must be a number of at least 0"),
        (lambda: PGD("L3", 0.1), "Unknown threat model 'L3'; known: Linf, L2, L1"),
        (lambda: PGD("Linf", 0.1, steps=0), "attack steps must be"),
        (lambda: PGD("Linf", 0.1, eot=0), "EOT draws must be"),
        (lambda: PGD("Linf", 0.1, restarts=0), "restarts must be"),
        (lambda: PGD("Linf", True), "eps must be a number"),
        (lambda: PGD("Linf", 0.1, max_rows=0), "max_rows must be"),
        (lambda: PGD("Linf", 0.1, step_size=-1.0), "step_size must be a positive number"),
        (lambda: PGD("Linf", 0.1, loss="mse"), "Unknown attack loss 'mse'; known: ce, dlr, margin"),
        (lambda: PGD("Linf", 0.1, schedule="wild"), "Unknown step-size schedule"),
        (lambda: ATTACKS["autoattack-rand"]("Linf", 0.1, steps=0), "attack steps must be"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_input(images, labels):
    attack = PGD("Linf", 0.1, steps=1, eot=1)
    with pytest.raises(ValueError, match="lie in"):
        attack(TinyClassifier(), images * 2, labels)
    with pytest.raises(ValueError, match="one label per image"):
        attack(TinyClassifier(), images, labels[:3])
    with pytest.raises(ValueError, match="integer tensor"):
        attack(TinyClassifier(), images, labels.float())
    with pytest.raises(ValueError, match="7 images but 3 sample_ids"):
        attack(TinyClassifier(), images, labels, sample_ids=torch.arange(3))
    with pytest.raises(ValueError, match="for a model that has a purifier; this one does not, use pgd-eot"):
        BPDA("Linf", 0.1, steps=1)(TinyClassifier(), images, labels)
    with pytest.raises(ValueError, match="train mode"):
        attack(TinyClassifier().train(), images, labels)
    with pytest.raises(ValueError, match=r"at most 1, got 8\.0; divide it by 255"):
        PGD("Linf", 8.0)
    with pytest.raises(ValueError, match="at least three classes"):
        PGD("Linf", 0.1, steps=1, loss="dlr")(Linear(), images, torch.ones(7, dtype=torch.int64))


def test_labels_that_the_model_does_not_know(images):
    with pytest.raises(ValueError, match="classes 0 to 4, got 0 to 5"):
        PGD("Linf", 0.1, steps=1, eot=1)(defended(), images, torch.tensor([0, 5, 0, 0, 0, 0, 0]))


def test_a_model_that_gives_nan_is_named(images, labels):
    class Broken(TinyClassifier):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(torch.arange(len(x))[:, None] == 2, float("nan"), logits)

    with pytest.raises(ValueError, match="The model answers NaN or infinity for sample 12"):
        PGD("Linf", 0.1, steps=1, eot=1)(Broken(), images, labels, sample_ids=torch.arange(10, 17))


@pytest.mark.parametrize(
    "attack",
    [
        PGD("Linf", 0.1, steps=3, eot=2, restarts=2, max_rows=3),
        APGD("Linf", 0.1, steps=3, eot=2),
        LowFrequencyPGD("Linf", 0.1, steps=3, eot=2),
        Transfer("Linf", 0.1, steps=3),
        StepsPGD("Linf", 0.1, steps=3, eot=2),
        AutoAttackRand("Linf", 0.1, steps=2, eot=2),
        Square("Linf", 0.1, queries=5),
    ],
    ids=lambda a: a.name,
)
def test_the_bar_of_an_attack_counts_its_gradients(attack, capsys):
    """Libraries skip images that are broken; all others are counted to the last."""
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.1, 2, "ddpm"))
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = TinyClassifier()(x).argmax(1)
    counts = []
    with heard(lambda rows, each: counts.append(rows)):
        quiet = attack(model, x, y)
    assert capsys.readouterr().err == ""
    assert sum(counts) > 0
    if attack.group_size is None:
        assert sum(counts) == 4 * attack.counted
    shown = attack(model, x, y, progress=True)
    bar = capsys.readouterr().err
    assert attack.label in bar
    assert "100%" in bar
    assert torch.equal(quiet.images, shown.images)


def test_there_is_no_bar_where_nothing_is_counted(capsys):
    x = torch.rand(2, 1, 4, 4)
    RandomNoise("Linf", 0.1)(TinyClassifier(), x, torch.zeros(2).long(), progress=True)
    PGD("Linf", 0.1)(TinyClassifier(), x[:0], torch.zeros(0).long(), progress=True)
    assert capsys.readouterr().err == ""
