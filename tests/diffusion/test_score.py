"""ScoreModel: every parametrisation of one and the same denoiser gives the same answers."""

from types import SimpleNamespace

import pytest
import torch
from conftest import GaussianEps, SmoothNet, smooth_model
from diffusers import UNet2DModel
from torch import nn

from purify import ContinuousVP, DiscreteVP, ScoreModel, diffpure
from purify.diffusion.health import times_of
from purify.diffusion.reverse import DDIM

MEAN = torch.tensor([0.2, -0.1, 0.4, 0.0])
COVARIANCE = 0.1 * torch.eye(4) + 0.05


class As(nn.Module):
    """The exact Gaussian model in another parametrisation."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.eps, self.prediction, self.schedule = GaussianEps(MEAN, COVARIANCE), prediction, ContinuousVP()

    def forward(self, u, labels):
        eps = self.eps(u, labels)
        t = labels.double() / 1000
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        x0 = (u - sigma * eps) / alpha
        return {
            "consistency": x0,
            "eps": eps,
            "score": -eps / sigma,
            "x0": x0,
            "v": alpha * eps - sigma * x0,
            "learned_variance": torch.cat([eps, torch.full_like(eps, 0.3)], 1),
        }[self.prediction]


class Flow(nn.Module):
    """The exact Gaussian model as the mean velocity on the straight path from images at 0 to noise at 1."""

    def forward(self, x, labels):
        tau = (labels / 1000).reshape(-1, 1, 1, 1)
        total = (1 - tau[..., 0]) ** 2 * COVARIANCE.double() + tau[..., 0] ** 2 * torch.eye(4)
        residual = x.flatten(1) - (1 - tau.flatten(1)) * MEAN.double()
        whitened = torch.linalg.solve(total, residual)
        noise, image = tau.flatten(1) * whitened, (1 - tau.flatten(1)) * whitened @ COVARIANCE.double() + MEAN.double()
        return (noise - image).reshape(x.shape)


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v", "learned_variance", "consistency", "velocity"])
def test_parametrisations_agree_with_the_analytic_posterior(prediction):
    model = ScoreModel(Flow() if prediction == "velocity" else As(prediction), ContinuousVP(), prediction)
    u = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.01, 0.9, 6, dtype=torch.float64)
    for i in range(6):
        alpha, sigma = model.schedule.alpha(t[i]), model.schedule.sigma(t[i])
        total = alpha**2 * COVARIANCE.double() + sigma**2 * torch.eye(4)
        gain = alpha * COVARIANCE.double() @ torch.linalg.inv(total)
        residual = u[i].flatten() - alpha * MEAN.double()
        torch.testing.assert_close(model.denoise(u, t)[i].flatten(), MEAN.double() + gain @ residual)
        torch.testing.assert_close(model.score(u, t)[i].flatten(), -torch.linalg.inv(total) @ residual)
    torch.testing.assert_close(model.eps(u, t), -model.score(u, t) * model.schedule.sigma(t).reshape(-1, 1, 1, 1))


def test_a_flow_is_the_same_under_every_schedule():
    """Its network sees a point of the straight path, whatever the clock; a DDIM step is one of Euler's on that path."""
    u = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tau, end = torch.linspace(0.1, 0.8, 6, dtype=torch.float64), 0.05
    x = {}
    for schedule in (ContinuousVP(), DiscreteVP.cosine(), DiscreteVP.linear()):
        model = ScoreModel(Flow(), schedule, "velocity")
        t, s = (times_of(schedule, (r / (1 - r)).tolist()) for r in (tau, torch.full((6,), end)))
        column = lambda c: c.reshape(-1, 1, 1, 1)  # noqa: E731
        length, last = (column(schedule.alpha(a) + schedule.sigma(a)) for a in (t, s))
        x[schedule] = DDIM(0.0)(model, u * length, t, s, None) / last
        torch.testing.assert_close(x[schedule], u + column(end - tau) * Flow()(u, 1000 * tau), rtol=1e-8, atol=1e-8)


def test_learned_variance_is_kept_and_its_channels_are_checked():
    model = ScoreModel(As("learned_variance"), ContinuousVP(), "learned_variance")
    assert (model.predict(torch.zeros(1, 1, 2, 2), torch.tensor([0.5])).variance == 0.3).all()
    narrow = ScoreModel(SmoothNet(), ContinuousVP(), "learned_variance")
    with pytest.raises(ValueError, match=r"shape \(1, 2, 4, 4\).* returned \(1, 1, 4, 4\); use prediction='eps'"):
        narrow.eps(torch.zeros(1, 1, 4, 4), torch.tensor([0.5]))


