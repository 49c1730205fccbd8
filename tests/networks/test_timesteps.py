"""Time features in double precision: diffusers' own in float32, and a slope in time that finite differences confirm."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DModel

from purify import DiscreteVP, Purifier, ScoreModel, zoo
from purify.networks.timesteps import DoubleTimesteps, with_double_time

LABELS = torch.tensor([0.0, 0.3, 17.0, 512.25, 999.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "flip", "shift", "scale"), [(32, True, 0, 1), (32, False, 1, 1), (7, True, 0.5, 2.0)]
)
def test_features_are_diffusers_and_in_float64_the_formulas(channels, flip, shift, scale):
    single = Timesteps(channels, flip, shift, scale)
    double = DoubleTimesteps(single)
    assert torch.equal(double(LABELS.float()), single(LABELS.float()))
    got = double(LABELS)
    assert got.dtype == torch.float64
    half = channels // 2
    powers = np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = torch.from_numpy(np.float32(-np.log(10_000)) * powers).exp().double().numpy()
    for n, label in enumerate(LABELS.tolist()):
        first, second = (f(scale * label * frequencies) for f in ((np.cos, np.sin) if flip else (np.sin, np.cos)))
        expected = [*first, *second, *([0.0] if channels % 2 else [])]
        np.testing.assert_allclose(got[n].numpy(), expected, atol=2e-4 * scale)  # powers may round otherwise
    np.testing.assert_allclose(got.numpy(), single(LABELS.float()).numpy(), atol=2e-4 * scale)


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
            add_attention=False,
        )  # fmt: skip
    return network.eval()


def worst_slope(network):
    """Largest relative error of finite differences of a purified image through t*."""
    model = ScoreModel(network.double(), DiscreteVP.linear(100), "eps")
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()

    def value(t):
        purifier = Purifier(model, level={"kind": "constant", "t_star": t}, steps=3)
        return float((purifier(images, sample_ids=[0, 1], seed=3) * weights).sum())

    t, errors = 0.3017, []
    for h in (1e-5, 2e-5):
        slope, finer = ((value(t + k * h) - value(t - k * h)) / (2 * k * h) for k in (1.0, 0.5))
        errors.append(abs(slope - finer) / abs(finer))
    return max(errors)


def test_finite_differences_through_t_star_agree():
    """diffusers' own features are a staircase in time, on which differences of two steps disagree."""
    assert worst_slope(with_double_time(tiny())) < 1e-6
    assert worst_slope(tiny()) > 1e-4


def test_networks_have_them_and_the_same_weights():
    network = zoo.score_model("digits").network
    assert isinstance(network.unet.time_proj, DoubleTimesteps)
    plain = tiny()
    names = list(plain.state_dict())
    assert list(with_double_time(plain).state_dict()) == names
    u, labels = torch.rand(2, 1, 8, 8), torch.tensor([3.0, 77.0])
    with torch.no_grad():
        single = network(u, labels)
        torch.testing.assert_close(network.double()(u.double(), labels.double()).float(), single, rtol=1e-3, atol=1e-4)
