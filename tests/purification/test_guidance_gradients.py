"""Gradients through guidance: finite differences, memory, and what would drop them silently."""

import gc
from dataclasses import replace

import pytest
import torch
from conftest import TinyClassifier, assert_finite_differences, assert_second_derivative, smooth_model
from conftest import gradient_of_weighted as gradient
from conftest import weighted as loss
from guided import IDS, KINDS, RULES, make

from purify import FixedDt, Purifier, SSNILinear, calibrate
from purify.diffusion.reverse import EulerMaruyama
from purify.purification import cost
from purify.purification.guidance import AdversarialGuidance, Guide


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
