"""The documented way to published settings, on files of their formats: CIFAR-10, a checkpoint of score_sde, a model."""

import json
import pickle
import re

import numpy as np
import pytest
from conftest import DATA
from torchvision.datasets import CIFAR10

from purify.__main__ import main as purify_command
from purify.cli.attack import main, parser
from purify.cli.parsing import described
from purify.evaluate.description import Evaluation
from purify.evaluate.recipes import RECIPES
from purify.settings import setting

CHECKPOINT = str(DATA / "networks" / "score_sde_training_state.pth")
MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
"""


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Arguments that stand for what a researcher has: a folder of CIFAR-10, a checkpoint, a model."""
    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)
    g = np.random.default_rng(0)
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        content = {"data": g.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": [3, 8, 1]}
        (base / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    (tmp_path / "model.py").write_text(MODEL)
    data = ["--dataset", "cifar10", "--data-dir", str(tmp_path / "data"), "--score-model", CHECKPOINT]
    assert purify_command(["calibrate", *data, "--images", "6", "--out", str(tmp_path / "norms.json")]) == 0
    model = ["--model", f"{tmp_path / 'model.py'}:make", "--calibration", str(tmp_path / "norms.json")]
    return [*data, *model, "--n-examples", "2", "--preset", "paper"]


def test_a_dry_run_at_published_settings(published, capsys):
    assert main([*published, "--purifier", "ssni-n", "--t-star", "0.003", "--max-rows", "4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "cifar10, 2 samples; files, models and shapes are in order" in out
    assert "diffpure ssni-n" in out


def test_published_settings_are_the_defaults(published, tmp_path, capsys):
    """Without further options: DiffPure's SDE in steps of 1e-3, eps 8/255."""
    budget = ["--attack-steps", "1", "--eot", "1", "--judge-draws", "1", "--attacks", "pgd-eot"]
    short = ["--t-star", "0.002", "--out", str(tmp_path / "run")]
    assert main([*published, *budget, *short, "--purifier", "diffpure,ssni-n"]) == 0
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    purifier = config["defences"]["diffpure"]["purifier"]
    assert purifier["reverse"]["kind"] == "sde"
    assert purifier["steps"]["kind"] == "fixed_dt"
    assert purifier["steps"]["dt"] == 1e-3
    level = config["defences"]["diffpure ssni-n"]["purifier"]["level"]
    assert (level["kind"], level["tau"], level["tau_unit"]) == ("ssni-n", 20.0, "norm")
    assert config["attacks"]["diffpure"][0]["eps"] == 8 / 255
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {r["network_calls"] for r in records if r["defence"] == "diffpure"} == {2.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--score-model", "checkpoint_9.pth"], "There is no score network 'checkpoint_9.pth'"),
        (["--score-model", "score-sde-cifar10"], "run `purify download score-sde-cifar10`"),
        (["--model", "Standard"], "could not be loaded"),
        (["--n-examples", "512"], "cifar10 has 3 test images"),
        (["--steps", "3", "--dt", "0.01"], "exclude each other"),
        (["--score-model", "digits"], "digits was trained on digits; take a network of cifar10"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(published, changed, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*published, *changed, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_papers_levels_are_the_defaults_on_published_data():
    """GDMP at 0.036, GNS at 0.125, DiffPure at the data set's."""
    found = {(p, d): setting(p, d).t_star for p in ("gdmp", "gns", "diffpure") for d in ("cifar10", "imagenet")}
    assert found["gdmp", "cifar10"] == 0.036
    assert found["gns", "cifar10"] == 0.125
    assert found["diffpure", "cifar10"] == 0.1
    assert found["diffpure", "imagenet"] == 0.15


# --- recipes of papers ----------------------------------------------------------------------------------------------

SHORT = ["--t-star", "0.002", "--attack-steps", "1", "--eot", "2", "--judge-draws", "2", "--threads", "1"]
EXPECTED = {  # attack, purifiers, gradient, and what else a run must have of its paper
    "diffpure-cifar10-linf": ("autoattack-rand", ["diffpure"], "adjoint", {"draws": 2}),
    "gdmp-cifar10-linf": ("transfer", ["gdmp"], "checkpoint", {"rounds": [1.0] * 4, "scale": 60000.0}),
    "ssni-cifar10-linf": ("pgd-eot-lee-kim", ["diffpure ssni-n"], "surrogate", {"surrogate_steps": 20}),
    "agdm-cifar10-linf": ("autoattack-rand", ["agdm"], "checkpoint", {}),
    "lee-kim-cifar10-linf": ("pgd-eot-lee-kim", ["diffpure"], "checkpoint", {"steps": 5}),
    "diffbreak-cifar10-linf": ("apgd-margin-eot", ["diffpure", "gdmp"], "checkpoint", {}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_rehearsed_with_random_weights(name, published, tmp_path, capsys):
    attack, purifiers, gradient, own = EXPECTED[name]
    auxiliary = ["--set", f"auxiliary={tmp_path / 'model.py'}:make"] if "agdm" in purifiers else []
    fewer = ["--steps", "2"] if gradient == "adjoint" else []
    budget = [*(x for x in published if x not in ("--preset", "paper")), *fewer]
    assert main(["--recipe", name, *budget, *SHORT, *auxiliary, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    assert [d for d in config["defences"] if d != "undefended"] == purifiers
    for purifier in purifiers:
        assert [a["attack"] for a in config["attacks"][purifier]] == [attack]
        assert config["attacks"][purifier][0]["eps"] == 8 / 255
        assert config["defences"][purifier]["purifier"]["gradient"]["kind"] == gradient
    stated = config["defences"][purifiers[0]]
    found = {**stated, **stated["purifier"], **(stated["purifier"]["guidance"] or {})}
    found["steps"] = found["steps"].get("steps")
    found["surrogate_steps"] = found["gradient"].get("steps")
    assert {key: found[key] for key in own} == own
    assert f"Published, not re-measured ({name}" in out
    for number in RECIPES[name].published:
        assert f"{number.robust:.2f}" in out
    assert ("right in all 4 answers to the iterates" in out) == (name == "diffbreak-cifar10-linf")
    again = Evaluation.from_yaml(tmp_path / "run" / "run.yaml")
    assert again.attacks == RECIPES[name].options["attacks"]


def test_options_go_before_a_recipe_wherever_it_stands():
    given = [["--recipe", "lee-kim-cifar10-linf", "--eot", "3"], ["--eot=3", "--recipe=lee-kim-cifar10-linf"]]
    asked = [described(Evaluation, parser().parse_args(words)) for words in given]
    assert asked[0] == asked[1] == Evaluation.from_recipe("lee-kim-cifar10-linf", eot=3)
    assert (asked[0].eot, asked[0].steps, asked[0].attack_steps) == (3, 5, 200)


def test_every_published_number_has_a_source():
    numbers = [number for recipe in RECIPES.values() for number in recipe.published]
    assert all(re.search(r"arXiv|table \d", number.source) for number in numbers)
    assert all(0 <= n.robust <= 100 and (n.clean is None or n.robust < n.clean <= 100) for n in numbers)
    assert all(recipe.source and recipe.differs for recipe in RECIPES.values())
