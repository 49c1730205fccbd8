"""How far guidance overshoots, against closed forms and the whole Jacobian."""

import warnings

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import FixedDt, Purifier, diffpure
from purify.diffusion.score import per_sample
from purify.purification.guidance import AdversarialGuidance, Guide, MSEGuidance
from purify.purification.overshoot import overshoot, warn_overshoot

IDS = torch.arange(7)


def test_mean_squared_differences_overshoot_by_their_closed_form(images):
    """grad^2 D = 2 / d: a step of variance Sigma_t is shifted by s_t Sigma_t 2 / d of the difference."""
    score, d = smooth_model(torch.float64), 16
    purifier = Purifier(score, 0.3, "ddpm", 4, guidance=MSEGuidance(30.0))
    found = overshoot(purifier, images.double(), sample_ids=IDS)
    noise = purifier.noise(7, images.device, IDS, 0, 0)
    u = 2 * images.double() - 1
    steps = purifier.process(torch.full((7,), 0.3, dtype=torch.float64), noise, images=u).rounds[0].reverse
    for step, k in zip(steps, found, strict=True):
        _, std = step.rule.moments(score, score.predict(u, step.t), u, step.t, step.s)
        expected = std.flatten() ** 2 * purifier.guidance.strength(score, step.t) * 2 / d
        torch.testing.assert_close(k, expected.expand(7))
    assert found[0].min() > 0.01


def test_a_network_overshoots_by_the_largest_eigenvalue_of_its_jacobian(images):
    score = smooth_model(torch.float64)
    guidance = AdversarialGuidance(200.0, auxiliary=TinyClassifier(size=4).double(), layer="layers.2")
    purifier, x = Purifier(score, 0.3, "ddpm", 4, guidance=guidance), images[:2].double()
    found = overshoot(purifier, x, sample_ids=IDS[:2], iterations=200)
    noise = purifier.noise(2, x.device, IDS[:2], 0, 0)
    one_round = purifier.process(torch.full((2,), 0.3, dtype=torch.float64), noise, images=2 * x - 1).rounds[0]
    state = one_round.diffuse(2 * x - 1)
    step = one_round.reverse[0]
    assert isinstance(step.look, Guide)
    eps = score.predict(state, step.t).eps
    _, std = step.rule.moments(score, score.predict(state, step.t), state, step.t, step.s)

    def shift(u):
        """Of the step, with what the score network says held constant, by hand."""
        w = u.requires_grad_() if u.is_leaf else u
        guess = score.denoised(eps[:1], w, step.t[:1])
        distance = guidance.distance(guidance.represent(guess), guidance.represent(2 * x[:1] - 1)).sum()
        (gradient,) = torch.autograd.grad(distance, w, create_graph=True)
        return -(std[:1] ** 2) * per_sample(guidance.strength(score, step.t)[:1], u) * gradient

    jacobian = torch.autograd.functional.jacobian(shift, state[:1]).reshape(16, 16)
    values = torch.linalg.eigvalsh(-(jacobian + jacobian.T) / 2)
    largest = values[values.abs().argmax()]
    assert found[0, 0].item() == pytest.approx(largest.item(), rel=1e-3)


def test_steps_outside_the_window_are_not_guided(images):
    purifier = Purifier(smooth_model(), 0.3, "ddpm", 3, guidance=MSEGuidance(10.0, t_min=0.15))
    found = overshoot(purifier, images, sample_ids=IDS)
    assert (~found.isnan()).any(1).tolist() == [True, True, False]


def test_what_overshoots_is_said(images):
    with pytest.warns(UserWarning, match=r"The guidance overshoots: k is .* above 2 in \d+ % of them"):
        strong = warn_overshoot(Purifier(smooth_model(), 0.3, "ddpm", 3, guidance=MSEGuidance(1e4)), images)
    assert strong > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_overshoot(Purifier(smooth_model(), 0.3, "ddpm", 3, guidance=MSEGuidance(1.0)), images) < 2
        assert warn_overshoot(diffpure(smooth_model(), 0.3, 3, "ddpm"), images) is None
        packed = Purifier(smooth_model(), 0.3, "ddpm", FixedDt(0.1), guidance=MSEGuidance(1.0))
        assert warn_overshoot(packed, images) < 2


def test_only_guidance_overshoots(images):
    with pytest.raises(ValueError, match="this purifier has none"):
        overshoot(diffpure(smooth_model(), 0.3, 3, "ddpm"), images)