class Returns(nn.Module):
    """A network that returns what ``make`` makes of u."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, u, labels):
        return self.make(u)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda u: u[:, :1], r"predicts eps returns shape \(2, 3, 4, 4\) for these images, this one returned \(2, 1,"),
        (lambda u: u.mean((2, 3), keepdim=True), r"this one returned \(2, 3, 1, 1\)\."),
        (lambda u: torch.cat([u, u], 1), r"this one returned \(2, 6, 4, 4\); use prediction='learned_variance'"),
        (lambda u: (u,), "must return a tensor, or an object with .sample, it returned a tuple"),
    ],
)
def test_what_would_be_broadcast_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ScoreModel(Returns(make), ContinuousVP()).eps(torch.zeros(2, 3, 4, 4), torch.tensor([0.5, 0.5]))


def test_a_network_is_a_module():
    with pytest.raises(ValueError, match=r"network must be a torch.nn.Module, got function"):
        ScoreModel(lambda u, labels: u, ContinuousVP())


def test_labels_of_a_discrete_model_are_exactly_k_minus_1():
    model = ScoreModel(SmoothNet(), DiscreteVP.linear(1000), time_scale=1000, time_offset=1)
    for k in range(1, 1001):
        t_star = torch.tensor([k / 1000], dtype=torch.float64)
        times = torch.cat([t_star * ((k - j) / k) for j in range(k)])
        assert torch.equal(model.labels(times), torch.arange(k - 1, -1, -1).double()), k


def test_diffusers_outputs_are_unwrapped():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    class Wrapped(SmoothNet):
        def forward(self, u, labels):
            return Output(super().forward(u, labels))

    u, t = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.2], dtype=torch.float64)
    plain = ScoreModel(SmoothNet(), ContinuousVP()).eps(u, t)
    assert torch.equal(ScoreModel(Wrapped(), ContinuousVP()).eps(u, t), plain)


def test_fingerprint_sees_weights_and_config():
    base = ScoreModel(SmoothNet(seed=0), ContinuousVP()).fingerprint()
    assert ScoreModel(SmoothNet(seed=0), ContinuousVP()).fingerprint() == base
    assert ScoreModel(SmoothNet(seed=1), ContinuousVP()).fingerprint() != base
    assert ScoreModel(SmoothNet(seed=0), ContinuousVP(0.2)).fingerprint() != base
    assert ScoreModel(SmoothNet(seed=0), ContinuousVP(), "v").fingerprint() != base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "liner"}, r"Unknown schedule 'liner' \(did you mean 'linear'\?\)"),
        ({"schedule": [0.1] * 1000}, r"or DiscreteVP, got \[0.1.*by purify.DiscreteVP\(betas\)"),
        ({"prediction": 3}, "Unknown prediction 3; known"),
        ({"image_shape": 32}, r"image_shape must be \(C, H, W\), got 32"),
        ({"image_shape": (3, 32)}, r"image_shape must be \(C, H, W\)"),
        ({"image_shape": (3, 32, 0.5)}, r"each of image_shape .* got 0.5"),
        ({"time_scale": float("nan")}, "time_scale must be a finite number, got nan"),
        ({"time_offset": "1"}, "time_offset must be a finite number, got '1'"),
        ({"autocast": 16}, "Unknown autocast type '16'"),
        ({"predicton": "eps"}, "Unknown setting of a score model 'predicton'.*; known: autocast, classes, image_shape"),
    ],
)
def test_settings_of_other_names_and_types_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        smooth_model().with_settings(**settings)


def test_unknown_prediction():
    with pytest.raises(
        ValueError, match="Unknown prediction 'noise'; known: consistency, eps, learned_variance, score"
    ):
        ScoreModel(SmoothNet(), ContinuousVP(), "noise")


class Speaking(SmoothNet):
    """Says for which images it was built."""

    def __init__(self, **said):
        super().__init__(3)
        for name, value in said.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("said", "shape"),
    [
        ({"config": {"in_channels": 3, "sample_size": 8}}, (3, 8, 8)),
        ({"config": SimpleNamespace(in_channels=3, sample_size=[6, 8])}, (3, 6, 8)),
        ({"img_channels": 3, "img_resolution": 8}, (3, 8, 8)),
        ({"in_channels": 3, "image_size": 8}, (3, 8, 8)),
        ({"in_channels": 3, "image_size": None}, None),
        ({"config": {"in_channels": 3}}, None),
        ({}, None),
    ],
)
def test_the_shape_is_taken_from_a_network_that_says_it(said, shape):
    network = Speaking(**said)
    for one in (network, torch.nn.DataParallel(network), torch.compile(network)):
        assert ScoreModel(one, "linear").image_shape == shape
    model = ScoreModel(network, "linear")
    assert model.with_settings(prediction="v").image_shape == shape
    assert model.fingerprint() == ScoreModel(Speaking(), "linear").fingerprint()  # as before it was asked
    assert ScoreModel(network, "linear", image_shape=(3, 4, 4)).image_shape == (3, 4, 4)
    if shape is None:
        return
    purifier = diffpure(model, 0.1, 2, "ddpm")
    with pytest.raises(ValueError, match=r"takes images of shape \(3, .*got \(1, 8, 8\); use the score"):
        purifier(torch.rand(2, 1, 8, 8))
    assert purifier.with_resize()(torch.rand(2, 3, 5, 5)).shape == (2, 3, 5, 5)


def test_a_network_of_diffusers_says_its_shape():
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(8, 1, 1, block_out_channels=(32,), layers_per_block=1, **kinds)
    assert ScoreModel(network, "linear").image_shape == (1, 8, 8)


def test_networks_on_the_meta_device_are_refused():
    model = ScoreModel(SmoothNet().to("meta"), "linear")
    with pytest.raises(ValueError, match="The score network is on the meta device, where weights hold no values; load"):
        diffpure(model, 0.1, 2)
