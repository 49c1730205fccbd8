"""Scripts that certify: the draws that certificates take, and their speed."""

import json

import numpy as np
import pytest
import torch
from conftest import load_script

from purify import zoo
from purify.certify import Anytime, Draws, OneShotDenoised, denoised_smoothing
from purify.data import load_dataset


def test_certify_draws_counts_what_certificates_take(tmp_path, capsys):
    """On replayed votes certificates are those of the network, calls too; the table says the mean."""
    script, votes = load_script("certify_draws"), tmp_path / "votes.npy"
    arguments = ["--samples", "3", "--draws", "400", "--threads", "1", "--radii", "0,0.25", "--votes", str(votes)]
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    images = load_dataset("digits", "test")[0][:3]
    smooth = denoised_smoothing(zoo.classifier("digits-standard"), zoo.score_model("digits"), 0.25)
    draws = Draws(100, 400, stop=Anytime((0.0, 0.25)))
    found = smooth.certify(images, draws)
    replayed = script.Replay(smooth.classifier, 0.25, votes=np.load(votes)[0]).certify(images, draws)
    assert torch.equal(replayed.hits, found.hits)
    assert torch.equal(replayed.draws, found.draws)
    assert f" {found.draws.double().mean():.0f} " in first
    assert script.main(arguments) == 0  # from the votes kept
    assert capsys.readouterr().out == first
    assert script.main([*arguments, "--draws", "300"]) == 2
    assert "holds votes of shape (1, 3, 500)" in capsys.readouterr().err
    cascade = ["--samples", "2", "--draws", "200", "--sigma", "0.25,0.7", "--radii", "0"]
    assert script.main(cascade) == 0
    assert "in looks" not in capsys.readouterr().out


def test_certify_speed(tmp_path, monkeypatch):
    """Ours, the plain loop and the bare passes classify equally many noisy images, and give the same answers."""
    script = load_script("certify_speed")
    seen = []
    forward = OneShotDenoised.forward
    monkeypatch.setattr(OneShotDenoised, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    out = tmp_path / "t.json"
    arguments = ["--samples", "2", "--draws", "300", "--plain-batch", "250", "--max-rows", "128", "--repeats", "1"]
    assert script.main([*arguments, "--sigma", "0.1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ratio = found["plain loop, seconds per image"] / found["ours, seconds per image"]
    assert found["images per second, ours to plain loop"] == pytest.approx(ratio)
    answers, rows = {}, {}
    for name, work in script.build_works(script.parser().parse_args([*arguments, "--sigma", "0.1"])).items():
        seen.clear()
        answers[name], rows[name] = work(), list(seen)
    for system in ("cascade", "cohen", "ssn"):
        works = script.build_works(script.parser().parse_args([*arguments[:2], "--draws", "20", "--system", system]))
        assert list(works)[-2:] == [script.OURS, script.BARE]
        works[script.OURS]()
    assert rows[script.PLAIN] == [100, 250, 50] * 2
    assert rows[script.SAME_BATCH] == [100, 128, 128, 44] * 2
    assert rows[script.OURS] == [100, 100, 120, 120, 120, 120, 120]
    assert max(rows[script.BARE]) == 128
    assert {sum(r) for r in rows.values()} == {800}
    labels = script.load_dataset("digits", "test")[1][:2].tolist()
    assert answers[script.OURS] == answers[script.PLAIN] == answers[script.SAME_BATCH] == labels
    assert script.main(["--samples", "0"]) == 2
