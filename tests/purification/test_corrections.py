"""Corrections of the clean estimate: by hand, gradients by finite differences, and what must change nothing."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    assert_finite_differences,
    assert_second_derivative,
    gradient_of_weighted,
    smooth_model,
    weighted,
)
from guided import IDS, assert_scale_zero_is_plain
from torch.nn.functional import cosine_similarity

from purify import FixedDt, FrequencyProjection, ManhattanPull, MediatorPull, Purifier
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, OneShot, ProbabilityFlow, RandomSampling
from purify.purification import cost
from purify.purification.calls import calls
from purify.purification.overshoot import warn_overshoot

RULES = {
    "sde": EulerMaruyama(),
    "ddpm": Ancestral(),
    "ddim": DDIM(0.0),
    "ddim-noisy": DDIM(1.0),
    "ode": ProbabilityFlow("midpoint"),
    "one-shot": OneShot(),
    "random": RandomSampling(),
}
KINDS = {
    "frequency": lambda scale=1.0, **o: FrequencyProjection(scale, amplitude_radius=1.0, phase_radius=1.5, **o),
    "frequency-denoised": lambda scale=1.0, **o: FrequencyProjection(
        scale, amplitude_radius=1.0, phase_radius=1.5, delta=0.1, reference="denoised", reference_t=0.2, **o
    ),
    "mediator": lambda scale=1.0, **o: MediatorPull(6 * scale, **o),
    "manhattan": lambda scale=1.0, **o: ManhattanPull(0.3 * scale, factor=2, **o),
}


def make(kind=None, rule="ddpm", scale=1.0, steps=4, level=0.3, window=None, **options):
    guidance = None if kind is None else KINDS[kind](scale, **(window or {}))
    steps = 1 if rule == "one-shot" else steps
    options = {"clip": False, **options}
    return Purifier(smooth_model(torch.float64), level, RULES[rule], steps, guidance=guidance, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_scale_zero_is_no_correction_bit_for_bit(rule, kind, images):
    assert_scale_zero_is_plain(make, rule, kind, images)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_outside_of_the_window_are_not_corrected(kind, images):
    x = images.double()
    assert torch.equal(make(kind, window={"t_min": 0.3})(x, sample_ids=IDS), make()(x, sample_ids=IDS))
    part = make(kind, window={"t_min": 0.16})(x, sample_ids=IDS)
    assert not torch.equal(part, make(kind)(x, sample_ids=IDS))
    assert not torch.equal(part, make()(x, sample_ids=IDS))


@pytest.mark.parametrize("rule", RULES)
def test_the_corrected_estimate_takes_the_place_of_the_rules_own(rule, images):
    """The same as a step with a network that predicts the corrected estimate; in DDIM the noise stays."""
    model, u = smooth_model(torch.float64).requires_grad_(False), 2 * images.double() - 1
    t, s = torch.full((7,), 0.3, dtype=torch.float64), torch.full((7,), 0.2, dtype=torch.float64)
    look = KINDS["frequency"](0.5).look(u.flip(0), Noise.keyed(0, IDS), 3)
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    prediction, push = look(model, u, t)
    assert push is None
    u0 = model.denoise(u, t) + prediction.added
    projected = KINDS["frequency"]().project((model.denoise(u, t) + 1) / 2, (u.flip(0) + 1) / 2)
    torch.testing.assert_close(u0, 0.5 * model.denoise(u, t) + 0.5 * (2 * projected - 1))
    z = torch.randn_like(u) if RULES[rule].stochastic else None

    class Corrected(torch.nn.Module):
        def forward(self, w, labels):
            at = labels / 1000
            before, noise = look(model, w, at)[0], model.eps(w, at)
            a, b = (f(at).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
            return noise - a / b * before.added

    expected = RULES[rule](type(model)(Corrected(), model.schedule), u, t, s, z)
    if rule.startswith("ddim"):
        plain = RULES[rule](model, u, t, s, z)
        expected = plain + model.schedule.alpha(s).reshape(-1, 1, 1, 1) * prediction.added
    torch.testing.assert_close(RULES[rule](model, u, t, s, z, look), expected)
    torch.testing.assert_close((u - sigma * model.noise(prediction, t)) / alpha, u0)


# --- FreqPure -----------------------------------------------------------------------------------------------------


def by_hand(x, reference, amplitude_radius, phase_radius, delta):
    """The projection of one channel by a loop over frequencies."""
    n, m = x.shape
    f, g = np.fft.fft2(x), np.fft.fft2(reference)
    for i in range(n):
        for j in range(m):
            k = np.hypot(min(i, n - i), min(j, m - j))
            amplitude = abs(g[i, j]) if k <= amplitude_radius else abs(f[i, j])
            phase = np.angle(f[i, j])
            if k <= phase_radius:
                turn = (phase - np.angle(g[i, j]) + np.pi) % (2 * np.pi) - np.pi
                phase = np.angle(g[i, j]) + np.clip(turn, -delta, delta)
            f[i, j] = amplitude * np.exp(1j * phase)
    return np.fft.ifft2(f).real


@pytest.mark.parametrize("radii", [(0.0, 0.0), (1.0, 2.0), (2.5, 1.0), (9.0, 9.0)])
@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_frequencies_by_a_loop(radii, delta):
    x, reference = torch.rand(2, 3, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = FrequencyProjection(1.0, amplitude_radius=radii[0], phase_radius=radii[1], delta=delta).project(
        x, reference
    )
    for row, image, other in zip(found.flatten(0, 1), x.flatten(0, 1), reference.flatten(0, 1), strict=True):
        np.testing.assert_allclose(row, by_hand(image.numpy(), other.numpy(), *radii, delta), atol=1e-12)


def test_all_frequencies_of_the_reference_are_the_reference_and_those_of_the_image_the_image():
    x, reference = torch.rand(2, 3, 1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = FrequencyProjection(1.0, amplitude_radius=9.0, phase_radius=9.0, delta=0.0)
    torch.testing.assert_close(whole.project(x, reference), reference)
    torch.testing.assert_close(whole.project(x, x), x)


def test_blank_images_have_finite_gradients():
    """Their spectrum is 0 but for the mean."""
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(KINDS["frequency"]().project(x, reference).square().sum(), (x, reference))
    assert all(g.isfinite().all() for g in found)


# --- pulls towards the input --------------------------------------------------------------------------------------


def test_the_mediator_is_a_step_down_the_squared_distance(images):
    model, u0, x = smooth_model(torch.float64), images.double(), images.double().flip(0)
    t = torch.linspace(0.1, 0.7, 7, dtype=torch.float64)
    look = MediatorPull(5.0).look(x, Noise.keyed(0, IDS), 1)
    u = model.schedule.alpha(t).reshape(-1, 1, 1, 1) * u0 + 0.1
    prediction, _ = look(model, u, t)
    v = model.denoise(u, t).detach().requires_grad_()
    (slope,) = torch.autograd.grad((v - x).square().flatten(1).mean(1).sum(), v)
    expected = -5 * model.schedule.alpha(t).reshape(-1, 1, 1, 1) * slope
    torch.testing.assert_close(prediction.added, expected)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_mimicdiffusion_steps_down_two_manhattan_distances(factor):
    """Gradients by autograd of the distances; one step under DDIM moves by scale alpha(s) / alpha(t) times them."""
    generator = torch.Generator().manual_seed(0)
    u0, x = (torch.rand(5, 3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t, noise = torch.linspace(0.1, 0.7, 5, dtype=torch.float64), Noise.keyed(0, range(5))
    v = u0.clone().requires_grad_()
    blocks = (v - x).unfold(2, factor, factor).unfold(3, factor, factor).mean((-2, -1))
    long, short = (d.abs().sum(1).flatten(1).mean(1).sum() for d in (v - x, blocks))
    (slope,) = torch.autograd.grad(long + short, v)
    model = smooth_model(torch.float64, 3)
    found = ManhattanPull(1.0, factor=factor).added(model, u0, x, t, noise, 0)
    torch.testing.assert_close(found, -slope / model.schedule.alpha(t).reshape(-1, 1, 1, 1))


def test_softness_gives_signs_a_slope_in_the_backward_pass_alone(images):
    x, hard, soft = images.double(), ManhattanPull(0.3, factor=2), ManhattanPull(0.3, factor=2, softness=0.2)
    make_one = lambda g: Purifier(smooth_model(torch.float64), 0.3, "ddpm", 3, guidance=g, clip=False)  # noqa: E731
    purifiers = [make_one(g) for g in (hard, soft)]
    assert torch.equal(*(p(x, sample_ids=IDS) for p in purifiers))
    assert [p.exact for p in purifiers] == [True, False]
    assert not torch.allclose(*(gradient_of_weighted(p, x) for p in purifiers))
    v = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft.sign(v).sum(), v)
    (expected,) = torch.autograd.grad((v / (v.square() + 0.04).sqrt()).sum(), v)
    torch.testing.assert_close(slope, expected)


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_by_finite_differences(rule, kind, engine, images):
    assert_finite_differences(make(kind, rule, gradient=engine), images.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [{"kind": "checkpoint"}, {"kind": "checkpoint", "memory_budget": 30_000}])
def test_gradients_through_rounds_and_packed_batches(kind, engine, images):
    purifier = make(kind, "sde", steps=FixedDt(0.07, batch=3), rounds=(1.0, 0.5), gradient=engine)
    assert_finite_differences(purifier, images.double())


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_by_finite_differences(kind, images):
    assert_second_derivative(lambda w: weighted(make(kind, steps=2), w), images.double(), 1e-6, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_the_second_order_term_holds_what_is_added_constant(kind, images):
    """With one step the gradient is that of the plain purifier."""
    x = images.double()
    guided = make(kind, steps=1)
    dropped = guided.with_gradient(second_order=False)
    assert torch.equal(dropped(x, sample_ids=IDS), guided(x, sample_ids=IDS))
    plain, found, whole = (gradient_of_weighted(p, x) for p in (make(steps=1), dropped, guided))
    torch.testing.assert_close(found, plain)
    alike = cosine_similarity(whole.flatten(), found.flatten(), 0) > 0.999
    assert alike == (kind == "manhattan")  # signs, whose slope is 0
    assert guided.exact
    assert not dropped.exact


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_comes_back(kind, images):
    purifier = make(kind, window={"t_max": 0.25})
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model(torch.float64))
    assert again.config() == purifier.config()
    assert torch.equal(again(images.double(), sample_ids=IDS), purifier(images.double(), sample_ids=IDS))


def test_what_it_costs_is_counted(images):
    """Network calls of a purification, as its steps make them."""
    for kind in KINDS:
        purifier, seen = make(kind), []
        purifier.score_model.network.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        purifier(images.double(), sample_ids=IDS)
        model = type("Model", (), {"purifier": purifier, "purifications": 1, "classifier": None})()
        assert calls(model).forward == len(seen) + 1
        assert cost.held_bytes(purifier, images[:1].double(), 7) > 0
        assert warn_overshoot(purifier, images.double()) is None  # it moves no mean


def test_inference_mode_is_fine(images):
    with torch.inference_mode():
        make("frequency")(images.double(), sample_ids=IDS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FrequencyProjection(-1.0), "at least 0"),
        (lambda: FrequencyProjection(amplitude_radius=-1.0), "amplitude_radius must be a number of at least 0"),
        (lambda: FrequencyProjection(phase_radius="wide"), "phase_radius must be a number of at least 0"),
        (lambda: FrequencyProjection(delta=4.0), r"an angle in \[0, pi\]"),
        (lambda: FrequencyProjection(reference="output"), "Unknown reference of the frequencies 'output'"),
        (lambda: FrequencyProjection(reference_t=0.0), "reference_t must lie in"),
        (lambda: ManhattanPull(1.0, factor=0), "factor of the short-range distance must be a whole number"),
        (lambda: ManhattanPull(1.0, softness=-1.0), "softness must be a number of at least 0"),
        (lambda: Purifier(smooth_model(), 0.3, guidance=ManhattanPull(1.0, factor=3)), "do not fill images of 4 x 4"),
        (lambda: MediatorPull("much"), "must be a finite number"),
        (lambda: FrequencyProjection(t_min=0.5, t_max=0.5), "t_min < t_max"),
        (lambda: FrequencyProjection(second_order="no"), "must be true or false"),
        (lambda: make("frequency", gradient="adjoint"), "cannot differentiate guidance"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
