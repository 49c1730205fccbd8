"""Public checkpoints: the original programs' outputs, full-size layouts, strictness, safety and memory."""

import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from networks import FOLDER, LAYOUTS, example, random_weights, small_weights
from safetensors.torch import save_file

from purify import ContinuousVP, DiscreteVP, load_score_model, zoo
from purify.checkpoints import PUBLIC, openai
from purify.checkpoints.diffusers import SCHEDULES
from purify.checkpoints.unet import unet
from purify.networks.files import read
from purify.reverse import Ancestral

ONE = torch.ones(1)
SMALL = {"score_sde": {}, "guided": {"head_channels": 16}, "improved": {"head_channels": 8}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path / "cache"))


def written(path, weights):
    if path.suffix == ".safetensors":
        save_file({k: w.contiguous() for k, w in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def small_model(name, tmp_path, **settings):
    return load_score_model(written(tmp_path / f"{name}.pt", small_weights(name)), **SMALL[name], **settings)


# --- numbers of the original programs -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_give_the_original_outputs(name, suffix, tmp_path):
    f = example(name)
    model = load_score_model(written(tmp_path / f"small{suffix}", small_weights(name)), **SMALL[name])
    output = model.network(f["x"], f["t"])
    torch.testing.assert_close(getattr(output, "sample", output), f["out"], rtol=0, atol=1e-4)
    # ... and at the times whose labels those are
    t = (f["t"].double() + model.time_offset) / model.time_scale
    torch.testing.assert_close(model.labels(t), f["t"].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.eps(f["x"], t), f["out"][:, :3], rtol=0, atol=1e-4)
    assert not model.network.training
    assert not any(p.requires_grad for p in model.parameters())


def test_scores_of_score_sde(tmp_path):
    model, f = small_model("score_sde", tmp_path), example("score_sde_score")
    score = model.score(f["x"], f["t"].double())
    torch.testing.assert_close(score, f["score"], rtol=0, atol=1e-4 * f["score"].abs().max().item())


def test_ancestral_step_of_guided_diffusion(tmp_path):
    model, f = small_model("guided", tmp_path), example("guided_step")
    assert model.prediction == "learned_variance"
    t = (f["t"].double() + 1) / 1000
    step = Ancestral("learned", clip_denoised=True)(model, f["x"], t, t - 1 / 1000, f["noise"])
    torch.testing.assert_close(step, f["sample"], rtol=0, atol=1e-4)
    alpha = model.schedule.alpha(t).float()[:, None, None, None]  # 0.006 at the last step, where rounding grows
    u0 = model.denoise(f["x"], t).clamp(-1, 1)
    torch.testing.assert_close(u0 * alpha, f["x0"] * alpha, rtol=0, atol=1e-5)


def test_schedules_and_labels_are_the_programs(tmp_path):
    a, b, c = (small_model(name, tmp_path) for name in SMALL)
    assert a.schedule.config() == ContinuousVP().config()
    assert a.labels(torch.tensor([0.5])).item() == 499.5
    assert b.schedule.config() == DiscreteVP.linear(1000).config()
    assert b.labels(torch.tensor([0.001, 1.0]).double()).tolist() == [0, 999]
    assert c.schedule.config() == DiscreteVP.cosine(4000).config()
    # improved-diffusion hands the network i * 1000 / 4000 for its step i from 0
    times = torch.tensor([1, 2, 50, 4000]).double() / 4000
    assert c.labels(times).tolist() == [0, 0.25, 12.25, 999.75]


def test_averaged_weights_of_a_training_state():
    """A file with the real outer structure: the right weights are the averaged ones, by position."""
    f = example("score_sde_training_state")
    model = load_score_model(FOLDER / "score_sde_training_state.pth")
    torch.testing.assert_close(model.network(f["x"], f["t"]), f["out_ema"], rtol=0, atol=1e-4)
    assert (f["out_ema"] - f["out_raw_model"]).abs().max() > 0.1
    assert model.image_shape == (3, 32, 32)


def test_both_spellings_of_numpys_scalar(tmp_path):
    """numpy 1 and 2 name the constructor of the learning rate differently."""
    state = read(FOLDER / "score_sde_training_state.pth")
    torch.save(state, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(FOLDER / "score_sde_training_state.pth") as old:
        spelt = [next(z.read(n) for n in z.namelist() if n.endswith("data.pkl")) for z in (new, old)]
    assert [b"numpy._core" in s for s in spelt] == [np.lib.NumpyVersion(np.__version__) >= "2.0.0", False]
    f = example("score_sde_training_state")
    assert isinstance(state["optimizer"]["param_groups"][0]["lr"], np.float64)
    model = load_score_model(tmp_path / "new.pth")
    torch.testing.assert_close(model.network(f["x"], f["t"]), f["out_ema"], rtol=0, atol=1e-4)


def test_wrong_head_width_gives_other_numbers(tmp_path):
    """The head width is not in the weights: a wrong one loads, and only the numbers tell."""
    f = example("guided")
    path = written(tmp_path / "g.pt", small_weights("guided"))
    wrong = load_score_model(path, head_channels=8).network(f["x"], f["t"]).sample
    assert (wrong - f["out"]).abs().max() > 0.5
    with pytest.raises(ValueError, match=r"head_channels = 12 does not divide the widths \[32\]"):
        load_score_model(path, head_channels=12)
    with pytest.raises(ValueError, match="does not divide"):
        load_score_model(path)  # the published 64


@pytest.mark.parametrize("name", SMALL)
def test_networks_can_be_differentiated_twice(name, tmp_path):
    """Guidance needs second derivatives under attack; fused attention has none."""
    model = small_model(name, tmp_path)
    u = example(name)["x"][:1].requires_grad_()
    (g,) = torch.autograd.grad(model.eps(u, torch.tensor([0.3])).square().sum(), u, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), u)
    assert h.abs().sum() > 0


# --- full-size layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guided", "improved"])
def test_full_size_names_are_those_of_an_independent_map(name):
    layout = LAYOUTS["full"][name]
    with torch.device("meta"):
        weights = {k: torch.empty(shape) for k, shape in layout["shapes"].items()}
    found = openai.read(weights, Path(name))
    assert openai._names(openai._shape(weights, Path(name)), found.network) == layout["diffusers_names"]
    assert {k: w.shape for k, w in found.weights.items()} == {k: w.shape for k, w in found.network.state_dict().items()}
    assert sum(w.numel() for w in found.weights.values()) == layout["parameters"]
    assert found.settings["image_shape"] == {"guided": (3, 256, 256), "improved": (3, 32, 32)}[name]


def load_and_measure(path):
    """Load in a process of its own; its greatest memory beyond that before loading, in bytes."""
    code = f"""
        import re, pathlib, diffusers.models.unets.unet_2d
        from purify import load_score_model
        # unlike ru_maxrss, this does not start from the memory of the process that started this one
        peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        before = peak()
        model = load_score_model({str(path)!r})
        print(peak() - before, sum(p.numel() for p in model.parameters()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    memory, parameters = map(int, done.stdout.split())
    return memory, parameters


def full_size_file(name, tmp_path):
    shapes = LAYOUTS["full"][name]["shapes"]
    if name != "score_sde":
        return written(tmp_path / "full.pt", random_weights(shapes))
    raw = random_weights(shapes)
    model = OrderedDict({"module.sigmas": torch.zeros(1000, dtype=torch.float64)})
    model |= {f"module.{k}": w for k, w in raw.items()}
    lr = np.float64(2e-4)
    state = {
        "optimizer": {"state": {}, "param_groups": [{"lr": lr, "params": list(range(len(raw)))}]},
        "model": model,
        "ema": {"decay": 0.9999, "num_updates": 1, "shadow_params": list(random_weights(shapes, seed=1).values())},
        "step": 1,
    }
    return written(tmp_path / "checkpoint_8.pth", state)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its memory from Linux")
@pytest.mark.parametrize(
    "name",
    ["improved", pytest.param("score_sde", marks=pytest.mark.slow), pytest.param("guided", marks=pytest.mark.slow)],
)
def test_full_size_layouts_load_within_twice_the_files_size(name, tmp_path):
    path = full_size_file(name, tmp_path)
    memory, parameters = load_and_measure(path)
    print(f"{name}: {memory / path.stat().st_size:.2f} of the file's {path.stat().st_size / 1e6:.0f} MB")
    assert parameters == LAYOUTS["full"][name]["parameters"]
    assert memory < 2 * path.stat().st_size
    path.unlink()


# --- diffusers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unet_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip


def saved_pipeline(folder, model, legacy=False, flat=False, **scheduler):
    unet_folder = folder if flat else folder / "unet"
    model.save_pretrained(unet_folder, safe_serialization=not legacy)
    DDPMScheduler(**scheduler).save_pretrained(folder if flat else folder / "scheduler")
    if legacy:
        state = model.state_dict()
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for k, w in state.items():
            new = next((n for n in old if f".{n}." in k), None)
            renamed[k if new is None else k.replace(f".{new}.", f".{old[new]}.")] = w
        torch.save(renamed, unet_folder / "diffusion_pytorch_model.bin")
    return folder


@pytest.mark.parametrize("flat", [False, True], ids=["pipeline", "flat"])
@pytest.mark.parametrize("legacy", [False, True], ids=["current", "legacy"])
def test_diffusers_folders(tmp_path, unet_model, legacy, flat):
    folder = saved_pipeline(tmp_path / "p", unet_model, legacy, flat)
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
def test_schedulers_of_diffusers(tmp_path, unet_model, schedule, prediction):
    options = {"num_train_timesteps": 400, "beta_schedule": schedule, "prediction_type": prediction}
    model = load_score_model(saved_pipeline(tmp_path / "p", unet_model, **options, beta_start=2e-4, beta_end=0.03))
    theirs = DDPMScheduler(**options, beta_start=2e-4, beta_end=0.03)
    times = torch.arange(1, 401, dtype=torch.float64) / 400
    # they add up in float32
    torch.testing.assert_close(model.schedule.alpha_bar(times), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.schedule.betas, theirs.betas, rtol=2e-6, atol=2e-7)
    u = torch.randn(1, 3, 16, 16)
    stepped = theirs.step(model.network(u, torch.tensor([199.0])).sample, 199, u)
    u0 = model.denoise(u, torch.tensor([0.5])).clamp(-1, 1)
    torch.testing.assert_close(u0, stepped.pred_original_sample, rtol=0, atol=2e-4)


def test_other_folders_are_refused(tmp_path, unet_model):
    folder = saved_pipeline(tmp_path / "p", unet_model)
    config = json.loads((folder / "unet" / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel; purification needs an unconditional"),
        ({"num_class_embeds": 10}, "is class-conditional"),
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


# --- strictness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_missing_and_unexpected_keys_are_listed(name, tmp_path):
    weights = small_weights(name)
    key = {"score_sde": "all_modules.6.NIN_1.W"}.get(name, "middle_block.1.qkv.bias")
    weights["extra.weight"] = weights.pop(key)
    if name == "score_sde":
        weights["all_modules.4.Extra.weight"] = weights.pop("extra.weight")
    path = written(tmp_path / "w.pt", weights)
    with pytest.raises(ValueError, match=rf"does not fit this network: missing {key}; unexpected .*xtra\.weight"):
        load_score_model(path, **SMALL[name])


def test_wrong_shapes_types_and_values_are_listed(tmp_path):
    for change, message in (
        (lambda w: w.update({"out.2.bias": torch.zeros(7)}), r"conv_out\.bias has shape \(7,\) instead of \(6,\)"),
        (lambda w: w.update({"out.2.bias": torch.zeros(6).half()}), r"is torch\.float16 instead of torch\.float32"),
        (lambda w: w["out.2.bias"].fill_(torch.nan), r"conv_out\.bias holds NaN"),
        (lambda w: w["out.2.bias"][:1].fill_(torch.inf), r"conv_out\.bias holds NaN or infinity"),
    ):
        weights = small_weights("guided")
        change(weights)
        with pytest.raises(ValueError, match=message):
            load_score_model(written(tmp_path / "w.pt", weights), head_channels=16)


def test_damaged_averages_are_refused(tmp_path):
    state = read(FOLDER / "score_sde_training_state.pth")
    state["ema"]["shadow_params"] = state["ema"]["shadow_params"][:-1]
    with pytest.raises(ValueError, match=r"parameters but .* averaged ones"):
        load_score_model(written(tmp_path / "w.pth", state))
    state = read(FOLDER / "score_sde_training_state.pth")
    shadow = state["ema"]["shadow_params"]
    shadow[4], shadow[5] = shadow[5], shadow[4]
    with pytest.raises(ValueError, match=r"the average of all_modules\.2\.weight has shape"):
        load_score_model(written(tmp_path / "w.pth", state))


def test_unknown_formats_and_names(tmp_path):
    with pytest.raises(ValueError, match=r"is of no known format .* first keys are a\.b"):
        load_score_model(written(tmp_path / "w.pt", {"a.b": torch.zeros(1)}))
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        load_score_model(written(tmp_path / "w.pt", [torch.zeros(1)]))
    conditional = written(tmp_path / "w.pt", {**small_weights("guided"), "label_emb.weight": torch.zeros(10, 128)})
    with pytest.raises(ValueError, match="is class-conditional"):
        load_score_model(conditional)
    with pytest.raises(ValueError, match=r"is no DDPM\+\+ of score_sde"):
        load_score_model(written(tmp_path / "w.pt", {"all_modules.0.W": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"no score network 'nothing'.* none of digits.* score-sde-cif"):
        load_score_model("nothing")
    (tmp_path / "text.pt").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match=r"text\.pt"):
        load_score_model(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_score_model(tmp_path / "text.safetensors")


@pytest.mark.parametrize("share", [0, 1e-9, 0.001, 0.01, 0.3, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(kind, share, tmp_path):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    weights = small_weights("guided")
    if kind == "legacy":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    else:
        written(path, weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(np.ceil(share * len(whole))), len(whole) - 1)])
    with pytest.raises(ValueError, match=r"w\.\w+ is not a readable .* file .*; fetch it again") as error:
        load_score_model(path, head_channels=16)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(compression, tmp_path):
    """Mapped, their compressed bytes would pass for weights."""
    path, packed = written(tmp_path / "w.pt", small_weights("guided")), tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"packed\.pt is a compressed archive, .*fetch the original file again"):
        load_score_model(packed, head_channels=16)


def test_archives_that_were_stored_again_load(tmp_path):
    path, again = written(tmp_path / "w.pt", small_weights("guided")), tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    found = load_score_model(again, head_channels=16)
    assert found.fingerprint() == load_score_model(path, head_channels=16).fingerprint()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (3, torch.zeros(1), r"holds a dict with the key 3"),
        ("out.2.bias", torch.zeros(6).to_sparse(), "sparse_coo on cpu; save dense tensors"),
        ("out.2.bias", torch.zeros(6, device="meta"), "strided on meta; save dense tensors"),
        ("out.2.bias", torch.zeros(6).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn instead of torch\.float32"),
        ("out.2.bias", [torch.zeros(6)], r"out\.2\.bias is a list, not a tensor"),
        ("out.2.bias", None, r"out\.2\.bias is a NoneType, not a tensor"),
        ("out.2.weight", torch.tensor(1.0), "its weights describe none"),
        ("input_blocks.0.0.weight", torch.tensor(1.0), "its weights describe none"),
        ("input_blocks.1.0.out_layers.3.weight", torch.zeros(0, 32, 3, 3), "is empty"),
    ],
)
def test_what_is_no_dense_weight_is_refused(key, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_score_model(written(tmp_path / "w.pt", {**small_weights("guided"), key: value}), head_channels=16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch gives them up
def test_quantized_weights_are_refused(tmp_path):
    value = torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match="a tensor that is quantized; save dense tensors"):
        load_score_model(written(tmp_path / "w.pt", {**small_weights("guided"), "out.2.bias": value}), head_channels=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(model=3), "holds a int in the place of its weights"),
        (lambda s: s.update(model=[torch.zeros(1)]), "holds a list in the place of its weights"),
        (lambda s: s.update(model={1: torch.zeros(1)}), "parameters without names"),
        (lambda s: s["model"].update({"module.all_modules.0.weight": "text"}), "is a str, not a tensor"),
        (lambda s: s["ema"].update(shadow_params=3), "no list of tensors as its averaged weights"),
        (lambda s: s["ema"].update(shadow_params=[1.0, 2.0]), "no list of tensors as its averaged weights"),
        (lambda s: s.update(ema=3), "is of no known format"),
        (lambda s: s.update(model={"all_modules.x": ONE}, ema={"shadow_params": [ONE]}), "is no DDPM"),
        (lambda s: s.update(model={"all_modules.9999999999.x": ONE}, ema={"shadow_params": [ONE]}), "is no DDPM"),
    ],
)
def test_damaged_training_states_are_refused(change, message, tmp_path):
    state = read(FOLDER / "score_sde_training_state.pth")
    change(state)
    with pytest.raises(ValueError, match=message):
        load_score_model(written(tmp_path / "w.pth", state))


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "epsilon"},
        {"schedule": {"kind": "linear", "sigma": 1}},
        {"schedule": 3},
        {"image_shape": 8},
        {"unknown": 1},
    ],
)
def test_purifys_own_description_must_describe_a_score_model(settings, tmp_path):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"mine{suffix}").write_bytes((zoo.WEIGHTS / f"digits{suffix}").read_bytes())
    entry = json.loads((tmp_path / "mine.json").read_text())
    entry["score_model"] |= settings
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"mine\.json describes no score model"):
        load_score_model(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("name", [*PUBLIC, "google/ddpm-cifar10-32"])
def test_offline_says_which_file_to_put_where(name, tmp_path):
    where = tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"{name} is not here.*; run `purify download {name}`.*{where}") as error:
        load_score_model(name)
    assert "\n" not in str(error.value)
    if name in PUBLIC:
        assert PUBLIC[name].file in str(error.value)


def test_files_put_by_hand_are_found_by_name(tmp_path, unet_model):
    folder = tmp_path / "cache" / "score-sde-cifar10"
    folder.mkdir(parents=True)
    source = FOLDER / "score_sde_training_state.pth"
    (folder / "checkpoint_8.pth").write_bytes(source.read_bytes())
    assert load_score_model("score-sde-cifar10").fingerprint() == load_score_model(source).fingerprint()
    saved_pipeline(tmp_path / "cache" / "hub" / "someone--something", unet_model)
    assert load_score_model("someone/something").image_shape == (3, 16, 16)
    saved_pipeline(tmp_path / "cache" / "hub" / "someone--ddpm-v1.5", unet_model)
    assert load_score_model("someone/ddpm-v1.5").image_shape == (3, 16, 16)
    for file in ("folder/w.pt", "folder/w.safetensors", "../ddpm"):
        with pytest.raises(ValueError, match="no file or folder of that path"):
            load_score_model(file)
    folder = tmp_path / "cache" / "guided-imagenet256"
    folder.mkdir()
    (folder / "256x256_diffusion_uncond.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has the sha256 .* instead of a37c32ff"):
        load_score_model("guided-imagenet256")


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="Unknown setting of a score model 'predicton'"):
        load_score_model("nothing", predicton="eps")


def test_settings_override_the_formats(tmp_path):
    model = small_model("improved", tmp_path, schedule=DiscreteVP.linear(1000), time_scale=1000, time_offset=1,
                        image_shape=(3, 32, 32), autocast="bfloat16")  # fmt: skip
    assert model.schedule.steps == 1000
    assert model.labels(torch.tensor([0.5])).item() == 499
    assert model.image_shape == (3, 32, 32)
    assert model.autocast == "bfloat16"
    embedded = load_score_model("digits", autocast="bfloat16")
    assert embedded.autocast == "bfloat16"
    by_path = load_score_model(zoo.WEIGHTS / "digits.safetensors")
    assert by_path.fingerprint() == load_score_model("digits").fingerprint()
    for wrong in ("digits", FOLDER / "score_sde_training_state.pth"):
        with pytest.raises(ValueError, match=r"head_channels|one head"):
            load_score_model(wrong, head_channels=64)


# --- safety -------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ARRAY = np.zeros(1).__reduce__()[0]


def payloads(target):
    return {
        f"{os.name}.system": Evil(os.system, f"touch {target}"),
        "eval": Evil(eval, f"open({str(target)!r}, 'w').close()"),
        "numpy.fromfile": Evil(np.fromfile, str(target)),
        f"{ARRAY.__module__}._reconstruct": np.array([Evil(os.system, f"touch {target}")], dtype=object),
    }


@pytest.mark.parametrize("kind", list(payloads("x")))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickles_are_refused(kind, legacy, tmp_path):
    target = tmp_path / "touched"
    content = {**small_weights("guided"), "more": payloads(target)[kind]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"more than weights \(it asks for {kind}\) and was not loaded") as error:
        load_score_model(tmp_path / "w.pt", head_channels=16)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "add_safe_globals" not in str(error.value)
    assert not target.exists()


def test_malicious_object_inside_a_numpy_scalar_is_refused(tmp_path):
    """The one function that is allowed beyond torch's own must not open a way around."""
    target = tmp_path / "touched"
    scalar = np.float64(0).__reduce__()[0]
    inner = io.BytesIO()
    torch.save(Evil(os.system, f"touch {target}"), inner)
    for payload in (inner.getvalue(), Evil(os.system, f"touch {target}")):
        torch.save({**small_weights("guided"), "more": Evil(scalar, np.dtype("O"), payload)}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"it asks for numpy\.dtypes\.ObjectDType") as error:
            load_score_model(tmp_path / "w.pt", head_channels=16)
        assert "weights_only" not in str(error.value)
        assert not target.exists()


def test_a_malicious_bin_of_diffusers_is_refused(tmp_path, unet_model):
    folder = saved_pipeline(tmp_path / "p", unet_model, legacy=True)
    evil = Evil(os.system, f"touch {tmp_path / 'touched'}")
    torch.save({"a": evil}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        load_score_model(folder)
    assert not (tmp_path / "touched").exists()
