"""Guidance: steps by hand, gradients against finite differences, and what must change nothing."""

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    SmoothNet,
    TinyClassifier,
    assert_finite_differences,
    assert_second_derivative,
    smooth_model,
)
from conftest import gradient_of_weighted as gradient
from conftest import weighted as loss
from torch import nn

from purify import DefendedClassifier, FixedDt, Purifier, SSNILinear, calibrate
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, OneShot, ProbabilityFlow
from purify.diffusion.score import Prediction, ScoreModel
from purify.fingerprint import weights_digest
from purify.purification import cost
from purify.purification.gradients import Surrogate
from purify.purification.guidance import AdversarialGuidance, Guide, MSEGuidance, SSIMGuidance

IDS = range(7)
AUXILIARY = TinyClassifier()
RULES = {
    "sde": EulerMaruyama(),
    "ddpm": Ancestral(),
    "ddim": DDIM(0.0),
    "ddim-half": DDIM(0.5),
    "ode": ProbabilityFlow("midpoint"),
}
KINDS = {
    "mse": lambda scale: MSEGuidance(scale),
    "mse-input": lambda scale: MSEGuidance(scale, reference="input", growth="constant"),
    "mse-u0": lambda scale: MSEGuidance(scale, point="u0_hat", reference="input", through_score=True),
    "ssim": lambda scale: SSIMGuidance(scale, sigma=0.5),
    "agdm": lambda scale: AdversarialGuidance(scale, auxiliary=AUXILIARY.double()),
    "agdm-through": lambda scale: AdversarialGuidance(scale, auxiliary=AUXILIARY.double(), through_score=True),
    "agdm-layer": lambda scale: AdversarialGuidance(
        scale, auxiliary=AUXILIARY.double(), layer="layers.1", point="u_t", reference="diffused"
    ),
}
STRONG = {"ssim": 3.0}


def make(kind=None, rule="ddpm", scale=20.0, steps=4, level=0.3, **options):
    guidance = None if kind is None else KINDS[kind](STRONG.get(kind, scale) if scale else 0.0)
    options = {"clip": False, **options}
    return Purifier(smooth_model(torch.float64), level, RULES[rule], steps, guidance=guidance, **options)


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_scale_zero_is_no_guidance_bit_for_bit(rule, kind, images):
    x = images.double()
    plain, off, on = (make(*what)(x, sample_ids=IDS) for what in ((None, rule), (kind, rule, 0.0), (kind, rule)))
    assert torch.equal(plain, off)
    assert (on - plain).abs().max() > 1e-4


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


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_by_finite_differences(rule, kind, engine, images):
    assert_finite_differences(make(kind, rule, gradient=engine), images.double())


@pytest.mark.parametrize("kind", ["mse", "agdm", "agdm-through"])
@pytest.mark.parametrize("engine", [{"kind": "checkpoint"}, {"kind": "checkpoint", "memory_budget": 30_000}])
def test_gradients_through_levels_rounds_and_packed_batches(kind, engine, images):
    """t* depends on the image, samples have different numbers of steps, and there are several rounds."""
    reference = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = SSNILinear(0.2, calibrate(smooth_model(torch.float64), reference), t_max=0.6)
    purifier = make(kind, "sde", steps=FixedDt(0.07, batch=3), level=level, rounds=(1.0, 0.5), gradient=engine)
    x = images.double()
    assert len(purifier.purify(x, sample_ids=IDS).network_calls.unique()) > 1
    assert_finite_differences(purifier, x)


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_by_finite_differences(kind, engine, images):
    purifier, x = make(kind, gradient=engine), images.double()
    assert_second_derivative(lambda w: loss(purifier, w), x, 1e-6, 1e-5)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_checkpointed_step_is_rebuilt_once_and_only_its_input_is_kept(kind, images):
    """grad D, taken inside the step, must not ask for the step's graph in the forward pass."""
    purifier, calls, kept = make(kind, gradient="checkpoint"), [], []
    purifier.score_model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    x = images.double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        value = loss(purifier, x)
    assert len(calls) == 4
    torch.autograd.grad(value, x)
    through = purifier.guidance is not None and purifier.guidance.through_score  # grad D has the network in it
    assert len(calls) == (12 if through else 8)
    assert sum(kept) < 20 * x.numel()


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_leaves_no_tensor_behind(kind, engine, images):
    """Where t* depends on the image, a graph of it that nobody ran once held on to itself, 240 tensors a gradient."""
    level = SSNILinear(0.2, calibrate(smooth_model(torch.float64), images.double()), t_max=0.6)
    purifier, counts = make(kind, level=level, gradient=engine), []
    for _ in range(4):
        gradient(purifier, images.double())
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert counts[-1] <= counts[1]


