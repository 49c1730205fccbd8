"""NaN and infinity end in one sentence: which network and layer, which sample, step and time; never in an answer."""

import re
from functools import partial

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from torch import nn

from purify import Calibration, ContinuousVP, DefendedClassifier, Purifier, ScoreModel, agdm, gdmp
from purify.certify import Draws, denoised_smoothing
from purify.diffusion.noise import Noise
from purify.finite import clamped, origin
from purify.purification.levels import SSNISigmoid
from purify.purification.plans import FixedDt
from purify.purification.scorenorm import ScoreNorm, calibrate

CLEAN = torch.full((3, 1, 4, 4), 0.5)


class Failing(SmoothNet):
    """Answers ``value`` where a row's label is below ``until`` and its mean is above ``above``."""

    def __init__(self, value=float("nan"), until=60.0, above=-9.0):
        super().__init__()
        self.value, self.until, self.above = value, until, above

    def forward(self, u, labels):
        bad = (labels < self.until) & (u.flatten(1).mean(1) > self.above)
        return torch.where(bad[:, None, None, None], self.value, super().forward(u, labels))


def model(network, **options):
    return ScoreModel(network, ContinuousVP(), image_shape=(1, 4, 4), **options)


STEP = r"gives NaN or infinity for sample 7 in reverse step 3 \(t = 0.05\)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", ["full", "checkpoint", "adjoint", "bpda", "surrogate"])
@pytest.mark.parametrize("rule", ["sde", "ode", {"kind": "ddpm", "clip_denoised": True}], ids=str)
def test_the_step_of_a_network_that_fails_is_named(rule, gradient, value):
    purifier = Purifier(model(Failing(value)), 0.1, rule, 4, gradient=gradient)
    x = CLEAN.clone().requires_grad_()
    with pytest.raises(ValueError, match=f"The score network {STEP}, first in Failing; check"):
        purifier(x, sample_ids=[7, 8, 9])
    with pytest.raises(ValueError, match="for sample 0 in reverse step"):
        purifier(x)


def test_a_round_and_steps_of_ones_own_number_are_named():
    purifier = Purifier(model(Failing(until=31.0)), 0.1, "ddpm", FixedDt(0.03, batch=2), rounds=(1.0, 0.4))
    with pytest.raises(ValueError, match=r"for sample 2 in reverse step 3 of round 1 \(t = 0.03\)"):
        purifier(CLEAN, sample_ids=[2, 1, 0])
    purifier = Purifier(model(Failing(until=21.0)), 0.1, "ddpm", 4, rounds=(1.0, 0.4))
    with pytest.raises(ValueError, match=r"for sample 2 in reverse step 3 of round 2 \(t = 0.02\)"):
        purifier(CLEAN, sample_ids=[2, 1, 0])


def test_the_layer_that_overflows_half_precision_is_named():
    network = SmoothNet()
    with torch.no_grad():
        network.first.weight *= 1e6
    half, full = model(network, autocast="float16"), model(network)
    sentence = "layer 'first' (Conv2d), which overflows float16; use bfloat16 or float32."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Purifier(half, 0.1, "ddpm", 2)(CLEAN)
    assert Purifier(full, 0.1, "ddpm", 2)(CLEAN).isfinite().all()


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.4 and 2.5 have no set_stance")
def test_the_layer_is_named_in_compiled_networks_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    network = SmoothNet()
    purifier = Purifier(model(network), 0.1, "ddpm", 2).with_precision("float32+compile")
    purifier(CLEAN)
    purifier(CLEAN[:1])  # whose graph knows no hooks
    with torch.no_grad():
        network.last.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=re.escape("first in layer 'last' (Conv2d)")):
        purifier(CLEAN)


