"""Two networks that answer differently have two fingerprints, with weights or without, and runs tell them apart."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GaussianEps, SmoothNet, TinyClassifier
from torch import nn

from purify import ContinuousVP, ScoreModel, zoo
from purify.cli.attack import main
from purify.fingerprint import weights_digest
from purify.leaderboard import read_run
from purify.leaderboard.groups import one_system


class Scaled(nn.Module):
    def __init__(self, scale, table=None):
        super().__init__()
        self.scale, self.table = scale, table

    def forward(self, u, labels):
        return self.scale * u


class Other(Scaled):
    def forward(self, u, labels):
        return self.scale - u


def test_networks_without_weights_are_told_apart(tmp_path):
    file = tmp_path / "weights.onnx"
    file.write_bytes(b"one")
    networks = [
        *(Scaled(s) for s in (1.0, 2.0, "two", torch.ones(2), np.ones(2), file)),
        Scaled(1.0, {"a": [1, 2]}),
        Scaled(1.0, {"a": [1, 3]}),
        Scaled(1.0, SimpleNamespace(model=SimpleNamespace(path=file))),
        Scaled(SmoothNet.forward),
        Other(1.0),
        nn.Sequential(Scaled(1.0)),
        GaussianEps(torch.zeros(4), torch.eye(4)),
        GaussianEps(torch.ones(4), torch.eye(4)),
    ]
    digests = [ScoreModel(network, ContinuousVP()).fingerprint() for network in networks]
    assert len(set(digests)) == len(digests)
    assert weights_digest(Scaled(1.0, {"a": [1, 2]})) == weights_digest(Scaled(1.0, {"a": [1, 2]}).eval())
    before = weights_digest(Scaled(file))
    file.write_bytes(b"two")
    assert weights_digest(Scaled(file)) != before


def test_a_network_without_weights_has_the_same_digest_in_another_process():
    code = "from test_fingerprint import *; print(weights_digest(Scaled(1.0, {'a': [1, None, torch.ones(2)]})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout.strip() == weights_digest(Scaled(1.0, {"a": [1, None, torch.ones(2)]})), done.stderr


def test_wrappers_change_no_digest():
    network = SmoothNet()
    expected = weights_digest(network)
    assert weights_digest(nn.DataParallel(network)) == expected
    assert weights_digest(torch.compile(network)) == expected
    assert weights_digest(nn.Sequential(torch.compile(network))) == weights_digest(nn.Sequential(network))
    with pytest.raises(ValueError, match=r"The weight first.bias is on the meta device and holds no values; load"):
        weights_digest(SmoothNet().to("meta"))


def test_a_checkpoint_replaced_under_its_name_is_noticed_and_never_merged(tmp_path, capsys):
    """A file of the same name, first with these weights and then with others."""
    network, entry = zoo.classifier("digits-standard"), zoo.describe("digits-standard")
    words = ["--model", str(tmp_path / "net.safetensors"), "--n-examples", "4", "--attacks", "pgd-eot", "--steps", "2"]
    words += ["--attack-steps", "1", "--eot", "1", "--judge-draws", "2", "--noise-level", "constant"]
    zoo.save(tmp_path / "net", network, {k: v for k, v in entry.items() if k in ("kind", "architecture")})
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    with torch.no_grad():
        network.head.bias += 0.1
    zoo.save(tmp_path / "net", network, {k: v for k, v in entry.items() if k in ("kind", "architecture")})
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert "classifier" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert main([*words, "--out", str(tmp_path / "other")]) == 0
    one, two = (next(r for r in read_run(tmp_path / name) if "purifier" in r.config) for name in ("run", "other"))
    assert one.title == two.title
    assert one_system(one, one)
    assert not one_system(one, two)
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]["defences"]["diffpure"]
    for part in ("classifier", "score_model"):
        changed = dataclasses.replace(one, config={**config, part: "0" * 64})
        assert not one_system(one, changed)
    assert one_system(one, dataclasses.replace(one, config={**config, "model_surrogate": "0" * 64, "exact": False}))
    assert weights_digest(TinyClassifier()) != weights_digest(TinyClassifier(3))
