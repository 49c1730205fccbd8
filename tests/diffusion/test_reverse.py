"""Reverse rules against the original programs' steps, analytic posteriors, and convergence orders."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import GaussianEps, MixtureEps, SmoothNet, smooth_model
from torch import nn

from purify import ContinuousVP, DiscreteVP, Purifier, ScoreModel
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import (
    DDIM,
    Ancestral,
    ConsistencySampling,
    EulerMaruyama,
    OneShot,
    ProbabilityFlow,
    RandomSampling,
)
from purify.presets import diffpure
from purify.purification.plans import FixedSteps, StepFactory


class Constant(nn.Module):
    """Returns a stored network output."""

    def __init__(self, output):
        super().__init__()
        self.output = torch.as_tensor(output)

    def forward(self, u, labels):
        return self.output


def tensors(tables, prefix):
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in tables.items() if k.startswith(prefix)}


@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_step_of_guided_diffusion(tables, clip):
    f = tensors(tables, "psample_")
    model = ScoreModel(Constant(f["fake_model_output"]), DiscreteVP.linear(1000), "learned_variance", time_offset=1)
    t, s = (f["t"].double() + 1) / 1000, f["t"].double() / 1000
    rule = Ancestral("learned", clip_denoised=clip)
    suffix = f"clip{int(clip)}"
    mean, std = rule.moments(model, model.predict(f["x"], t), f["x"], t, s)
    scale = f[f"fake_mean_{suffix}"].abs().max()
    assert (mean - f[f"fake_mean_{suffix}"]).abs().max() < 2e-6 * scale
    later = f["t"] > 0
    log_variance = 2 * std.log()
    torch.testing.assert_close(log_variance[later], f[f"fake_log_variance_{suffix}"][later], rtol=2e-5, atol=2e-5)
    sample = rule(model, f["x"], t, s, f["noise"])
    assert (sample - f[f"fake_sample_{suffix}"]).abs().max() < 2e-6 * scale


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_fixed_large_step_of_diffusers(tables, t):
    f = tensors(tables, f"ddpm_t{t}_")
    model = ScoreModel(Constant(f["eps"]), DiscreteVP.linear(1000), time_offset=1)
    n = len(f["x"])
    times = torch.full((n,), (t + 1) / 1000, dtype=torch.float64)
    got = Ancestral("beta", clip_denoised=True)(model, f["x"], times, times - 1 / 1000, f["noise"])
    torch.testing.assert_close(got, f["prev_sample"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("t", [75, 100, 125, 150])
def test_published_variant_diffuses_as_diffpure_does(tables, t):
    f = tensors(tables, "vpsde_")
    purifier = diffpure(smooth_model(), t / 1000, steps=t, variant="published")
    t_star = torch.tensor([t / 1000], dtype=torch.float64)
    diffuse = purifier.process(t_star, Noise.keyed(0, torch.arange(1))).rounds[0].diffuse
    alpha, sigma = (c(diffuse.t).item() for c in (diffuse.schedule.alpha, diffuse.schedule.sigma))
    torch.testing.assert_close(alpha * f["x0"] + sigma * f["eps"], f[f"diffpure_forward_t{t}"], rtol=1e-5, atol=1e-6)


def test_published_variant_reverses_at_diffpures_times():
    purifier = diffpure(smooth_model(), 0.1, steps=100, variant="published")
    steps = purifier.process(torch.tensor([0.1], dtype=torch.float64), Noise.keyed(0, [0])).rounds[0].reverse
    times = [s.t.item() for s in steps] + [steps[-1].s.item()]
    assert times == pytest.approx([k / 1000 for k in range(100, 0, -1)] + [1e-5], rel=1e-12)


def test_published_variant_drives_a_discrete_network_as_diffpure_does(images):
    """DiffPure's guided-diffusion branch written out: continuous beta(t) and sigma(t), whole labels."""
    network = SmoothNet().double()
    discrete = ScoreModel(network, DiscreteVP.linear(1000))
    with pytest.raises(ValueError, match="score model's schedule is discrete; use variant='consistent', or drive"):
        diffpure(discrete, 0.01, 10, variant="published")
    twin = discrete.with_settings(schedule=ContinuousVP(), time_scale=1000, time_offset=0)
    purifier, x0 = diffpure(twin, 0.01, 10, variant="published"), 2 * images.double() - 1
    noise = purifier.noise(7, x0.device, range(7), 0, 0)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[10 - 1]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise.normal(0, x0.shape[1:], torch.float64)
    times = [*(k / 1000 for k in range(10, 0, -1)), 1e-5]
    for j, (t, s) in enumerate(pairwise(times)):
        beta, label = 0.1 + 19.9 * t, int(1000 * t + 1e-6)
        score = -network(x, torch.full((7,), float(label), dtype=torch.float64))
        score = score / math.sqrt(1 - math.exp(-0.5 * 19.9 * t**2 - 0.1 * t))
        drift = -0.5 * beta * x - beta * score
        z = noise.normal(j + 1, x0.shape[1:], torch.float64)
        x = x - drift * (t - s) + math.sqrt(beta * (t - s)) * z
    torch.testing.assert_close(2 * purifier(images.double(), sample_ids=range(7)) - 1, x, rtol=1e-9, atol=1e-9)