def test_a_noise_level_that_is_none_is_not_clipped_to_one():
    """An infinite score norm would be the greatest level, and nobody would know."""
    good = smooth_model()
    norm = ScoreNorm(draws=2)
    calibration = calibrate(good, torch.rand(4, 1, 4, 4), norm)
    bad = model(Failing(float("inf"), until=20))
    moved = Calibration(**{**vars(calibration), "score_model": bad.fingerprint()})
    purifier = Purifier(bad, SSNISigmoid(0.1, moved), "ddpm", 2)
    with pytest.raises(ValueError, match="The score network gives NaN or infinity for sample 5, asked for its noise"):
        purifier(CLEAN, sample_ids=[5, 6, 7])
    with pytest.raises(ValueError, match="The score norm of image 0 is NaN or infinite"):
        calibrate(bad, CLEAN + torch.rand(3, 1, 4, 4) / 4, norm)


class Root(nn.Module):
    """An auxiliary network with an infinite slope where the image is its input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head((x - 0.75).flatten(1)) / (x.mean((1, 2, 3)) < 0.7)[:, None]


def test_guidance_and_its_network_are_told_from_the_score_network():
    with pytest.raises(ValueError, match="The auxiliary network gives NaN or infinity for sample 0 in reverse step 1"):
        agdm(smooth_model(), 0.1, 2, auxiliary=Root().eval())(torch.full((2, 1, 4, 4), 0.9))
    with pytest.raises(ValueError, match="The guidance gives NaN or infinity for sample 0 in reverse step"):
        gdmp(smooth_model(), 0.1, 2, rounds=1, scale=1e39)(CLEAN.clone())


class Dead(TinyClassifier):
    def forward(self, x):
        return 0 * super().forward(x)


class Overflowing(TinyClassifier):
    def forward(self, x):
        return super().forward(x).double().exp().pow(1e9)


CLASSIFIERS = {"gives all 5 classes the same logit for sample 4": Dead(), "infinity for sample 4": Overflowing()}


@pytest.mark.parametrize("message", CLASSIFIERS)
@pytest.mark.parametrize("purifications", [1, 2])
def test_an_argmax_of_nothing_is_no_answer(message, purifications):
    defended = DefendedClassifier(CLASSIFIERS[message], Purifier(smooth_model(), 0.1, "ddpm", 2), purifications)
    with pytest.raises(ValueError, match=message):
        defended(CLEAN, sample_ids=[4, 5, 6])


def test_votes_of_two_classes_may_be_even():
    """All vote shares are equal then, and that is an answer."""

    class Coin(TinyClassifier):
        def forward(self, x):
            first = x.flatten(1)[:, 0]
            return torch.stack([first, 1 - first], 1)

    defended = DefendedClassifier(Coin(), Purifier(smooth_model(), 0.9, "ddpm", 2), 2, "votes")
    shares = torch.cat([defended(CLEAN, sample_ids=range(3), draw=draw) for draw in range(8)])
    assert (shares == 0.5).all(1).any()


def test_a_class_may_be_ruled_out():
    class Masked(TinyClassifier):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(5) == 3, -float("inf"))

    assert DefendedClassifier(Masked(), Purifier(smooth_model(), 0.1, "ddpm", 2))(CLEAN).argmax(1).ne(3).all()


def test_a_clipped_denoiser_hides_nothing():
    """Clamping would make a pixel of infinity."""
    smooth = denoised_smoothing(TinyClassifier(), model(Failing(float("inf"), until=999)), 0.25)
    with pytest.raises(ValueError, match=r"On noise draw 0 the classifier .* for sample 0, .*'score_model.network'"):
        smooth.certify(CLEAN, Draws(2, 20))


def test_clamped_and_origin():
    x = torch.tensor([-2.0, 0.5, float("inf"), float("nan")], requires_grad=True)
    y = clamped(x, -1, 1)
    assert y[:2].tolist() == [-1.0, 0.5]
    assert y[2:].isnan().all()
    assert torch.equal(torch.autograd.grad(y[:2].sum(), x)[0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert origin({"it": network}, lambda: network(torch.ones(1, 2))) is None
    with torch.no_grad():
        network[0].weight *= float("inf")
    found = origin({"none": None, "it": network}, lambda: network(torch.ones(1, 2)))
    assert (found.network, found.layer, found.kind) == ("it", "0", "Linear")
    assert Noise.fresh(2)[:1].sample_ids.tolist() == [0]
