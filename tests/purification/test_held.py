"""Rules that hold their time: Langevin steps against analytic moments, likelihood ascent against torch's Adam."""

import json

import pytest
import torch
from conftest import (
    GaussianEps,
    assert_finite_differences,
    assert_second_derivative,
    gradient_of_weighted,
    smooth_model,
    weighted,
)

from purify import ContinuousVP, FixedDt, Held, Langevin, LikelihoodAscent, MSEGuidance, Purifier, ScoreModel
from purify.diffusion.noise import Noise
from purify.purification import cost
from purify.purification.calls import calls
from purify.purification.overshoot import overshoot, warn_overshoot

IDS = range(7)
RULES = {
    "langevin": Langevin(0.2),
    "langevin-cold": Langevin(0.2, temperature=0.0),
    "likelihood": LikelihoodAscent(0.1),
}


def make(rule="langevin", steps=4, level=0.2, **options):
    return Purifier(smooth_model(torch.float64), level, RULES[rule], steps, clip=False, **options)


# --- Langevin -----------------------------------------------------------------------------------------------------


def test_langevin_steps_have_the_moments_of_their_autoregression():
    """On a Gaussian every direction is u <- u - tau^2 (u - m) / (2 v) + tau z, from the image as it came."""
    mean, covariance = torch.tensor([0.3, -0.2]).double(), torch.diag(torch.tensor([0.5, 0.02]).double())
    model = ScoreModel(GaussianEps(mean, covariance), ContinuousVP(), image_shape=(1, 1, 2))
    tau, steps, t, n = 0.2, 15, torch.tensor(0.1).double(), 4000
    x = torch.tensor([0.9, 0.6]).double().reshape(1, 1, 1, 2).expand(n, -1, -1, -1)
    found = 2 * Purifier(model, float(t), Langevin(tau), steps, clip=False)(x, sample_ids=range(n)).flatten(1) - 1
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    for i in range(2):
        v = alpha**2 * covariance[i, i] + sigma**2
        keep = 1 - tau**2 / (2 * v)
        expected = alpha * mean[i] + keep**steps * (2 * x[0, 0, 0, i] - 1 - alpha * mean[i])
        variance = tau**2 * (1 - keep ** (2 * steps)) / (1 - keep**2)
        assert (found[:, i].mean() - expected).abs() < 4 * (variance / n).sqrt()
        assert found[:, i].var().item() == pytest.approx(variance.item(), rel=0.1)


def test_cold_langevin_steps_climb_to_the_mode():
    mean = torch.tensor([0.3, -0.2]).double()
    model = ScoreModel(GaussianEps(mean, 0.1 * torch.eye(2).double()), ContinuousVP(), image_shape=(1, 1, 2))
    x = torch.rand(5, 1, 1, 2, dtype=torch.float64)
    found = 2 * Purifier(model, 0.1, Langevin(0.3, 0.0), 200)(x, sample_ids=range(5)).flatten(1) - 1
    torch.testing.assert_close(found, (ContinuousVP().alpha(torch.tensor(0.1)) * mean).expand(5, 2))


