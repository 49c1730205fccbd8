"""Public checkpoints: the original programs' outputs, full-size layouts and memory."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BENCHMARKS
from layouts import FOLDER, LAYOUTS, SMALL, example, full_size_file, small_model, small_weights, written
from torch.utils._python_dispatch import TorchDispatchMode

from purify import ContinuousVP, DiscreteVP, load_score_model
from purify.checkpoints import openai
from purify.diffusion.reverse import Ancestral
from purify.weights.files import read


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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its memory from Linux")
@pytest.mark.parametrize(
    "name",
    ["improved", "diffusers", *(pytest.param(n, marks=pytest.mark.slow) for n in ("score_sde", "guided"))],
)
def test_full_size_layouts_load_in_little_more_than_the_files_size(name, tmp_path):
    path = full_size_file(name, tmp_path)
    command = [sys.executable, BENCHMARKS / "large.py", "--score-model", path]  # in a process of its own
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    print(f"{name}: {row['loading']:.3f} of the file's {row['file MB']:.0f} MB")
    assert row["parameters"] == LAYOUTS["full"][name]["parameters"]
    assert row["loading"] < 1.1 + 16 / row["file MB"]  # what any process needs besides, however small the file
    for file in tmp_path.iterdir():
        file.unlink()


class NewBytes(TorchDispatchMode):
    """Counts the bytes of float32 tensors that are made inside the context, numbers and views not counted."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta and out.ndim and out.dtype == torch.float32:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            self.total += out.nbytes if out.untyped_storage().data_ptr() not in given else 0
        return out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", SMALL)
def test_weights_are_the_files_own_pages(name, suffix, tmp_path):
    """Only what the programs lay out otherwise is copied, once: matrices of attention (and OpenAI's biases)."""
    path = written(tmp_path / f"small{suffix}", small_weights(name))
    with NewBytes() as made:
        model = load_score_model(path, **SMALL[name])
    parts = (
        {"query.weight", "key.weight", "value.weight", "out.weight"}
        if name == "score_sde"
        else {"to_q", "to_k", "to_v"}
    )
    turned = sum(w.nbytes for k, w in model.network.state_dict().items() if any(f".{part}" in k for part in parts))
    assert 0 < made.total == turned
