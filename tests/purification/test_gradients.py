"""Gradient engines: exactness against finite differences, agreement, memory, and what must not matter."""

import gc
from dataclasses import dataclass

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, assert_finite_differences, assert_second_derivative, smooth_model
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy

from purify import ContinuousVP, DefendedClassifier, Purifier, ScoreModel, SSNILinear, calibrate, diffpure
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
from purify.purification.gradients import Adjoint, Checkpoint, Full, Surrogate, saved_bytes

RULES = {
    "sde": EulerMaruyama(),
    "ddpm": Ancestral(),
    "ddpm-clipped": Ancestral(clip_denoised=True),
    "ddim": DDIM(0.0),
    "ddim-half": DDIM(0.5),
    "ode-euler": ProbabilityFlow("euler"),
    "ode-rk4": ProbabilityFlow("rk4"),
    "ode-dopri5": ProbabilityFlow("dopri5", rtol=1e-4, atol=1e-4),
    "one-shot": OneShot(),
    "random": RandomSampling(),
    "consistency": ConsistencySampling(),
}
EXACT = {
    "full": Full(),
    "checkpoint": Checkpoint(),
    "nothing-fits": Checkpoint(memory_budget=0),
    "some-fit": Full(memory_budget=12_000),
    "all-fit": Checkpoint(memory_budget=10**9),
}


def make(rule, engine, dtype=torch.float32, steps=6, t_end=0.0):
    steps = 1 if rule == "one-shot" else steps
    return Purifier(smooth_model(dtype), 0.2, RULES[rule], steps, t_end, gradient=engine, clip=False)


def gradient(purifier, x, scale=1.0):
    """Gradient of a fixed smooth loss with fixed noise."""
    x = x.clone().requires_grad_()
    x_hat = purifier(x, sample_ids=range(len(x)), draw=2, seed=1)
    (g,) = torch.autograd.grad(scale * (x_hat * torch.linspace(-1, 1, x[0].numel()).reshape(x[0].shape)).sum(), x)
    return g


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("rule", RULES)
def test_exact_engines_agree_bit_for_bit(rule, engine, images):
    assert torch.equal(gradient(make(rule, EXACT[engine]), images), gradient(make(rule, Full()), images))


NOISE = {  # purifier -> draws of its 3 steps that are made again in the backward pass
    "only added": (lambda: Purifier(smooth_model(), 0.2, "ddpm", 3), 0),
    "by a learned variance": (lambda: Purifier(learned_model(), 0.2, Ancestral("learned"), 3), 3),
    "by a time with a gradient": (lambda: Purifier(smooth_model(), level(), "ddpm", 3), 3 + 1),  # and of the level
}


def learned_model():
    return ScoreModel(SmoothNet(out_channels=2), ContinuousVP(), "learned_variance", image_shape=(1, 4, 4))


def level():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return SSNILinear(0.2, calibrate(smooth_model(), images), t_max=0.6)


@pytest.mark.parametrize("kind", NOISE)
def test_noise_without_a_part_in_the_gradient_is_not_made_again(kind, images, monkeypatch):
    build, again = NOISE[kind]
    purifier, made, normal = build(), [], Noise.normal
    monkeypatch.setattr(Noise, "normal", lambda *args: made.append(1) or normal(*args))
    expected, first = gradient(purifier.with_gradient(Full()), images), len(made)
    assert torch.equal(gradient(purifier.with_gradient(Checkpoint()), images), expected)
    assert len(made) - first == first + again


@pytest.mark.parametrize("engine", ["full", "checkpoint", "some-fit"])
@pytest.mark.parametrize("rule", RULES)
def test_finite_differences(rule, engine, images):
    """Through the classifier, in float64, along random directions."""
    purifier = make(rule, EXACT[engine], torch.float64)
    model = DefendedClassifier(TinyClassifier().double(), purifier)
    x, y = images.double(), torch.arange(7) % 5

    def loss(v):
        return cross_entropy(model(v, sample_ids=range(7)), y, reduction="sum")

    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(v), v)
    for seed in range(3):
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        h = 1e-5
        with torch.no_grad():
            slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
        # an adaptive solver chooses its steps by the image, which the gradient sees only to the solver's tolerance
        tolerance = 1e-3 if rule == "ode-dopri5" else 1e-6
        assert (g * direction).sum().item() == pytest.approx(slope.item(), rel=tolerance, abs=1e-8)