@pytest.mark.parametrize("kind", ["agdm", "agdm-through"])
@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_autocast_of_the_caller_holds_in_the_backward_pass(kind, engine, images):
    """Outside of the region as inside of it."""
    purifier = make(kind, gradient=engine).float()
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(purifier, x)
        (inside,) = torch.autograd.grad(value, x, retain_graph=True)
    (outside,) = torch.autograd.grad(value, x)
    assert torch.equal(inside, outside)
    assert not torch.equal(outside, gradient(purifier, images))


def test_weights_that_want_gradients_are_refused(images):
    """They would get none of what guidance owes them."""
    for part in ("score_model", "auxiliary"):
        purifier = make("agdm")
        getattr(purifier, part).requires_grad_(True)
        with torch.no_grad():
            purifier(images.double(), sample_ids=IDS)
        with pytest.raises(ValueError, match="do not reach weights; freeze all networks"):
            gradient(purifier, images.double())
        getattr(purifier, part).requires_grad_(False)


def test_memory_that_guidance_adds_is_counted(images):
    """The graph of grad D holds that of the network it goes through."""
    x, plain = images.double(), make(None)
    of_step = cost.graph_bytes(plain, x)
    assert cost.rebuilt_bytes(make("agdm-through"), x) > of_step
    assert 0 < cost.rebuilt_bytes(make("mse"), x) < cost.rebuilt_bytes(make("agdm"), x)
    kinds = (None, "mse", "agdm-through")
    held = {kind: cost.held_bytes(make(kind, gradient="checkpoint"), x[:1], 7) for kind in kinds}
    assert held[None] < held["mse"] < held["agdm-through"]


@pytest.mark.parametrize("kind", ["mse", "agdm", "agdm-through"])
def test_dropping_the_second_order_term_holds_the_push_constant(kind, images):
    """Against a chain whose pushes were recorded and are added as constants."""
    x = images.double()
    guided = make(kind, "sde")
    first_order = KINDS[kind](20.0).__class__(**{**vars(guided.guidance), "second_order": False})
    dropped = Purifier(smooth_model(torch.float64), 0.3, EulerMaruyama(), 4, guidance=first_order, clip=False)
    assert torch.equal(dropped(x, sample_ids=IDS), guided(x, sample_ids=IDS))
    pushes = []

    class Record(Guide):
        def __call__(self, model, u, t):
            prediction, push = super().__call__(model, u, t)
            pushes.append(push.detach())
            return prediction, pushes[-1]

    class Recorded(type(guided.guidance)):
        def look(self, bound, noise, index):
            return Record(self, bound, noise, index)

    recorded = Recorded(**vars(guided.guidance))
    noise = guided.noise(7, x.device, IDS, 1, 3)
    v = x.clone().requires_grad_()
    u = 2 * v - 1
    one_round = guided.process(torch.full((7,), 0.3, dtype=torch.float64), noise, images=u).rounds[0]
    state = one_round.diffuse(u)
    for step in one_round.reverse:
        state = replace(step, guidance=recorded)(state)
    weights = torch.linspace(-1, 1, 16, dtype=x.dtype).reshape(x[0].shape)
    (expected,) = torch.autograd.grad(((state + 1) / 2 * weights).sum(), v)
    torch.testing.assert_close(gradient(dropped, x), expected)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), gradient(guided, x).flatten(), 0) < 0.999
    assert not first_order.exact
    assert guided.guidance.exact


def test_inference_mode_is_refused_and_a_network_without_gradients_is_noticed(images):
    """Both would drop the guidance silently."""
    guided = make("mse")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        guided(images.double(), sample_ids=IDS)

    class Frozen(TinyClassifier):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.warns(UserWarning, match="switches gradients off"):
        Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=AdversarialGuidance(5.0, auxiliary=Frozen()))


def test_nothing_is_attached_without_gradients(images):
    purifier = make("agdm-through")
    assert not purifier(images.double(), sample_ids=IDS).requires_grad
    with torch.no_grad():
        assert not purifier(images.double(), sample_ids=IDS).requires_grad
    assert all(p.grad is None and not p.requires_grad for p in purifier.parameters())


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
