"""Public combinations from file to leaderboard, with random weights: loaded, purified, attacked by one step of PGD with
exact gradients, judged, checked, ranked. What the answers are worth nobody asks here, only that all goes together."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BENCHMARKS, load_script
from diffusers import UNet2DModel
from layouts import full_size_file, random_weights, saved_pipeline, small_unet, small_weights, written

from purify.__main__ import main
from purify.memory import free_bytes
from purify.networks.ddpmpp import DDPMpp

# Score network -> how its file is loaded. EDM's denoisers have no format of their own: users wrap them.
LOADED = {
    "score_sde": "load_score_model({path!r})",
    "guided": "load_score_model({path!r}, head_channels=16)",
    "improved": "load_score_model({path!r}, head_channels=8)",
    "diffusers": "load_score_model({path!r})",
    "edm": "ScoreModel(EDMDenoiser(Denoiser(Convolution())), ContinuousVP(), prediction='x0')",
}
FULL_LOADED = {
    **dict.fromkeys(LOADED, "load_score_model({path!r})"),
    "edm": "ScoreModel(EDMDenoiser(Denoiser(full({path!r}))), ContinuousVP(), prediction='x0')",
}
PLUG = """
    import families
    import torch
    from purify import ContinuousVP, ScoreModel, load_score_model
    from purify.networks.ddpmpp import DDPMpp
    from purify.networks.edm import EDMDenoiser

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, labels):
            return (self.conv(x) + labels[:, None, None, None]).tanh()

    def full(path):
        with torch.device("meta"):
            network = DDPMpp(3, 128, [2, 2, 2], 4, [1])
        network.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
        return network

    class Denoiser(torch.nn.Module):
        '''Preconditioned as EDM's networks: c_skip x + c_out F(c_in x; ln(sigma) / 4).'''

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, sigma):
            s = sigma[:, None, None, None]
            scale = (s**2 + 0.25).sqrt()
            return 0.25 / scale**2 * x + 0.5 * s / scale * self.network(x / scale, sigma.log() / 4)

    def score():
        return {score}

    def classifier():
        return families.build({family!r}).eval()
"""
# Score network, classifier of that family, more options.
TOY = {
    "score_sde behind WRN-28-10": ("score_sde", "wide_resnet", []),
    "score_sde behind WRN-70-16": ("score_sde", "dm_wide_resnet swish", ["--precision", "bf16"]),
    "EDM behind WRN-28-10": ("edm", "wide_resnet", ["--gradient", "full"]),
    "ddpm-cifar10 behind a pre-activation ResNet": ("diffusers", "preact", ["--memory-budget", "auto"]),
    "improved-diffusion, ODE": ("improved", "resnet", ["--reverse", "ode"]),
    "guided-diffusion behind bottlenecks": ("guided", "resnet bottleneck", ["--purifier", "gdmp", "--set", "rounds=1"]),
}
# The same at full size, every number of it random.
CIFAR10 = {
    "score_sde behind WRN-28-10": ("score_sde", "WRN-28-10", []),
    "score_sde behind WRN-70-16": ("score_sde", "WRN-70-16", []),
    "improved-diffusion behind WRN-28-10": ("improved", "WRN-28-10", ["--precision", "bf16"]),
    "ddpm-cifar10 behind WRN-28-10": ("diffusers", "WRN-28-10", []),
    "EDM behind WRN-28-10": ("edm", "WRN-28-10", []),
}
IMAGENET = {
    "guided-diffusion behind ResNet-50": ("guided", "ResNet-50", []),
    "guided-diffusion behind DeiT-S": ("guided", "DeiT-S", []),
}
FULL = {**CIFAR10, **IMAGENET}


def file_of(network, folder):
    """A small file of the public layout, with random weights."""
    if network == "edm":
        return None
    if network == "diffusers":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DModel.from_config({**small_unet().config, "sample_size": 32}).eval()
        return saved_pipeline(folder / "pipeline", unet, beta_schedule="linear", num_train_timesteps=1000)
    return written(folder / f"{network}.pt", small_weights(network))


def full_file_of(network, folder):
    """The file at full size, with random weights. EDM's has the weights of F alone, a DDPM++ of its size."""
    if network != "edm":
        return full_size_file(network, folder)
    with torch.device("meta"):
        state = DDPMpp(3, 128, [2, 2, 2], 4, [1]).state_dict()
    return written(folder / "edm.pt", random_weights({k: w.shape for k, w in state.items()}))


def plug(folder, score, family):
    """``folder``/plug.py, with functions for a score network and a classifier."""
    (folder / "plug.py").write_text(textwrap.dedent(PLUG).format(score=score, family=family))