def test_ddim_with_eta_1_is_the_ddpm_posterior():
    model = smooth_model(torch.float64)
    u = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.1, 0.5, 0.02]).double(), torch.tensor([0.05, 0.1, 0.0]).double()
    prediction = model.predict(u, t)
    for a, b in zip(
        DDIM(1.0).moments(model, prediction, u, t, s), Ancestral().moments(model, prediction, u, t, s), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", [RandomSampling(), ConsistencySampling()])
def test_random_sampling_is_ddpm_without_the_last_noise_and_consistency_diffuses_the_estimate(rule):
    """Under s = 0 it is one-shot; DiffAP's step is the DDPM posterior's without its multiple of the predicted noise."""
    model, (u, z) = smooth_model(torch.float64), torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.1, 0.5, 0.02]).double(), torch.tensor([0.05, 0.1, 0.0]).double()
    column = lambda x: x.reshape(-1, 1, 1, 1)  # noqa: E731
    found, schedule = rule(model, u, t, s, z), model.schedule
    if isinstance(rule, ConsistencySampling):
        expected = column(schedule.alpha(s)) * model.denoise(u, t) + column(schedule.sigma(s)) * z
    else:
        mean, std = Ancestral().moments(model, model.predict(u, t), u, t, s)
        left = (schedule.variance(s) - std.flatten() ** 2).clamp_min(0).sqrt()
        expected = mean + std * z - column(left) * model.eps(u, t)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], model.denoise(u, t)[2])


RULES = [
    EulerMaruyama(),
    Ancestral(),
    DDIM(0.5),
    ProbabilityFlow("rk4"),
    OneShot(),
    RandomSampling(),
    ConsistencySampling(),
]


