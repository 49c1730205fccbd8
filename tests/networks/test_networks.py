"""Networks against the original programs' numbers; EDM's denoisers; mixed precision; resizing."""

import json

import pytest
import torch
from conftest import GaussianEps, SmoothNet, smooth_model
from layouts import LAYOUTS
from torch import nn

from purify import ContinuousVP, EDMDenoiser, Purifier, ScoreModel, diffpure
from purify.networks.ddpmpp import DDPMpp, time_features
from purify.networks.embedded import plain_unet
from purify.networks.timesteps import with_double_time

MEAN, COVARIANCE = torch.tensor([0.2, -0.1, 0.4, 0.0]), 0.1 * torch.eye(4) + 0.05
TIMES = torch.linspace(0.01, 0.9, 6, dtype=torch.float64)


def points(n=6, seed=0):
    return torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- DDPM++ -------------------------------------------------------------------------------------------------------


def test_full_size_ddpmpp_has_as_many_parameters_as_the_published_one():
    with torch.device("meta"):
        network = DDPMpp(3, 128, (1, 2, 2, 2), 8, (1,))
    assert sum(p.numel() for p in network.parameters()) == LAYOUTS["full"]["score_sde"]["parameters"]


def test_ddpmpp_by_finite_differences_and_twice_differentiable():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DDPMpp(2, 8, (1, 2), 1, (0,)).double()
    u = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([30.0, 500.0], dtype=torch.float64)
    v, w = (torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(i)) for i in (2, 3))

    def slope(x):  # derivative along v of <network, w>
        x = x.requires_grad_()
        (g,) = torch.autograd.grad((network(x, labels) * w).sum(), x, create_graph=True)
        return (g * v).sum(), x

    h = 1e-5
    first, x = slope(u.clone())
    with torch.no_grad():
        difference = ((network(u + h * v, labels) - network(u - h * v, labels)) * w).sum() / (2 * h)
    assert first.item() == pytest.approx(difference.item(), rel=1e-7)
    (second,) = torch.autograd.grad(first, x)
    difference = (slope(u + h * v)[0] - slope(u - h * v)[0]) / (2 * h)
    assert (second * v).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_time_features_by_hand():
    got = time_features(torch.tensor([0.0, 2.0], dtype=torch.float64), 6)
    angles = torch.tensor([2.0, 0.02, 0.0002], dtype=torch.float64)
    torch.testing.assert_close(got[0], torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(got[1], torch.cat([angles.sin(), angles.cos()]))


# --- EDM ----------------------------------------------------------------------------------------------------------


class GaussianDenoiser(nn.Module):
    """E[u | u + sigma z] for u of N(MEAN, COVARIANCE)."""

    def forward(self, x, sigma):
        sigma = sigma.double()[:, None, None]
        gain = COVARIANCE.double() @ torch.linalg.inv(COVARIANCE.double() + sigma**2 * torch.eye(4))
        residual = x.flatten(1).double() - MEAN.double()
        return (MEAN.double() + (gain @ residual[..., None])[..., 0]).reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("schedule", [ContinuousVP(), ContinuousVP(0.2, 12.0)], ids=["default", "other"])
def test_edm_denoiser_of_gaussian_data_is_their_exact_score(schedule):
    model = ScoreModel(EDMDenoiser(GaussianDenoiser(), schedule), schedule, prediction="x0")
    exact = GaussianEps(MEAN, COVARIANCE)
    exact.schedule = schedule
    expected = ScoreModel(exact, schedule)
    u = points()
    torch.testing.assert_close(model.eps(u, TIMES), expected.eps(u, TIMES), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.denoise(u, TIMES), expected.denoise(u, TIMES), rtol=1e-8, atol=1e-8)


# --- mixed precision ----------------------------------------------------------------------------------------------


def gradients(autocast, exponent, create_graph=False):
    """d/du and d/dt of 2^exponent |eps|^2, and the noise, for a network in mixed precision."""
    model = ScoreModel(SmoothNet().requires_grad_(False), ContinuousVP(), autocast=autocast)
    u = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = TIMES.clone().requires_grad_()
    eps = model.eps(u, t)
    loss = 2.0**exponent * eps.square().sum()
    return [eps.detach(), *torch.autograd.grad(loss, (u, t), create_graph=create_graph)], u


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_gradients_in_half_precision_do_not_depend_on_the_scale_of_the_loss(autocast):
    exact, base = gradients(None, 0)[0], gradients(autocast, 0)[0]
    for got, expected in zip(base, exact, strict=True):
        assert got.dtype == expected.dtype
        relative = ((got - expected).norm() / expected.norm()).item()
        assert 1e-6 < relative < {"bfloat16": 2e-2, "float16": 2e-3}[autocast]
    for exponent in (-60, -24, 12):
        for got, expected in zip(gradients(autocast, exponent)[0][1:], base[1:], strict=True):
            assert torch.equal(got, expected * 2.0**exponent)


def test_plain_float16_would_lose_the_gradient():
    """What the test above would see without scaling: the network's own gradient underflows."""
    network = SmoothNet().requires_grad_(False)
    u = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        output = network(u, 1000 * TIMES.float())
    (g,) = torch.autograd.grad(2.0**-60 * output.float().square().sum(), u)
    assert (g == 0).all()


def test_second_derivatives_in_half_precision():
    second = {}
    for kind in (None, "bfloat16"):
        (_, g, _), u = gradients(kind, 0, create_graph=True)
        (second[kind],) = torch.autograd.grad(g.square().sum() + (g * u).sum(), u)
    assert (second["bfloat16"] - second[None]).norm() < 3e-2 * second[None].norm()
    with pytest.raises(ValueError, match=r"Second derivatives .* vanish in float16; use autocast='bfloat16'"):
        gradients("float16", 0, create_graph=True)


def test_samples_of_other_scales_do_not_disturb_each_other_in_float16():
    model = ScoreModel(SmoothNet().requires_grad_(False), ContinuousVP(), autocast=torch.float16)
    u = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scales = 2.0 ** torch.tensor([0, -40, 30, -80, 1, 2.0])
    rows = model.eps(u, TIMES).square().sum((1, 2, 3))
    (together,) = torch.autograd.grad((rows * scales).sum(), u, retain_graph=True)
    (alone,) = torch.autograd.grad(rows.sum(), u)
    assert torch.equal(together, alone * scales[:, None, None, None])
    (nothing,) = torch.autograd.grad((model.eps(u, TIMES) * 0).sum(), u)
    assert (nothing == 0).all()


def test_weights_that_train_get_plain_gradients():
    model = ScoreModel(SmoothNet(), ContinuousVP(), autocast="float16")
    exact = ScoreModel(SmoothNet(), ContinuousVP())
    got, expected = (
        torch.autograd.grad(m.eps(points().float().repeat(1, 1, 2, 2), TIMES).sum(), list(m.parameters()))
        for m in (model, exact)
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-2, atol=1e-2 * e.abs().max().item())


def test_autocast_belongs_to_the_models_identity_and_unknown_types_are_refused():
    base = ScoreModel(SmoothNet(), ContinuousVP())
    half = base.with_settings(autocast=torch.bfloat16)
    assert half.config() == {**base.config(), "autocast": "bfloat16"}
    assert half.fingerprint() != base.fingerprint()
    with pytest.raises(ValueError, match=r"Unknown autocast type 'float64'.*; known: bfloat16, float16"):
        base.with_settings(autocast=torch.float64)
    for late in (lambda: half.double().eps(points(), TIMES), lambda: half.double().with_settings(autocast="float16")):
        with pytest.raises(ValueError, match=r"A float64 network does not run in .*float16; convert it to float32"):
            late()


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_engines_agree_bit_for_bit_in_half_precision(engine, images):
    grads = []
    for gradient in (engine, "full"):
        model = smooth_model().with_settings(autocast="bfloat16")
        purifier = diffpure(model, 0.3, 4, "ddpm", gradient=gradient)
        x = images.clone().requires_grad_()
        grads += torch.autograd.grad(purifier(x, sample_ids=range(7)).square().sum(), x)
    assert torch.equal(*grads)


# --- resizing -----------------------------------------------------------------------------------------------------


def test_resizing_is_bilinear_there_and_back(images):
    inner = Purifier(smooth_model(size=6), 0.3, "ddpm", 3)
    outer = inner.with_resize()
    big = torch.nn.functional.interpolate(images, (6, 6), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.interpolate(
        inner(big, sample_ids=range(7)), (4, 4), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(outer(images, sample_ids=range(7)), expected, rtol=0, atol=1e-6)
    assert torch.equal(outer(big, sample_ids=range(7)), inner(big, sample_ids=range(7)))


def test_gradient_through_resizing_by_finite_differences(images):
    purifier = Purifier(smooth_model(torch.float64, size=6), 0.3, "ddpm", 3, resize=True, clip=False)
    x = images.double().requires_grad_()
    (g,) = torch.autograd.grad(purifier(x, sample_ids=range(7)).square().sum(), x)
    v, h = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2)), 1e-6
    with torch.no_grad():
        ahead, behind = (purifier(x + s * h * v, sample_ids=range(7)).square().sum() for s in (1, -1))
    assert (g * v).sum().item() == pytest.approx(((ahead - behind) / (2 * h)).item(), rel=1e-7)


def test_resizing_is_part_of_the_config_and_needs_a_size(images):
    purifier = Purifier(smooth_model(size=6), 0.3, "ddpm", 3, resize=True)
    again = Purifier.from_config(json.loads(json.dumps(purifier.config())), smooth_model(size=6))
    assert torch.equal(again(images, sample_ids=range(7)), purifier(images, sample_ids=range(7)))
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 6, 6\).*with_resize\(\)"):
        purifier.with_resize(False)(images)
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 4, 4\) \(C, H, W\), got \(3, 4, 4\)"):
        purifier(images.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="give the ScoreModel an image_shape"):
        Purifier(ScoreModel(SmoothNet(), ContinuousVP()), 0.3, resize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [None, 4])
def test_the_short_way_through_a_plain_unet_is_diffusers_to_the_bit(dtype, classes):
    from diffusers.models.unets.unet_2d import UNet2DModel

    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            8,
            1,
            1,
            block_out_channels=(8, 16),
            layers_per_block=2,
            norm_num_groups=4,
            num_class_embeds=classes,
            **plain,
        )
        u = torch.randn(3, 1, 8, 8, dtype=dtype).requires_grad_()
    unet = with_double_time(unet.to(dtype).eval())
    labels = torch.tensor([0.0, 12.0, 999.0], dtype=dtype)
    told = None if classes is None else torch.tensor([0, 3, 1])
    found = [plain_unet(unet, u, labels, told), unet(u, labels, told).sample]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(output.square().sum(), u)[0] for output in found))