# --- likelihood ascent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 6])
def test_likelihood_ascent_is_torchs_adam_on_the_diffusion_loss(steps, images):
    purifier = make("likelihood", Held(steps, spread=0.3))
    model, noise = purifier.score_model, Noise.keyed(3, IDS, 1)
    u = (2 * images.double() - 1).requires_grad_()
    optimizer = torch.optim.Adam([u], lr=0.1)
    for j in range(1, steps + 1):
        t = 0.2 * (1 + 0.3 * (2 * noise.stream("time").uniform(j, (), torch.float64) - 1))
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
        noisy = alpha * u + sigma * noise.normal(j, (1, 4, 4), torch.float64)
        loss = (((noisy - sigma * model.network(noisy, 1000 * t)) / alpha - u) ** 2).flatten(1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = 2 * purifier(images.double(), sample_ids=IDS, seed=3, draw=1) - 1
    torch.testing.assert_close(found, u.detach(), rtol=1e-9, atol=1e-10)


def test_likelihood_ascent_ends_where_the_likelihood_is_greatest():
    """At the mean of a Gaussian, up to steps of the rate; with a tiny one the image stays."""
    mean = torch.tensor([0.3, -0.2]).double()
    model = ScoreModel(GaussianEps(mean, 0.1 * torch.eye(2).double()), ContinuousVP(), image_shape=(1, 1, 2))
    x = torch.rand(5, 1, 1, 2, dtype=torch.float64)
    found = 2 * Purifier(model, 0.2, LikelihoodAscent(0.03), 150)(x, sample_ids=range(5)).flatten(1) - 1
    assert (found - mean).abs().max() < 0.1 < (2 * x.flatten(1) - 1 - mean).abs().max()
    torch.testing.assert_close(
        Purifier(model, 0.2, LikelihoodAscent(1e-9), 3)(x, sample_ids=range(5)), x, atol=1e-8, rtol=0
    )


def test_softness_changes_gradients_alone(images):
    x, soft = images.double(), Purifier(smooth_model(torch.float64), 0.2, LikelihoodAscent(0.1, 0.5), 3, clip=False)
    hard = make("likelihood", 3)
    assert torch.equal(soft(x, sample_ids=IDS), hard(x, sample_ids=IDS))
    assert (hard.exact, soft.exact) == (True, False)
    assert not torch.allclose(gradient_of_weighted(hard, x), gradient_of_weighted(soft, x))
    mean, square = torch.rand(2, 1, 1, 2, 2, dtype=torch.float64, requires_grad=True).unbind(0)
    found = torch.autograd.grad(soft.rule._direction(mean, square).sum(), (mean, square))
    expected = torch.autograd.grad((mean / (square + 0.25).sqrt()).sum(), (mean, square))
    torch.testing.assert_close(found, expected)


def test_levels_spread_over_steps_and_samples(images):
    purifier = make("langevin", Held(20, spread=0.4))
    steps = purifier.process(torch.full((7,), 0.2).double(), Noise.keyed(0, IDS)).rounds[0].reverse
    times = torch.stack([step.t for step in steps])
    assert ((times > 0.12) & (times < 0.28)).all()
    assert times.std() == pytest.approx(0.16 / 12**0.5, rel=0.2)
    assert all(torch.equal(step.t, step.s) for step in steps)
    assert times.unique().numel() == times.numel()


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["full", "checkpoint", {"kind": "checkpoint", "memory_budget": 30_000}])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guided", [False, True])
def test_gradients_by_finite_differences(guided, rule, engine, images):
    guidance = MSEGuidance(0.5, reference="input", growth="constant") if guided else None
    purifier = make(rule, Held(3, spread=0.2), gradient=engine, guidance=guidance, rounds=(1.0, 0.5))
    assert_finite_differences(purifier, images.double(), 1e-5, 1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_second_derivatives_by_finite_differences(rule, images):
    purifier = make(rule, 2, gradient="checkpoint")
    assert_second_derivative(lambda w: weighted(purifier, w), images.double(), 1e-7, 1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_pulls_towards_the_input(rule, images):
    x = images.double()
    away = []
    for scale in (0.0, 5.0, 50.0):
        guidance = MSEGuidance(scale, reference="input", growth="constant")
        purified = make(rule, 40, guidance=guidance)(x, sample_ids=IDS)
        away.append((purified - x).abs().mean())
    assert torch.equal(make(rule, 40)(x, sample_ids=IDS), make(rule, 40, guidance=MSEGuidance(0.0))(x, sample_ids=IDS))
    assert away[0] > away[1] > away[2]


@pytest.mark.parametrize("rule", RULES)
def test_checkpointed_steps_keep_one_state_each(rule, images):
    """Memory is flat but for that, and steps are rebuilt once."""
    x, kept = images.double().requires_grad_(), {}
    for steps in (3, 9):
        sizes, purifier = [], make(rule, steps, gradient="checkpoint")
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            weighted(purifier, x)
        kept[steps] = sum(sizes)
    states = 3 + 1 / 1 if rule == "likelihood" else 1  # Adam's averages, too, and the count of one channel
    assert kept[9] - kept[3] <= 6 * (states + 0.1) * x.numel()


@pytest.mark.parametrize("rule", RULES)
def test_configuration_costs_and_independence_of_the_batch(rule, images):
    x, purifier = images.double(), make(rule, Held(3, spread=0.1))
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model(torch.float64))
    assert again.config() == purifier.config()
    whole = purifier(x, sample_ids=IDS)
    assert torch.equal(again(x, sample_ids=IDS), whole)
    torch.testing.assert_close(purifier(x[2:4], sample_ids=[2, 3]), whole[2:4], rtol=1e-10, atol=1e-12)
    model = type("Model", (), {"purifier": purifier, "purifications": 1, "classifier": None})()
    assert calls(model).forward == 3 * purifier.rule.calls + 1
    assert purifier.purify(x, sample_ids=IDS).network_calls.tolist() == [3 * purifier.rule.calls] * 7
    assert cost.held_bytes(purifier, x[:1], 7) > cost.graph_bytes(purifier, x) > 0
    assert torch.equal(purifier.with_steps(2)(x, sample_ids=IDS), make(rule, 2)(x, sample_ids=IDS))


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_network_is_named_with_its_step(rule, images):
    class Broken(torch.nn.Module):
        def forward(self, u, labels):
            return u / torch.zeros_like(u)

    purifier = Purifier(ScoreModel(Broken(), ContinuousVP()), 0.2, RULES[rule], 3)
    with pytest.raises(
        ValueError, match=r"score network gives NaN or infinity for sample 0 in reverse step 1 \(t = 0.2"
    ):
        purifier(images, sample_ids=IDS)


@pytest.mark.parametrize("rule", RULES)
def test_overshoot_says_where_it_cannot_be_measured(rule, images):
    purifier = make(rule, guidance=MSEGuidance(1.0, reference="input"))
    with pytest.raises(ValueError, match="this rule holds its time"):
        overshoot(purifier, images.double())
    assert warn_overshoot(purifier, images.double()) is None


def test_weights_that_want_gradients_are_refused(images):
    purifier = make("likelihood")
    purifier.score_model.requires_grad_(True)
    with pytest.raises(ValueError, match="do not reach weights"):
        gradient_of_weighted(purifier, images.double())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Langevin(0.0), "step must be a number above 0"),
        (lambda: Langevin(0.1, -1.0), "temperature of Langevin steps must be at least 0"),
        (lambda: LikelihoodAscent(float("nan")), "rate of likelihood ascent must be a number above 0"),
        (lambda: LikelihoodAscent(0.1, -1.0), "softness must be a number of at least 0"),
        (lambda: Held(3, spread=1.0), r"spread of the held plan must lie in \[0, 1\)"),
        (lambda: Held(0), "steps must be a whole number"),
        (lambda: make("langevin", FixedDt(0.1)), "Langevin stays at its time, which FixedDt"),
        (lambda: Purifier(smooth_model(), 0.2, "ddpm", Held(3)), "Ancestral steps down in time, which Held"),
        (lambda: make("langevin", gradient="adjoint"), "adjoint engine needs"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