@pytest.mark.parametrize("rule", RULES)
def test_each_sample_has_its_own_times(rule):
    model = smooth_model(torch.float64)
    u, z = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.1, 0.5, 0.02]).double(), torch.tensor([0.05, 0.1, 0.0]).double()
    z = z if rule.stochastic else None
    together = rule(model, u, t, s, z)
    for i in range(3):
        one = slice(i, i + 1)
        alone = rule(model, u[one], t[one], s[one], None if z is None else z[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-10, atol=1e-12)


# --- analytic data: what a purification must be -------------------------------------------------------------------

MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
FACTOR = torch.tensor(
    [[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [-0.2, 0.1, 0.3, 0.0], [0.1, 0.2, -0.1, 0.6]], dtype=torch.float64
)
COVARIANCE = FACTOR @ FACTOR.T
SAMPLES = 20_000


def purified(network, u, t_star, rule, steps):
    """Purified copies (SAMPLES, 4) of one point u in [-1, 1] space."""
    model = ScoreModel(network, ContinuousVP())
    t = torch.full((SAMPLES,), t_star, dtype=torch.float64)
    v = u.reshape(1, 1, 2, 2).expand(SAMPLES, -1, -1, -1)
    factory = StepFactory(model, rule, Noise.keyed(0, torch.arange(SAMPLES)), model.schedule)
    with torch.no_grad():
        return FixedSteps(steps).round(factory, t).run(v, lambda step, u: step(u)).flatten(1)


@pytest.mark.parametrize(("rule", "steps"), [(EulerMaruyama(), 300), (Ancestral(), 100)], ids=["sde", "ddpm"])
def test_gaussian_data_give_the_analytic_posterior(rule, steps):
    u, t_star = torch.tensor([0.9, -0.7, 0.5, 0.2], dtype=torch.float64), 0.3
    samples = purified(GaussianEps(MEAN, COVARIANCE), u, t_star, rule, steps)
    at = torch.tensor(t_star, dtype=torch.float64)
    alpha, sigma = ContinuousVP().alpha(at), ContinuousVP().sigma(at)
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(4))
    mean = MEAN + gain @ (alpha * (u - MEAN))
    covariance = COVARIANCE - alpha * gain @ COVARIANCE + sigma**2 * gain @ gain.T
    error = (covariance.diagonal() / SAMPLES).sqrt()
    assert ((samples.mean(0) - mean).abs() < 4 * error + 4e-3).all()
    # standard error of an entry of the sample covariance is about sqrt((C_ii C_jj + C_ij^2) / N)
    spread = ((covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2) / SAMPLES).sqrt()
    assert ((torch.cov(samples.T) - covariance).abs() < 4 * spread + 6e-3).all()


def test_gaussian_mixture_data_give_the_analytic_posterior():
    means = torch.tensor([[0.6, 0.6, -0.6, -0.6], [-0.6, -0.6, 0.6, 0.6], [0.0, 0.7, 0.0, -0.7]])
    network = MixtureEps(means, 0.15, torch.tensor([0.5, 0.2, 0.3]))
    u, t_star = torch.tensor([0.25, 0.45, -0.25, -0.5], dtype=torch.float64), 0.35
    samples = purified(network, u, t_star, Ancestral(), 150)
    # Independent: draw u_t, then the component from its exact posterior, then its Gaussian posterior.
    g = torch.Generator().manual_seed(1)
    t = torch.full((SAMPLES,), t_star, dtype=torch.float64)
    alpha, sigma = ContinuousVP().alpha(t)[0], ContinuousVP().sigma(t)[0]
    u_t = alpha * u + sigma * torch.randn(SAMPLES, 4, dtype=torch.float64, generator=g)
    share, residual, variance = network.responsibilities(u_t.reshape(-1, 1, 2, 2), t)
    k = torch.multinomial(share, 1, generator=g)[:, 0]
    gain = alpha * 0.15**2 / variance[0]
    posterior_std = math.sqrt(0.15**2 - alpha * gain * 0.15**2)
    exact = means.double()[k] + gain * residual[torch.arange(SAMPLES), k]
    exact = exact + posterior_std * torch.randn(SAMPLES, 4, dtype=torch.float64, generator=g)
    error = (2 * exact.var(0) / SAMPLES).sqrt()
    assert ((samples.mean(0) - exact.mean(0)).abs() < 4 * error + 5e-3).all()
    assert ((torch.cov(samples.T) - torch.cov(exact.T)).abs() < 0.02).all()
    nearest = torch.cdist(samples, means.double()).argmin(1).bincount(minlength=3) / SAMPLES
    expected = torch.cdist(exact, means.double()).argmin(1).bincount(minlength=3) / SAMPLES
    assert (nearest - expected).abs().max() < 0.02


def chain_moments(rule, steps, t_star):
    """Exact mean and variance of u_0 given u_t = 1 for one-dimensional Gaussian data, by propagating both."""
    model = ScoreModel(GaussianEps(torch.tensor([0.3]), torch.tensor([[0.25]])), ContinuousVP())
    t = torch.full((1,), t_star, dtype=torch.float64)
    mean, variance = torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.0
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    factory = StepFactory(model, rule, Noise.keyed(0, [0]), model.schedule)
    for step in FixedSteps(steps).round(factory, t).reverse:
        offset, noise = rule.moments(model, model.predict(zero, step.t), zero, step.t, step.s)
        slope = rule.moments(model, model.predict(one, step.t), one, step.t, step.s)[0] - offset
        mean, variance = slope * mean + offset, slope.item() ** 2 * variance + noise.item() ** 2
    return mean.item(), variance


@pytest.mark.parametrize("rule", [EulerMaruyama(), Ancestral()], ids=["sde", "ddpm"])
def test_error_falls_with_the_step(rule):
    t_star = 0.4
    at = torch.tensor(t_star, dtype=torch.float64)
    alpha, sigma2 = ContinuousVP().alpha(at).item(), ContinuousVP().variance(at).item()
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma2)
    exact_mean, exact_variance = 0.3 + gain * (1 - alpha * 0.3), 0.25 - alpha * gain * 0.25
    errors = []
    for steps in (50, 100, 200, 400):
        mean, variance = chain_moments(rule, steps, t_star)
        errors.append((abs(mean - exact_mean), abs(variance - exact_variance)))
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            # first order: halving the step halves the error (DDPM's mean is exact on Gaussian data)
            assert b < max(0.62 * a, 1e-7)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_ode_converges_with_its_solvers_order(solver, order):
    schedule = ContinuousVP()
    model = ScoreModel(GaussianEps(MEAN, COVARIANCE), schedule)
    t0, t1 = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    u = torch.tensor([0.4, 0.1, -0.3, 0.8], dtype=torch.float64)
    # Exact flow: along each eigenvector of the covariance the residual scales as the marginal's deviation.
    values, vectors = torch.linalg.eigh(COVARIANCE)

    def deviation(t):
        return (schedule.alpha(t) ** 2 * values + schedule.variance(t)).sqrt()

    coefficients = vectors.T @ (u - schedule.alpha(t0) * MEAN)
    exact = schedule.alpha(t1) * MEAN + vectors @ (coefficients * deviation(t1) / deviation(t0))
    errors = []
    for steps in (10, 20, 40):
        v = u.reshape(1, 1, 2, 2)
        for j in range(steps):
            a, b = (t0 + (t1 - t0) * k / steps for k in (j, j + 1))
            v = ProbabilityFlow(solver)(model, v, a, b, None)
        errors.append((v.flatten() - exact).norm().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) > order - 0.35


