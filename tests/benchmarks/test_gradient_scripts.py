"""Scripts that differentiate: fidelity, engines, precision, memory. What depends on the clock is not tested."""

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script

from purify import zoo
from purify.data import load_dataset


def test_gradient_fidelity(tmp_path, capsys):
    """What does not depend on the clock: errors, network calls, memory, files."""
    script = load_script("gradient_fidelity")
    arguments = ["--steps", "4", "20", "--batch-size", "3", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    found = json.loads((tmp_path / "fidelity.json").read_text())
    rows = {(r["engine"], r["steps"]): r for r in found["rows"]}
    for steps in (4, 20):
        assert rows["full", steps]["network_calls"] == steps
        assert rows["checkpoint", steps]["network_calls"] == 2 * steps
        assert rows["checkpoint, half fits", steps]["network_calls"] == 2 * steps - steps // 2
        assert rows["full", steps]["relative_error"] < 1e-5
        assert rows["checkpoint", steps]["relative_error"] == rows["full", steps]["relative_error"]
        assert rows["bpda", steps]["cosine"] < rows["adjoint (SDE)", steps]["cosine"] < 0.9999
        assert rows["adjoint (ODE)", steps]["cosine"] < 1
    assert rows["checkpoint", 20]["peak_bytes"] < 1.3 * rows["checkpoint", 4]["peak_bytes"]
    assert rows["full", 20]["peak_bytes"] > 3 * rows["full", 4]["peak_bytes"]
    half = rows["checkpoint, half fits", 20]["peak_bytes"] / rows["full", 20]["peak_bytes"]
    assert 0.4 < half < 0.65
    if importlib.util.find_spec("torchsde") is not None:
        assert rows["torchsde adjoint (DiffPure)", 20]["relative_error"] > 0.05
        assert rows["torchsde, ended at t = 1e-3", 20]["relative_error"] > 0.01
    assert (tmp_path / "fidelity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "relative error of full, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--device", "cuda:9"], ["--t-star", "0"], ["--steps", "0"]])
def test_gradient_fidelity_refuses_bad_input(arguments, tmp_path, capsys):
    assert load_script("gradient_fidelity").main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_peers_reference_is_its_own_forward_process():
    """Our published-variant SDE on torchsde's increments gives torchsde's forward result."""
    torchsde = pytest.importorskip("torchsde")
    script = load_script("gradient_fidelity")
    from purify.diffusion.reverse import EulerMaruyama

    images, labels = load_dataset("digits", "test")
    setting = script.Setting(
        zoo.score_model("digits"), zoo.classifier("digits-standard"), images[:2], labels[:2], 0.02, 20
    )
    peer = script.Peer(setting)
    start = peer.diffuse(2 * setting.x - 1)
    sde = script.ReverseSDE(setting.model, setting.x.shape[1:])
    with torch.no_grad():
        theirs = torchsde.sdeint(sde, start.flatten(1), peer.times, bm=peer.path, method="euler", dt=peer.dt)[-1]
        u, t = start, peer.times[0]
        while t < peer.times[-1]:
            following = torch.minimum(t + peer.dt, peer.times[-1])
            z = (peer.path(t, following) / (following - t).sqrt()).reshape(u.shape)
            now, then = ((1 - v.double()).expand(2) for v in (t, following))
            u = EulerMaruyama()(setting.model, u, now, then, z)
            t = following
    torch.testing.assert_close(theirs.reshape(u.shape), u, rtol=1e-4, atol=1e-4)


def test_engine_overhead(tmp_path, capsys):
    """The passes that are run bare are those that a gradient takes."""
    script, out = load_script("engine_overhead"), tmp_path / "o.json"
    few = [
        "--datasets",
        "digits",
        "--batch-size",
        "1",
        "--repeats",
        "1",
        "--purifiers",
        "diffpure",
        "agdm",
        "likelihood",
    ]
    assert script.main([*few, "--out", str(out)]) == 0
    passes = {row["purifier"]: row["passes"] for row in json.loads(out.read_text())["rows"]}
    assert passes["diffpure"] == {"score forward": 10, "score backward": 10}
    guide = {"guide forward": 1 + 2 * 10, "guide backward": 1 + 2 * 10, "guide twice": 10}
    assert passes["agdm"] == {**guide, "score forward": 10, "score backward": 10}
    assert passes["likelihood"] == {"score forward": 20, "score backward": 20, "score twice": 10}
    assert "digits, agdm: checkpoint, own" in capsys.readouterr().out
    assert script.main(["--purifiers", "nothing", "--out", str(out)]) == 2


def test_the_gpu_script_runs_at_toy_size(tmp_path, monkeypatch):
    """One that failed stands as an error in gpu.json. What depends on the clock is left out."""
    pytest.importorskip("torchsde")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the same graphs, at once
    script = load_script("gpu")
    only = ["memory per step", "waits", "certification", "gradients, bf16+compile"]
    assert script.main(["--toy", "--out", str(tmp_path), "--only", *only]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert '"error"' not in json.dumps(report)
    assert "not asked" in (tmp_path / "gpu.md").read_text()


def test_networks_trained_on_photographs_are_held_against_float64(tmp_path, monkeypatch):
    """A run goes on from its training; what is attacked was not trained on, by the numbers of its columns."""
    script, out = load_script("precision_speed"), tmp_path / "p.json"
    words = ["--toy", "--systems", "photographs", "--repeats", "1", "--train-steps", "20", "--out", str(out)]
    assert script.main(words) == 0
    saved = (tmp_path / "photographs" / "score.pt").stat().st_mtime_ns
    assert script.main(words) == 0
    assert (tmp_path / "photographs" / "score.pt").stat().st_mtime_ns == saved
    assert [row["system"] for row in json.loads(out.read_text())["rows"]] == ["photographs", "photographs"]
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (100, 200, 3))
    monkeypatch.setattr("card.photographs.load_sample_images", lambda: SimpleNamespace(images=[columns, columns]))
    (seen, _), (unseen, y) = script.crops(8, 60, True), script.crops(8, 60, False)
    assert unseen.shape == (60, 3, 8, 8)
    assert torch.equal(y, torch.arange(60) % 2)
    assert seen.max() < unseen.min()
    assert torch.equal(unseen, script.crops(8, 60, False)[0])


def test_half_precision_is_held_against_float64(tmp_path, monkeypatch, capsys):
    script, out = load_script("precision_speed"), tmp_path / "p.json"
    assert script.main(["--toy", "--systems", "digits", "--repeats", "1", "--out", str(out)]) == 0
    whole, half = json.loads(out.read_text())["rows"]
    assert (whole["precision"], half["precision"]) == ("float32", "bf16")
    for what in ("cosine", "cosine, purification"):
        assert 0.99 < half[what] < 1 - 1e-6 < whole[what]
    assert whole["time to float32"] == 1
    assert "ok   digits, bf16: cosine 0.9" in capsys.readouterr().out
    row = {"system": "fashion_mnist", "precision": "bf16", "time to float32": 0.8, "cosine": 0.9}
    assert [line[:4] for line in script.verdicts([row])] == ["MISS", "MISS"]


def test_the_dry_run_predicts_memory_within_a_quarter(tmp_path, monkeypatch, capsys):
    """Guidance and noise levels that hold graphs of their own among them; times depend on the clock."""
    script, out = load_script("dry_run"), tmp_path / "d.json"
    monkeypatch.setattr(script.dryrun, "seconds", script.dryrun.seconds)  # put back what the script replaces
    tiny = ["--datasets", "digits", "--batch-size", "6", "--steps", "4", "--repeats", "1", "--out", str(out)]
    assert script.main([*tiny, "--purifiers", "diffpure", "agdm", "ssni-l"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 9
    for row in rows:
        assert 0.75 <= row["memory, said to taken"] <= 1.25, row
    assert "ok   memory, said to taken: 9 of 9 within 25%" in capsys.readouterr().out
