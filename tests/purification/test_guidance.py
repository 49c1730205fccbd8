"""Guidance: steps by hand, and what must change nothing."""

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model
from conftest import gradient_of_weighted as gradient
from guided import IDS, KINDS, RULES, assert_scale_zero_is_plain, make
from torch import nn

from purify import Purifier
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, OneShot, ProbabilityFlow
from purify.diffusion.score import Prediction, ScoreModel
from purify.purification.guidance import AdversarialGuidance, Guide, MSEGuidance, SSIMGuidance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_scale_zero_is_no_guidance_bit_for_bit(rule, kind, images):
    assert_scale_zero_is_plain(make, rule, kind, images)


class Deaf(nn.Module):
    """Logits that do not depend on the image."""

    def forward(self, x):
        return torch.ones(len(x), 3, dtype=x.dtype)


class Blind(nn.Module):
    """Constant logits that are part of a graph."""

    def forward(self, x):
        return 0 * x.flatten(1)[:, :3] + 1


@pytest.mark.filterwarnings("ignore:The guidance has no gradient")
@pytest.mark.parametrize("network", [Deaf(), Blind()])
@pytest.mark.parametrize("rule", RULES)
def test_a_constant_network_is_no_guidance_bit_for_bit(rule, network, images):
    x = images.double()
    guidance = AdversarialGuidance(100.0, auxiliary=network)
    guided = Purifier(smooth_model(torch.float64), 0.3, RULES[rule], 4, guidance=guidance, clip=False)
    assert torch.equal(guided(x, sample_ids=IDS), make(None, rule)(x, sample_ids=IDS))
    torch.testing.assert_close(gradient(guided, x), gradient(make(None, rule), x), rtol=1e-12, atol=1e-14)


def test_a_stochastic_step_by_hand():
    """The mean moves by -s Sigma grad D, with grad D = 2 (u_t - u_adv_t) / d."""
    model, noise = smooth_model(torch.float64), Noise.keyed(0, [3, 5])
    u, source = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.3, 0.2]).double(), torch.tensor([0.25, 0.1]).double()
    guide = Guide(MSEGuidance(7.0), source, noise, 4)
    z = noise.normal(4, u.shape[1:], u.dtype)
    own = noise.stream("guidance").normal(4, u.shape[1:], u.dtype)
    assert not torch.equal(z, own)
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    push = 7.0 * sigma / alpha * 2 * (u - alpha * source - sigma * own) / 16
    for rule in (EulerMaruyama(), Ancestral()):
        mean, std = rule.moments(model, model.predict(u, t), u, t, s)
        torch.testing.assert_close(rule(model, u, t, s, z, guide), mean - std**2 * push + std * z)


@pytest.mark.parametrize("rule", [DDIM(0.0), DDIM(1.0), ProbabilityFlow("rk4"), OneShot()])
def test_other_rules_follow_the_guided_score(rule):
    """The same as a step with a network whose eps is eps + sigma s grad D."""
    model = smooth_model(torch.float64)
    model.requires_grad_(False)
    u, source = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.3, 0.2]).double(), torch.tensor([0.25, 0.1]).double()
    guidance = MSEGuidance(5.0, reference="input")
    guide = Guide(guidance, guidance.bind(source), Noise.keyed(0, [0, 1]), 0)

    class Bent(nn.Module):
        def forward(self, w, labels):
            t = labels.double() / 1000
            ratio = (model.schedule.sigma(t) ** 2 / model.schedule.alpha(t)).reshape(-1, 1, 1, 1)
            return model.network(w, labels) + 5.0 * ratio * 2 * (w - source) / 16

    z = torch.randn_like(u) if rule.stochastic else None
    expected = rule(ScoreModel(Bent(), model.schedule), u, t, s, z)
    torch.testing.assert_close(rule(model, u, t, s, z, guide), expected)


def test_guidance_through_the_score_network_is_the_whole_jacobian():
    model, noise = smooth_model(torch.float64), Noise.keyed(0, [0])
    u, source = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.4], dtype=torch.float64)

    def distance(w):
        return (model.denoise(w, t) - source).square().mean()

    jacobian = torch.autograd.functional.jacobian(distance, u)
    options = {"point": "u0_hat", "reference": "input", "growth": "constant"}
    _, whole = Guide(MSEGuidance(1.0, through_score=True, **options), source, noise, 0)(model, u, t)
    torch.testing.assert_close(whole, jacobian)
    _, held = Guide(MSEGuidance(1.0, **options), source, noise, 0)(model, u, t)
    alpha = model.schedule.alpha(t).item()
    torch.testing.assert_close(held, 2 * (model.denoise(u, t) - source) / 16 / alpha)


