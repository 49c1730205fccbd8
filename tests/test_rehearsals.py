"""Public combinations from file to leaderboard, with random weights: loaded, purified, attacked by one step of PGD with
exact gradients, judged, checked, ranked. What the answers are worth nobody asks here, only that all goes together."""

import json
import textwrap

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from layouts import LAYOUTS, random_weights, saved_pipeline, small_unet, small_weights, written

from purify.__main__ import main

# Score network -> how its file is loaded. EDM's denoisers have no format of their own: users wrap them.
LOADED = {
    "score_sde": "load_score_model({path!r})",
    "guided": "load_score_model({path!r}, head_channels=16)",
    "improved": "load_score_model({path!r}, head_channels=8)",
    "improved, full size": "load_score_model({path!r})",
    "diffusers": "load_score_model({path!r})",
    "edm": "ScoreModel(EDMDenoiser(Denoiser()), ContinuousVP(), prediction='x0')",
}
PLUG = """
    import families
    import torch
    from purify import ContinuousVP, ScoreModel, load_score_model
    from purify.networks.edm import EDMDenoiser

    class Denoiser(torch.nn.Module):
        '''Preconditioned as EDM's networks: c_skip x + c_out F(c_in x; ln(sigma) / 4).'''

        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, sigma):
            s = sigma[:, None, None, None]
            scale = (s**2 + 0.25).sqrt()
            return 0.25 / scale**2 * x + 0.5 * s / scale * (self.conv(x / scale) + s.log() / 4).tanh()

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


def file_of(network, folder):
    """The public file, with random weights."""
    if network == "edm":
        return None
    if network == "diffusers":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DModel.from_config({**small_unet().config, "sample_size": 32}).eval()
        return saved_pipeline(folder / "pipeline", unet, beta_schedule="linear", num_train_timesteps=1000)
    if network.endswith("full size"):
        return written(folder / "full.pt", random_weights(LAYOUTS["full"][network.partition(",")[0]]["shapes"]))
    return written(folder / f"{network}.pt", small_weights(network))


def rehearse(network, family, options, folder, monkeypatch, capsys):
    """Run all of it; returns the leaderboard's rows by name."""
    monkeypatch.chdir(folder)
    score = LOADED[network].format(path=str(file_of(network, folder)))
    (folder / "plug.py").write_text(textwrap.dedent(PLUG).format(score=score, family=family))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(folder / "images.npz", images=images, labels=np.zeros(2, np.int64))
    parts = ["--data", "images.npz", "--model", "plug.py:classifier", "--score-model", "plug.py:score"]
    effort = ["--attacks", "pgd-eot", "--eps", "8/255", "--attack-steps", "1", "--eot", "1", "--judge-draws", "2"]
    size = ["--steps", "2", "--t-star", "0.1", "--noise-level", "constant", "--threads", "1", "--out", "run"]
    assert main(["attack", *parts, *effort, *size, *options]) == 0
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
    rows = rehearse(network, family, options, tmp_path, monkeypatch, capsys)
    purifier = "gdmp" if "gdmp" in options else "diffpure"
    assert set(rows) == {"no purifier", purifier}


@pytest.mark.slow
def test_a_public_network_at_full_size(tmp_path, monkeypatch, capsys):
    """improved-diffusion's 52 million parameters, in half precision."""
    options = ["--n-examples", "1", "--precision", "bf16"]
    rehearse("improved, full size", "wide_resnet", options, tmp_path, monkeypatch, capsys)
