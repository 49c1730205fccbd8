"""Purifications in several rounds, and the configuration of guided ones."""

import json

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from conftest import gradient_of_weighted as gradient
from guided import AUXILIARY, IDS, KINDS, make

from purify import DefendedClassifier, Purifier
from purify.diffusion.noise import Noise
from purify.fingerprint import weights_digest
from purify.purification.gradients import Surrogate
from purify.purification.guidance import AdversarialGuidance, MSEGuidance, SSIMGuidance

# --- rounds -------------------------------------------------------------------------------------------------------


def test_rounds_are_purifications_in_a_row(images):
    """Three rounds are three purifiers that hand their images on, under noise of their own."""
    x = images.double()
    u, noise = 2 * x - 1, Noise.keyed(0, torch.arange(7), 0)
    purifier = make(None, "ddpm", rounds=(1.0, 0.5, 0.25))
    process = purifier.process(torch.full((7,), 0.3, dtype=torch.float64), noise)
    assert [r.diffuse.index for r in process.rounds] == [0, 2**16, 2**17]
    for one_round, level in zip(process.rounds, (0.3, 0.15, 0.075), strict=True):
        torch.testing.assert_close(one_round.diffuse.t, torch.full((7,), level, dtype=torch.float64))
        u = one_round.diffuse(u)
        for step in one_round.reverse:
            u = step(u)
    found = purifier.purify(x, sample_ids=IDS)
    torch.testing.assert_close(found.images, (u + 1) / 2)
    assert found.network_calls.tolist() == [12] * 7


def test_one_round_is_the_default(images):
    assert torch.equal(make(rounds=1)(images.double(), sample_ids=IDS), make()(images.double(), sample_ids=IDS))


def test_surrogate_of_some_rounds_has_the_gradient_of_the_shorter_purifier(images):
    """Two of three rounds with 1 and 2 steps, against the gradient of those rounds alone."""
    x = images.double()
    purifier = make("mse", rounds=(0.5, 0.5, 1.0), gradient=Surrogate((1, 2), (1, 2)))
    whole = make("mse", rounds=(0.5, 0.5, 1.0))
    assert torch.equal(purifier(x, sample_ids=IDS), whole(x, sample_ids=IDS))
    v = x.clone().requires_grad_()
    noise, t = whole.noise(7, x.device, IDS, 1, 3), torch.full((7,), 0.3, dtype=torch.float64)
    parts = [
        Purifier(whole.score_model, 0.3, "ddpm", n, guidance=whole.guidance, rounds=(0.5, 0.5, 1.0), clip=False)
        .process(t, noise, images=2 * v - 1)
        .rounds[j]
        for j, n in ((1, 1), (2, 2))
    ]
    u = 2 * v - 1
    for one_round in parts:
        u = one_round.run(u, lambda step, w: step(w))
    weights = torch.linspace(-1, 1, 16, dtype=x.dtype).reshape(x[0].shape)
    (expected,) = torch.autograd.grad(((u + 1) / 2 * weights).sum(), v)
    torch.testing.assert_close(gradient(purifier, x), expected)


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_comes_back(kind, images):
    purifier = make(kind, rounds=(1.0, 0.5), gradient=Surrogate((1, 2), (0, 1)))
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model(torch.float64), TinyClassifier().double())
    assert again.config() == purifier.config()
    assert torch.equal(again(images.double(), sample_ids=IDS), purifier(images.double(), sample_ids=IDS))


def test_the_auxiliary_network_belongs_to_the_purifier(images):
    purifier = Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=AdversarialGuidance(5.0, auxiliary=TinyClassifier()))
    network = purifier.guidance.auxiliary
    assert not any(p.requires_grad for p in network.parameters())
    purifier.train()
    assert not network.training
    twin = DefendedClassifier(TinyClassifier(), purifier).double()
    assert twin.purifier.guidance.auxiliary.layers[1].weight.dtype == torch.float64
    assert twin(images.double()).dtype == torch.float64


def test_another_auxiliary_network_is_refused():
    purifier = make("agdm")
    other = SmoothNet()
    for network in (None, other):
        with pytest.raises(ValueError, match=weights_digest(AUXILIARY)[:12]):
            Purifier.from_config(purifier.config(), purifier.score_model, network)


def agdm_of(network):
    return Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=AdversarialGuidance(1.0, auxiliary=network))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MSEGuidance(-1.0), "at least 0"),
        (lambda: MSEGuidance(float("nan")), "must be a finite number"),
        (lambda: MSEGuidance(1.0, growth="fast"), "Unknown growth"),
        (lambda: MSEGuidance(1.0, point="u_s"), "Unknown guided point"),
        (lambda: MSEGuidance(1.0, reference="output"), "Unknown guidance reference"),
        (lambda: MSEGuidance(1.0, t_min=0.5, t_max=0.5), "t_min < t_max"),
        (lambda: SSIMGuidance(1.0, sigma=0.0), "finite width above 0"),
        (lambda: AdversarialGuidance(1.0), "needs its auxiliary network"),
        (lambda: AdversarialGuidance(1.0, auxiliary=TinyClassifier(), layer="conv9"), "Unknown layer"),
        (lambda: make("mse", gradient="adjoint"), "cannot differentiate guidance"),
        (lambda: make(rounds=()), "shares of t"),
        (lambda: make(rounds=(0.5, 1.5)), "shares of t"),
        (lambda: make(rounds=0), "rounds"),
        (lambda: make(rounds=2, gradient=Surrogate(1, (2,))), "they are 0 to 1"),
        (lambda: make(rounds=2, gradient=Surrogate((1, 2, 3))), "3 numbers of steps"),
        (lambda: make("mse")(torch.rand(1, 1, 4, 4)), "float64"),
        (lambda: Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=SSIMGuidance(1.0)), "lower sigma"),
        (lambda: MSEGuidance("abc"), "scale of the guidance must be a finite number"),
        (lambda: MSEGuidance(1.0, through_score="False"), "must be true or false"),
        (lambda: agdm_of(TinyClassifier(size=6)), "auxiliary network cannot take images of shape"),
        (lambda: agdm_of(TinyClassifier().double()), "bring both to one type and device"),
        (lambda: make(rounds=0.5), "whole number, or shares"),
        (lambda: make(rounds=257), "256 rounds"),
        (lambda: make(steps=2**16), "65535 steps at most"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
