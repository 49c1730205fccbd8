"""Folders of diffusers: current and legacy, their schedulers, and what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from layouts import LAYOUTS, random_weights, saved_pipeline, small_unet

from purify import DiscreteVP, load_score_model
from purify.checkpoints.diffusers import SCHEDULES
from purify.checkpoints.unet import unet


@pytest.mark.parametrize("flat", [False, True], ids=["pipeline", "flat"])
@pytest.mark.parametrize("legacy", [False, True], ids=["current", "legacy"])
def test_diffusers_folders(tmp_path, legacy, flat):
    folder = saved_pipeline(tmp_path / "p", small_unet(), legacy, flat)
    model = load_score_model(folder)
    u, t = torch.randn(2, 3, 16, 16), torch.tensor([0.25, 0.8], dtype=torch.float64)
    theirs = UNet2DModel.from_pretrained(folder if flat else folder / "unet").eval()
    expected = theirs(u, torch.tensor([249, 799])).sample
    torch.testing.assert_close(model.eps(u, t), expected, rtol=0, atol=1e-5)
    assert model.image_shape == (3, 16, 16)
    assert model.prediction == "eps"


def test_full_size_layout_of_diffusers(tmp_path):
    layout = LAYOUTS["full"]["diffusers"]
    network = unet(**layout["config"])
    assert {k: list(w.shape) for k, w in network.state_dict().items()} == layout["shapes"]
    old = layout["legacy_attention_key_names"]
    weights = random_weights(layout["shapes"])
    torch.save({old.get(k, k): w for k, w in weights.items()}, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(layout["config"]))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(layout["scheduler_config"]))
    model = load_score_model(tmp_path)
    assert model.image_shape == (3, 32, 32)
    assert model.schedule.config() == DiscreteVP.linear(1000).config()
    assert all(torch.equal(w, weights[k]) for k, w in model.network.state_dict().items())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_schedulers_of_diffusers(tmp_path, schedule, prediction):
    options = {"num_train_timesteps": 400, "beta_schedule": schedule, "prediction_type": prediction}
    model = load_score_model(saved_pipeline(tmp_path / "p", small_unet(), **options, beta_start=2e-4, beta_end=0.03))
    theirs = DDPMScheduler(**options, beta_start=2e-4, beta_end=0.03)
    times = torch.arange(1, 401, dtype=torch.float64) / 400
    # they add up in float32
    torch.testing.assert_close(model.schedule.alpha_bar(times), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.schedule.betas, theirs.betas, rtol=2e-6, atol=2e-7)
    u = torch.randn(1, 3, 16, 16)
    stepped = theirs.step(model.network(u, torch.tensor([199.0])).sample, 199, u)
    u0 = model.denoise(u, torch.tensor([0.5])).clamp(-1, 1)
    torch.testing.assert_close(u0, stepped.pred_original_sample, rtol=0, atol=2e-4)


def test_other_folders_are_refused(tmp_path):
    folder = saved_pipeline(tmp_path / "p", small_unet())
    config = json.loads((folder / "unet" / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel; purification needs an unconditional"),
        ({"num_class_embeds": 10}, "is conditional on 10 classes; say which it is told"),
    ):
        (folder / "unet" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_score_model(folder)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    for text, message in (
        ('{"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 10}', "not a variance-preserving schedule"),
        ('{"num_train_timesteps": 10, "beta_schedule": "sigmoid"}', "Unknown beta schedule .*'sigmoid'; known: linear"),
        ('{"num_train_timesteps": 10, "beta_schedule": "linear", "rescale_betas_zero_snr": true}', "zero signal"),
        ("{", "cannot be read"),
    ):
        scheduler.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_score_model(folder)
    scheduler.unlink()
    with pytest.raises(ValueError, match="tell the schedule and the prediction"):
        load_score_model(folder)
    told = load_score_model(folder, schedule=DiscreteVP.linear(50), prediction="v")
    assert told.prediction == "v"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither diffusion_pytorch_model\.safetensors nor"):
        load_score_model(folder)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_score_model(tmp_path)
