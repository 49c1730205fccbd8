"""Public layouts of consistency models: c_skip and c_out, and networks under both programs' names."""

import pytest
import torch
from conftest import SmoothNet
from diffusers import CMStochasticIterativeScheduler, UNet2DModel
from layouts import small_unet, written
from torch.testing import assert_close

from purify import ContinuousVP, ScoreModel, diffpure, load_score_model
from purify.checkpoints import openai
from purify.networks.consistency import ConsistencyFunction

T = torch.tensor([0.05, 0.3, 0.7], dtype=torch.float64)


def by_scheduler(network, u, t, classes=()):
    """f at u_t as diffusers' own scheduler scales it."""
    schedule, scheduler = ContinuousVP(), CMStochasticIterativeScheduler()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t) / schedule.alpha(t)
    x, shape = u / alpha[:, None, None, None].float(), (-1, 1, 1, 1)
    labels = torch.from_numpy(scheduler.sigma_to_t(sigma.numpy())).float()
    c_skip, c_out = (c.float().reshape(shape) for c in scheduler.get_scalings_for_boundary_condition(sigma))
    seen = x / (sigma.square() + 0.25).sqrt().float().reshape(shape)
    return c_skip * x + c_out * network(seen, labels, *classes).sample


def saved(folder, network):
    network.save_pretrained(folder / "unet")
    CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")
    return folder


def test_a_pipeline_of_diffusers_is_read_as_its_scheduler_scales_it(tmp_path):
    network = small_unet()
    model = load_score_model(saved(tmp_path, network))
    u = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.prediction == "consistency"
    assert model.image_shape == (3, 16, 16)
    with torch.no_grad():
        assert_close(model.denoise(u, T), by_scheduler(network, u, T), rtol=1e-4, atol=1e-4)
    x = torch.rand(2, 3, 16, 16)
    for reverse, steps in (("one-shot", 1), ("consistency", 2)):
        assert diffpure(model, 0.2, steps, reverse)(x).shape == x.shape


def class_conditional():
    """ImageNet's shape, small: resampling residual blocks, scale and shift, 20 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DModel(
            sample_size=32, block_out_channels=(32, 64, 64, 64), layers_per_block=1, attention_head_dim=16,
            down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 3,
            downsample_type="resnet", upsample_type="resnet", norm_num_groups=32, attn_norm_num_groups=32,
            norm_eps=1e-5, resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0,
            num_class_embeds=20,
        ).eval()  # fmt: skip


def test_a_file_of_consistency_models_is_the_same_network_of_diffusers(tmp_path):
    network = class_conditional()
    content = as_published(network)
    model = load_score_model(written(tmp_path / "cd.pt", content), head_channels=16, classes=7)
    u = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    told = torch.full((3,), 7)
    assert model.prediction == "consistency"
    with torch.no_grad():
        assert_close(model.denoise(u, T), by_scheduler(network, u, T, (told,)), rtol=1e-4, atol=1e-4)


def as_published(network):
    """Weights under the program's names, attention as one convolution: all queries, then all keys and all values."""
    shape = openai.Shape(3, 3, (32, 64, 64, 64), 1, (False, False, False, True), True, True)
    own, content = network.state_dict(), {}
    for ours, theirs in openai._names(shape, network).items():
        weight = own[ours]
        if ".attentions." in ours and weight.ndim == 2:
            weight = weight[..., None, None]
        content.setdefault(theirs, []).append(weight)
    return {key: torch.cat(parts) for key, parts in content.items()}


def test_it_is_the_identity_where_its_path_begins():
    model = ScoreModel(ConsistencyFunction(SmoothNet()), ContinuousVP(), "consistency")
    u, t = torch.randn(2, 1, 4, 4), torch.tensor([1e-9, 2e-6], dtype=torch.float64)
    assert_close(model.denoise(u, t), u, rtol=1e-3, atol=1e-3)


def test_its_ends_are_positive():
    with pytest.raises(ValueError, match="sigma_min and sigma_data must be positive"):
        ConsistencyFunction(SmoothNet(), sigma_min=0)
