"""Half precision leaves times exact: whole numbers above 256 are not bfloat16's, which would make 1000 of 999."""

from functools import partial

import pytest
import torch
from conftest import smooth_model
from layouts import SMALL, saved_pipeline, small_model, small_unet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from purify import ContinuousVP, ScoreModel, diffpure, load_score_model, zoo
from purify.diffusion.classes import Predicted
from purify.diffusion.precision import PRECISIONS
from purify.fingerprint import unwrapped
from purify.networks.edm import EDMDenoiser


class LogSigmaDenoiser(nn.Module):
    """As EDM's preconditioned networks: a convolution that sees log(sigma) / 4."""

    def __init__(self):
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(1, 3)

    def forward(self, x, sigma):
        noise = self.time((sigma.log() / 4)[:, None].to(self.time.weight.dtype))
        return self.conv(x) + noise[:, :, None, None]


def edm(path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScoreModel(EDMDenoiser(LogSigmaDenoiser()), ContinuousVP(), "x0", (3, 8, 8))


def diffusers(path):
    settings = {"beta_schedule": "linear", "num_train_timesteps": 1000}
    return load_score_model(saved_pipeline(path / "pipeline", small_unet(), **settings))


ADAPTERS = {name: lambda path, name=name: small_model(name, path) for name in SMALL}  # score_sde (DDPM++), OpenAI's
ADAPTERS |= {"diffusers": diffusers, "edm": edm, "embedded": lambda path: zoo.score_model("digits")}


def times_of(model, k):
    """The time whose label is ``k``."""
    return torch.full((2,), (k + model.time_offset) / model.time_scale, dtype=torch.float64)


def seen(model, t):
    """What the first linear layer, which embeds the time, is given, and the answer."""
    found = []
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    hook = first.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0]))
    channels = (model.image_shape or (3,))[0]
    u = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    try:
        return found, model.eps(u, t)
    finally:
        hook.remove()


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_times_are_exact_under_autocast(adapter, autocast, tmp_path):
    model = ADAPTERS[adapter](tmp_path).eval()
    for label in (257.0, 999.0):
        t = times_of(model, label)
        assert model.labels(t).tolist() == [label] * 2
        (exact,), eps = seen(model, t)
        (features,), half = seen(model.with_settings(autocast=autocast), t)
        assert features.dtype == torch.float32
        assert torch.equal(features, exact)
        assert torch.nn.functional.cosine_similarity(eps.flatten(), half.flatten(), dim=0) > 0.99
        (other,), _ = seen(model, times_of(model, label + 1))
        assert not torch.equal(features, other)


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_times_are_rounded_once_in_networks_that_are_half_themselves(adapter, tmp_path):
    """Features of the exact label in bfloat16, not features of a label in bfloat16."""
    model = ADAPTERS[adapter](tmp_path).eval()
    t = times_of(model, 999.0)
    (exact,), _ = seen(model, t)
    (features,), _ = seen(model.bfloat16(), t)
    torch.testing.assert_close(features, exact.bfloat16(), rtol=0, atol=0)


def test_every_precision_is_one_that_networks_run_in():
    for name, run in PRECISIONS.items():
        model = smooth_model().train().with_precision(name)
        assert (model.autocast, hasattr(model.network, "_orig_mod")) == (run.autocast, run.compiled)
        assert model.training
        back = model.with_precision("float32")
        assert (back.autocast, back.network) == (None, network := unwrapped(model.network))
        assert network is back.with_precision(name).with_precision("bf16").network


def test_another_precision_leaves_the_model_as_it_is():
    """Not even the mode of its parts: dropout that was switched off stays off."""
    network = nn.Sequential(nn.Dropout(0.5)).eval()
    classifier = nn.Flatten().eval()
    told = zoo.score_model("digits-classes").with_settings(classes=Predicted(classifier))
    for model in (ScoreModel(network, ContinuousVP()), told):
        for name in PRECISIONS:
            assert model.training  # as modules come
            model.with_precision(name)
    assert not network.training
    assert not classifier.training
    assert told.autocast is None


@pytest.mark.parametrize("name", ["bf16", "float32+compile"])
def test_another_precision_is_told_the_same_classes(name):
    model = zoo.score_model("digits-classes").eval()
    classes = nn.functional.one_hot(torch.tensor([1, 2, 3]), 11).float()
    assert torch.equal(model.told(classes).with_precision(name).bound, classes)


@pytest.mark.parametrize("precision", ["float32+compile", "bf16+compile"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_purifiers_are_the_same_up_to_rounding(precision, backend, monkeypatch):
    """At most two graphs for all batches (one without gradients), also after the wrapper was made anew for each."""
    counts = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counts))
    torch._dynamo.reset()
    plain = diffpure(smooth_model(), 0.2, 4, "ddpm").with_precision(precision.removesuffix("+compile"))
    for n in (7, 3, 16, 5):
        compiled = diffpure(smooth_model(), 0.2, 4, "ddpm").with_precision(precision)
        x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(n))
        found = []
        for purifier in (compiled, plain):
            z = x.clone().requires_grad_()
            out = purifier(z, sample_ids=torch.arange(n))
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), z)[0]))
        torch.testing.assert_close(*found, rtol=1e-3, atol=5e-3 if "bf16" in precision else 1e-6)
    assert 1 <= counts.frame_count <= 2
    assert compiled.score_model.fingerprint() == plain.score_model.fingerprint()


def test_what_cannot_be_compiled_is_said(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    purifier = diffpure(smooth_model(), 0.2, 4, "ddpm").with_precision("float32+compile")
    with pytest.raises(ValueError, match=r"cannot be compiled here .*no compiler.*; use a precision without \+compile"):
        purifier(torch.rand(2, 1, 4, 4))