def test_adaptive_ode_meets_its_tolerance():
    model = ScoreModel(GaussianEps(MEAN, COVARIANCE), ContinuousVP())
    u = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    t, s = torch.full((3,), 0.5).double(), torch.full((3,), 0.1).double()
    adaptive = ProbabilityFlow("dopri5", rtol=1e-8, atol=1e-8)(model, u, t, s, None)
    fine = u
    for j in range(64):
        fine = ProbabilityFlow("rk4")(model, fine, t + (s - t) * j / 64, t + (s - t) * (j + 1) / 64, None)
    torch.testing.assert_close(adaptive, fine, rtol=1e-6, atol=1e-6)


def test_one_shot_denoises():
    model = smooth_model()
    x = torch.rand(2, 1, 4, 4)
    purifier = Purifier(model, 0.3, "one-shot", steps=1, clip=False)
    noise = purifier.noise(2, x.device, [0, 1], 0, 0)
    t = torch.full((2,), 0.3, dtype=torch.float64)
    diffused = purifier.process(t, noise).rounds[0].diffuse(2 * x - 1)
    torch.testing.assert_close(purifier(x, sample_ids=[0, 1]), (model.denoise(diffused, t) + 1) / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral("large"), "Unknown DDPM variance 'large'.*; known: beta, learned, posterior"),
        (lambda: DDIM(1.5), "eta must lie in"),
        (lambda: ProbabilityFlow("magic"), "Unknown ODE solver"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_learned_variance_needs_a_network_that_learns_it():
    with pytest.raises(ValueError, match="learned_variance"):
        Purifier(smooth_model(), 0.1, {"kind": "ddpm", "variance": "learned"})