def test_guidance_pulls_towards_the_input(images):
    """The more, the closer; with enough of it the purifier gives its input back."""
    x = images.double()
    away = [(make("mse-input", "sde", scale, 50)(x, sample_ids=IDS) - x).abs().mean() for scale in (0.0, 50.0, 800.0)]
    assert away[0] > 1.5 * away[1] > 3 * away[2]


def test_only_the_window_is_guided(images):
    x = images.double()
    model = smooth_model(torch.float64)

    def purified(**window):
        guidance = MSEGuidance(50.0, **window) if window else None
        return Purifier(model, 0.4, "ddpm", 4, guidance=guidance)(x, sample_ids=IDS)

    # steps start at 0.4, 0.3, 0.2, 0.1
    assert torch.equal(purified(t_min=0.4, t_max=0.5), purified())
    assert torch.equal(purified(t_min=0.39, t_max=1.0), purified(t_min=0.35, t_max=0.4))
    assert not torch.equal(purified(t_min=0.39, t_max=1.0), purified(t_min=0.25, t_max=1.0))


def test_edges_of_the_window_are_meant_exactly():
    """Steps start at 0.1 (100 - j) / 100, some a rounding error above k/1000."""
    model, guidance = smooth_model(), MSEGuidance(1.0, growth="constant", t_min=0.04, t_max=0.07)
    times = torch.tensor([[0.1], [0.2], [0.299]], dtype=torch.float64) * ((100 - torch.arange(100)).double() / 100)
    for row, t_star in zip(times, (0.1, 0.2, 0.299), strict=True):
        inside = guidance.strength(model, row) > 0
        thousandths = [round(t_star * 1000) * (100 - j) / 100 for j in range(100)]
        assert inside.tolist() == [40 + 1e-6 < k <= 70 + 1e-6 for k in thousandths]


def test_a_layer_by_its_name(images):
    guidance = AdversarialGuidance(1.0, auxiliary=TinyClassifier(), layer="layers.2")
    network = TinyClassifier()
    torch.testing.assert_close(guidance.represent(2 * images - 1), network.layers[:3](images))
    assert not guidance.auxiliary.get_submodule("layers.2")._forward_hooks


def test_a_layer_before_one_that_works_in_place(images):
    class InPlace(TinyClassifier):
        def forward(self, x):
            return self.layers(x).relu_()

    u = images.double() * 2 - 1
    guidance = AdversarialGuidance(1.0, auxiliary=InPlace().double(), layer="layers")
    torch.testing.assert_close(guidance.represent(u), guidance.auxiliary.layers((u + 1) / 2))
    assert (guidance.represent(u) < 0).any()


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        (nn.Sequential(TinyClassifier()), None, None),
        (type("Dict", (TinyClassifier,), {"forward": lambda self, x: {"scores": x}})(), None, "it returned dict"),
        (type("Idle", (TinyClassifier,), {"forward": lambda self, x: x})(), "layers", "'layers' .* does not run"),
    ],
)
def test_auxiliary_networks_that_cannot_be_compared(network, layer, message):
    guidance = AdversarialGuidance(1.0, auxiliary=network, layer=layer)
    if message is None:
        Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=guidance)
        return
    with pytest.raises(ValueError, match=message):
        Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=guidance)


def test_ssim_by_a_loop():
    """The mean over pixels of the formula with a Gaussian window, edges reflected."""
    a, b = torch.rand(2, 1, 1, 5, 5, dtype=torch.float64)
    half = int(3.5 * 0.5 + 0.5)
    line = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * 0.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    padded = [np.pad(v[0, 0].numpy(), half, mode="reflect") for v in (a, b)]
    c1, c2, found = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    for i in range(5):
        for j in range(5):
            p, q = (v[i : i + 2 * half + 1, j : j + 2 * half + 1] for v in padded)
            mu_p, mu_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * p**2).sum() - mu_p**2, (window * q**2).sum() - mu_q**2
            covariance = (window * p * q).sum() - mu_p * mu_q
            upper = (2 * mu_p * mu_q + c1) * (2 * covariance + c2)
            found.append(upper / ((mu_p**2 + mu_q**2 + c1) * (var_p + var_q + c2)))
    assert SSIMGuidance(1.0, sigma=0.5).distance(a, b).item() == pytest.approx(-np.mean(found))


def test_predictions_keep_a_learned_variance():
    class Learned(nn.Module):
        def forward(self, u, labels):
            return torch.cat([u, 0.3 * torch.ones_like(u)], 1)

    model = ScoreModel(Learned(), smooth_model().schedule, "learned_variance")
    guidance = MSEGuidance(5.0, point="u0_hat", through_score=True)
    u = torch.randn(2, 1, 4, 4)
    prediction, push = Guide(guidance, u, Noise.keyed(0, [0, 1]), 0)(model, u, torch.tensor([0.2, 0.3]).double())
    assert isinstance(prediction, Prediction)
    assert (prediction.variance == 0.3).all()
    assert push.abs().min() > 0