@pytest.mark.parametrize("engine", ["full", "checkpoint", "some-fit"])
@pytest.mark.parametrize("rule", ["sde", "ddpm", "ddim", "ode-rk4", "consistency"])
@pytest.mark.parametrize("prediction", ["velocity", "consistency"])
def test_finite_differences_of_flows_and_consistency_functions(prediction, rule, engine, images):
    """Through t*(x), too, which a flow is told on a clock of its own."""
    model = ScoreModel(SmoothNet().double(), ContinuousVP(), prediction, image_shape=(1, 4, 4))
    reference = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = SSNILinear(0.2, calibrate(model, reference), t_max=0.6)
    assert_finite_differences(
        Purifier(model, level, RULES[rule], 3, gradient=EXACT[engine], clip=False), images.double()
    )


def test_finite_differences_with_a_clamped_output(images):
    """A clamp has zero gradient where it acts, and the exact gradient says so."""
    model = Purifier(smooth_model(torch.float64), 0.2, "ddpm", 5)
    assert model.clip
    x = images.double()
    ids = range(7)
    clamped = (model(x, sample_ids=ids) == 0) | (model(x, sample_ids=ids) == 1)
    assert 0 < clamped.sum() < clamped.numel()
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(v, sample_ids=ids).sum(), v)
    direction, h = torch.ones_like(x), 1e-6
    with torch.no_grad():
        slope = (model(x + h * direction, sample_ids=ids) - model(x - h * direction, sample_ids=ids)).sum() / (2 * h)
    assert (g * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_float32_against_float64(rule, images):
    """With the same noise, rounding alone may differ."""
    tolerance = 1e-3 if rule == "ode-dopri5" else 1e-5  # an adaptive solver may choose other steps
    exact = gradient(make(rule, Full(), torch.float64, 20), images.double())
    for engine in (Full(), Checkpoint()):
        assert relative(gradient(make(rule, engine, steps=20), images), exact) < tolerance


@pytest.mark.parametrize("engine", ["full", "checkpoint", "some-fit"])
@pytest.mark.parametrize("rule", ["sde", "ddpm", "ode-rk4"])
def test_double_backward(rule, engine, images):
    """The gradient of a gradient norm, against finite differences of gradients."""
    purifier = make(rule, EXACT[engine], torch.float64)
    x = images.double()
    assert_second_derivative(lambda w: purifier(w, sample_ids=range(7)).square().sum(), x, 1e-5, 1e-6)


def test_weights_that_want_gradients_get_them(images):
    """A purifier freezes its weights; who thaws them again loses nothing under an engine that recomputes."""
    found = {}
    for name in ("full", "checkpoint"):
        purifier = make("ddpm", EXACT[name], torch.float64).requires_grad_(True)
        purifier(images.double(), sample_ids=range(7)).square().sum().backward()
        found[name] = [p.grad for p in purifier.parameters()]
    for full, recomputed in zip(*found.values(), strict=True):
        assert full is not None
        assert full.abs().max() > 0
        assert torch.equal(full, recomputed)


def test_forward_mode_goes_through_every_engine(images):
    x, v = images.double(), torch.ones_like(images, dtype=torch.float64)
    found = []
    for engine in (Full(), Checkpoint()):
        purifier = make("ddpm", engine, torch.float64)
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(purifier(forward_ad.make_dual(x, v), sample_ids=range(7))).tangent)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("engine", [Full(), Checkpoint(), Adjoint()], ids=["full", "checkpoint", "adjoint"])
def test_moving_the_global_generator_changes_nothing(engine, images):
    purifier = make("sde", engine)
    reference = gradient(purifier, images)
    x = images.clone().requires_grad_()
    x_hat = purifier(x, sample_ids=range(7), draw=2, seed=1)
    torch.rand(100)
    weight = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    assert torch.equal(torch.autograd.grad((x_hat * weight).sum(), x)[0], reference)


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_scaling_the_loss_by_powers_of_two_scales_the_gradient(engine, images):
    purifier = make("ddpm", EXACT[engine])
    assert torch.equal(gradient(purifier, images, 2.0**-20) * 2.0**20, gradient(purifier, images))


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_autocast_to_bfloat16(engine, images):
    exact = gradient(make("ddpm", Full()), images)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradient(make("ddpm", EXACT[engine]), images)
        again = gradient(make("ddpm", EXACT[engine]), images)
    assert low.dtype == torch.float32
    assert torch.equal(low, again)
    assert 0 < relative(low, exact) < 0.05


