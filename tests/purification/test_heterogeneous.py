"""Heterogeneous noise: the mask and a step by hand, exact gradients, and what must change nothing."""

import json

import pytest
import torch
from conftest import (
    TinyClassifier,
    TinyConvolutions,
    assert_finite_differences,
    assert_second_derivative,
    smooth_model,
    weighted,
)
from torch.nn.functional import interpolate

from purify import FixedDt, HeterogeneousNoise, Purifier
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, OneShot, ProbabilityFlow
from purify.purification.calls import calls

IDS = range(7)
RULES = {
    "sde": EulerMaruyama(),
    "ddpm": Ancestral(),
    "ddim": DDIM(0.0),
    "ode": ProbabilityFlow("midpoint"),
    "one-shot": OneShot(),
}


def noise_of(**options):
    return HeterogeneousNoise(auxiliary=TinyConvolutions().double(), **{"threshold": 0.7, "resample": 0.01, **options})


def make(rule="ddpm", steps=4, level=0.3, guidance=None, **options):
    steps = 1 if rule == "one-shot" else steps
    return Purifier(smooth_model(torch.float64), level, RULES[rule], steps, guidance=guidance, clip=False, **options)


def test_the_mask_by_hand(images):
    """Squares summed over channels, brought to the image's size and range, the greatest over layers."""
    x, network = images.double(), TinyConvolutions().double()
    early = network.first(x).relu()
    late = network.second(early).relu()
    expected = torch.zeros(7, 1, 4, 4, dtype=torch.float64)
    for i in range(7):
        for layer in (early, late):
            one = interpolate(layer[i : i + 1].square().sum(1, keepdim=True), size=(4, 4), mode="bilinear")[0]
            expected[i] = expected[i].maximum((one - one.min()) / (one.max() - one.min()))
    found = noise_of().attention(x)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    bound = noise_of().bind(2 * x - 1)
    assert torch.equal(bound[:, 1:], (expected >= 0.7).double())
    assert torch.equal(bound[:, :1], 2 * x - 1)
    one_layer = noise_of(layers=("late",)).attention(x)
    assert not torch.allclose(one_layer, found)


@pytest.mark.parametrize("rule", RULES)
def test_what_must_change_nothing(rule, images):
    """Scale 0, a mask that covers all, and a weak level that no step ends above."""
    x, plain = images.double(), make(rule)(images.double(), sample_ids=IDS)
    for options in ({"scale": 0}, {"threshold": 0.0, "resample": 0.0}, {"t_weak": 0.31}, {"t_min": 0.3}):
        assert torch.equal(make(rule, guidance=noise_of(**options))(x, sample_ids=IDS), plain)
    if rule != "one-shot":  # whose only step ends at 0
        assert not torch.equal(make(rule, guidance=noise_of())(x, sample_ids=IDS), plain)


def test_a_step_by_hand():
    """Outside of the mask the state is the input, diffused anew; all of it is diffused on to the later time."""
    model, noise, guidance = smooth_model(torch.float64), Noise.keyed(0, [3, 5]), noise_of(t_weak=0.15)
    u, images = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([0.3, 0.2]).double(), torch.tensor([0.2, 0.1]).double()
    bound = guidance.bind(images)
    state, later = guidance.enter(model, s, bound, noise, 4)(u, t)
    assert later.tolist() == pytest.approx([0.31, 0.2])  # the second step ends below the weak level
    assert torch.equal(state[1], u[1])
    first, second = noise.stream("guidance").normal(4, (2, 1, 4, 4), u.dtype)[0]
    alpha, sigma = model.schedule.alpha, model.schedule.sigma
    mask = bound[0, 1:]
    mixed = mask * u[0] + (1 - mask) * (alpha(t[0]) * images[0] + sigma(t[0]) * first)
    kept = alpha(later[0]) / alpha(t[0])
    torch.testing.assert_close(state[0], kept * mixed + (1 - kept**2).sqrt() * second)


def test_variance_is_preserved():
    """Pixels of either kind have the marginal of their time: alpha^2 of the image, sigma^2 of noise."""
    model, guidance = smooth_model(torch.float64), noise_of(t_weak=0.0, resample=0.05)
    n = 4000
    images = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 1, 4, 4).expand(n, -1, -1, -1)
    t = torch.full((n,), 0.3, dtype=torch.float64)
    alpha, sigma = model.schedule.alpha(t)[0], model.schedule.sigma(t)[0]
    u = alpha * images + sigma * torch.randn(
        images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    state, later = guidance.enter(model, t / 2, guidance.bind(images), Noise.keyed(0, range(n)), 1)(u, t)
    residual = state - model.schedule.alpha(later)[0] * images
    assert residual.mean(0).abs().max() < 0.06
    torch.testing.assert_close(residual.var(0), model.schedule.variance(later)[0].expand(1, 4, 4), rtol=0.1, atol=0)


@pytest.mark.parametrize("engine", ["full", "checkpoint", {"kind": "checkpoint", "memory_budget": 30_000}])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_by_finite_differences(rule, engine, images):
    assert_finite_differences(make(rule, guidance=noise_of(), gradient=engine), images.double(), h=1e-6)


def test_gradients_of_packed_batches_and_second_derivatives(images):
    x = images.double()
    packed = make("sde", FixedDt(0.07, batch=3), guidance=noise_of(), rounds=(1.0, 0.7), gradient="checkpoint")
    assert_finite_differences(packed, x, h=1e-6)
    assert_second_derivative(lambda w: weighted(make(guidance=noise_of(), gradient="checkpoint"), w), x, 1e-6, 1e-5)


def test_configuration_and_calls(images):
    purifier = make(guidance=noise_of(layers=["late"]))
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model(torch.float64), TinyConvolutions().double())
    assert again.config() == purifier.config()
    assert torch.equal(again(images.double(), sample_ids=IDS), purifier(images.double(), sample_ids=IDS))
    model = type("Model", (), {"purifier": purifier, "purifications": 1, "classifier": None})()
    assert calls(model).forward == 4 + 1 + 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeterogeneousNoise(), "pass auxiliary="),
        (lambda: noise_of(scale=0.5), "scale 1, or 0 for none"),
        (lambda: noise_of(threshold=1.5), r"threshold of heterogeneous noise must lie in \[0, 1\]"),
        (lambda: noise_of(t_weak="low"), "t_weak of heterogeneous noise"),
        (lambda: noise_of(resample=-1.0), "resample of heterogeneous noise"),
        (lambda: noise_of(layers=("third",)), "Unknown layer of the auxiliary network 'third'"),
        (lambda: make(guidance=HeterogeneousNoise(auxiliary=TinyClassifier().double())), "None of these layers"),
        (lambda: make(guidance=HeterogeneousNoise(auxiliary=TinyConvolutions())), "cannot look at images of shape"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