def rehearse(options, folder, monkeypatch, capsys, size=32):
    """Run all of it on what ``plug`` names; returns the leaderboard's rows by name."""
    monkeypatch.chdir(folder)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(folder / "images.npz", images=images, labels=np.zeros(2, np.int64))
    parts = ["--data", "images.npz", "--model", "plug.py:classifier", "--score-model", "plug.py:score"]
    effort = ["--attacks", "pgd-eot", "--eps", "8/255", "--attack-steps", "1", "--eot", "1", "--judge-draws", "2"]
    steps = ["--steps", "2", "--t-star", "0.1", "--noise-level", "constant", "--threads", "1", "--out", "run"]
    assert main(["attack", *parts, *effort, *steps, *options]) == 0
    said = capsys.readouterr().out
    assert "gradient, exact" in said
    result = json.loads((folder / "run" / "result.json").read_text())
    (cosine,) = (c["value"] for c in result["self_checks"] if c["name"].startswith("cosine"))
    assert cosine > (0.9 if "bf16" in options else 0.999)
    assert main(["leaderboard", "run", "--out", "board"]) == 0
    capsys.readouterr()
    return {row["name"]: row for row in json.loads((folder / "board" / "leaderboard.json").read_text())}


@pytest.mark.parametrize("combination", TOY)
def test_a_public_combination_at_toy_size(combination, tmp_path, monkeypatch, capsys):
    network, family, options = TOY[combination]
    plug(tmp_path, LOADED[network].format(path=str(file_of(network, tmp_path))), family)
    rows = rehearse(options, tmp_path, monkeypatch, capsys)
    purifier = "gdmp" if "gdmp" in options else "diffpure"
    assert set(rows) == {"no purifier", purifier}


def test_what_a_large_network_takes_is_measured(tmp_path, monkeypatch, capsys):
    plug(tmp_path, LOADED["score_sde"].format(path=str(file_of("score_sde", tmp_path))), "wide_resnet")
    monkeypatch.chdir(tmp_path)
    script = load_script("large")
    assert script.main(["--score-model", "plug.py:score", "--model", "plug.py:classifier", "--time"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["steps"] == 2
    assert min(row["seconds"], row["seconds of a gradient"], row["seconds, said to taken"]) > 0
    assert 0.5 < row["graphs, said to taken"] < 1.25
    assert script.main(["--score-model", "score_sde.pt"]) == 0  # loading alone
    assert "seconds" not in json.loads(capsys.readouterr().out.splitlines()[0])
    assert script.main(["--score-model", "missing.pt"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.huge
@pytest.mark.parametrize("combination", FULL)
def test_a_public_combination_at_full_size(combination, tmp_path, monkeypatch, capsys):
    """From file to leaderboard. The self-check's reference, in float64, is what takes most memory."""
    network, family, options = FULL[combination]
    needed = 32 if combination in IMAGENET else 8
    if free_bytes(torch.device("cpu")) < needed * 2**30:
        pytest.skip(f"takes {needed} GiB of memory")
    path = full_file_of(network, tmp_path)
    plug(tmp_path, FULL_LOADED[network].format(path=str(path)), family)
    size = 224 if combination in IMAGENET else 32
    rows = rehearse(["--n-examples", "1", *options], tmp_path, monkeypatch, capsys, size)
    assert set(rows) == {"no purifier", "diffpure"}


@pytest.mark.huge
@pytest.mark.parametrize("combination", FULL)
def test_memory_of_a_public_combination_at_full_size(combination, tmp_path):
    """Loading, and one step of PGD against what the dry run says of its memory. Run with -s to read the numbers."""
    network, family, _ = FULL[combination]
    if free_bytes(torch.device("cpu")) < (12 if combination in IMAGENET else 4) * 2**30:
        pytest.skip("takes more memory than is free")
    path = full_file_of(network, tmp_path)
    plug(tmp_path, FULL_LOADED[network].format(path=str(path)), family)
    score = str(tmp_path / "plug.py:score") if network == "edm" else str(path)
    steps, dataset = ("1", "imagenet") if combination in IMAGENET else ("4", "cifar10")
    options = ["--dataset", dataset, "--score-model", score, "--model", str(tmp_path / "plug.py:classifier")]
    script = BENCHMARKS / "large.py"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, *options, "--steps", steps, "--time", "--threads", "1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[0])
    print(f"{combination}: {row}")
    assert row["loading"] < 1.1
    assert 0.75 <= row["graphs, said to taken"] <= 1.25