def test_micro_batches_give_the_same_gradient(images):
    purifier = make("sde", Checkpoint())

    def part(rows):
        x = images[rows].clone().requires_grad_()
        ids = torch.arange(7)[rows]
        return torch.autograd.grad(purifier(x, sample_ids=ids).square().sum(), x)[0]

    whole = part(slice(0, 7))
    parts = torch.cat([part(slice(0, 3)), part(slice(3, 4)), part(slice(4, 7))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


# --- memory and network calls -------------------------------------------------------------------------------------


def graph_bytes(purifier, x):
    """Bytes kept for the backward pass of a whole purification."""
    noise = Noise.keyed(0, range(len(x)))
    u = (2 * x - 1).requires_grad_()
    t = torch.full((len(x),), 0.2, dtype=torch.float64)
    return saved_bytes(lambda v: purifier.engine(lambda n: purifier.process(t, noise, n), v), u)[1]


def test_checkpoint_keeps_about_one_image_per_step(images):
    image = images.numel() * 4

    def size(engine, steps):
        return graph_bytes(make("ddpm", engine, steps=steps), images)

    growth = (size(Checkpoint(), 60) - size(Checkpoint(), 20)) / 40
    assert growth <= 2 * image
    assert (size(Full(), 60) - size(Full(), 20)) / 40 > 5 * image


def test_budget_keeps_as_many_steps_as_fit(images):
    def counted(engine):
        """Network rows of forward plus backward: a recomputed step costs one more."""
        purifier = make("ddpm", engine, steps=8)
        calls = []
        purifier.score_model.network.register_forward_pre_hook(lambda *_: calls.append(1))
        gradient(purifier, images)
        return len(calls)

    purifier = make("ddpm", Full(), steps=8)
    u = (2 * images - 1).requires_grad_()
    t = torch.full((7,), 0.2, dtype=torch.float64)
    step = purifier.process(t, Noise.keyed(0, range(7))).rounds[0].reverse[0]
    _, one_step = saved_bytes(step, u)
    assert counted(Full()) == 8
    assert counted(Checkpoint()) == 16
    assert counted(Checkpoint(memory_budget=10**9)) == 8
    assert counted(Checkpoint(memory_budget=4 * one_step)) == 8 + 4
    assert counted(Full(memory_budget=one_step - 1)) == 1 + 16  # the probe did not fit


def test_the_measured_step_is_freed(images):
    """Graphs of a probe that did not fit, or that saw no backward pass, do not pile up."""

    def live():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for budget in (0, 10**9):
        purifier = make("ddpm", Checkpoint(memory_budget=budget))
        purifier(images.clone().requires_grad_(), sample_ids=range(7))
        before = live()
        for _ in range(5):
            purifier(images.clone().requires_grad_(), sample_ids=range(7))
        assert live() <= before  # fewer where others' are let go of meanwhile


# --- approximate engines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t_end", [0.0, 0.02])
@pytest.mark.parametrize("rule", RULES)
def test_forward_values_are_the_same_under_every_engine(rule, t_end, images):
    reference = make(rule, "full", t_end=t_end)(images, sample_ids=range(7))
    for engine in ("checkpoint", "adjoint", "bpda", "surrogate"):
        x = images.clone().requires_grad_()
        assert torch.equal(make(rule, engine, t_end=t_end)(x, sample_ids=range(7)), reference)


@pytest.mark.parametrize(("rule", "t_end"), [("sde", 0.0), ("ddim", 0.0), ("ode-euler", 0.0), ("ode-euler", 0.002)])
def test_adjoint_is_close_and_gets_closer(rule, t_end, images):
    def error(steps):
        exact = gradient(make(rule, Full(), torch.float64, steps, t_end), images.double())
        return relative(gradient(make(rule, Adjoint(), torch.float64, steps, t_end), images.double()), exact)

    assert 0 < error(80) < 0.6 * error(20) < 0.1


def test_bpda_is_the_identity(images):
    x = images.clone().requires_grad_()
    weight = torch.randn(images.shape)
    (g,) = torch.autograd.grad((make("sde", "bpda")(x, sample_ids=range(7)) * weight).sum(), x)
    torch.testing.assert_close(g, weight)


def test_surrogate_is_exact_with_all_steps_and_that_of_the_short_process_with_few(images):
    assert torch.equal(gradient(make("ddpm", Surrogate(6)), images), gradient(make("ddpm", Full()), images))
    short = gradient(make("ddpm", Full(), steps=2), images)
    torch.testing.assert_close(gradient(make("ddpm", Surrogate(2)), images), short)
    assert relative(short, gradient(make("ddpm", Full()), images)) > 1e-3


SURROGATE_BUDGETS = {None: 2 * 4, 0: 1 + 2 * 4, 12_000: 2 * 4 - 2, 10**9: 4}


@pytest.mark.parametrize("budget", SURROGATE_BUDGETS)
def test_surrogates_keep_what_fits_and_recompute_the_rest(budget, images):
    """Whatever is kept, the gradient is the same; network calls beyond the forward pass tell what was recomputed."""
    calls, purifier = [], make("ddpm", Surrogate(4, memory_budget=budget))
    purifier.score_model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(gradient(purifier, images), gradient(make("ddpm", Full(), steps=4), images))
    assert len(calls) == 6 + SURROGATE_BUDGETS[budget]


def test_engines_are_found_by_name_and_errors_are_clear():
    purifier = diffpure(smooth_model(), gradient={"kind": "surrogate", "steps": 3})
    assert purifier.engine == Surrogate(3)
    assert purifier.with_gradient("full").engine == Full()
    with pytest.raises(ValueError, match="Unknown gradient engine 'exactly'; known: adjoint, bpda, checkpoint"):
        diffpure(smooth_model(), gradient="exactly")
    with pytest.raises(ValueError, match=r"memory_budget \(bytes\) must be a whole number"):
        Checkpoint(memory_budget=-1)
    with pytest.raises(ValueError, match="Unknown gradient engine parameter"):
        diffpure(smooth_model(), gradient={"kind": "full", "steps": 3})


@dataclass(frozen=True)
class NoisierWhereBright(EulerMaruyama):
    """Noise that depends on the state: what its parent says of noise does not hold."""

    def moments(self, model, prediction, u, t, s):
        mean, std = super().moments(model, prediction, u, t, s)
        return mean, std * (1 + 0.5 * u.tanh())


@dataclass(frozen=True)
class Clamped(EulerMaruyama):
    def __call__(self, *arguments):
        return super().__call__(*arguments).clamp(-1, 1)


@pytest.mark.parametrize("rule", [NoisierWhereBright, Clamped])
def test_rules_made_from_others_keep_their_noise_in_the_gradient(rule, images):
    purifier = Purifier(smooth_model(), 0.2, rule(), 3)
    found = [gradient(purifier.with_gradient(engine), images) for engine in (Full(), Checkpoint())]
    assert torch.equal(*found)
