"""Scripts about the noise level: studies of levels, score norms, what mixed levels and more processes cost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import load_script

from purify.evaluate import Estimate, budgets
from purify.evaluate.metrics import worst_mean


def predictions_of(job):
    """Whether each image of a noise_levels job was right in each draw, stage by stage, from its records."""
    records = [json.loads(line) for line in (job.folder().path / "records.jsonl").read_text().splitlines()]
    for stage in dict.fromkeys(r["attack"] for r in records):
        found = sorted((r["sample"], r["predictions"], r["label"]) for r in records if r["attack"] == stage)
        yield np.array([np.array(answers) == label for _, answers, label in found])


def test_noise_levels(tmp_path, capsys, monkeypatch):
    """The whole script on a tiny budget: runs, resumes, table and plot."""
    script = load_script("noise_levels")
    tiny = replace(budgets.BUDGETS["quick"], steps=1, eot=1, n_examples=4, judge_draws=2)
    monkeypatch.setitem(budgets.BUDGETS, "quick", tiny)
    monkeypatch.setitem(script.CONSTANTS, "digits", (0.1, 0.2))
    monkeypatch.setitem(script.SSNI, "digits", script.SSNI["digits"][:1])
    monkeypatch.setattr(script, "map_jobs", lambda jobs, workers: [job() or job for job in jobs])
    arguments = ["--preset", "quick", "--seeds", "0,1", "--n-examples", "4", "--steps", "2", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    first = (tmp_path / "digits" / "result.json").read_text()
    points = json.loads(first)["points"]
    assert [p["name"].split("(")[0] for p in points] == ["constant", "constant", "ssni-l"]
    assert all(p["worst"]["value"] <= p["attacks"]["pgd-eot"]["value"] for p in points)
    ssni = ["pgd-eot", "pgd-eot-constant-t", "pgd-eot-norm(0.3)", "pgd-eot-low-level(1)"]
    assert [list(p["attacks"]) for p in points[1:]] == [list(points[0]["attacks"]), ssni]
    assert len(points[0]["attacks"]) == len(ssni)
    groups = script.build_jobs(script.parser().parse_args(arguments))
    assert [job.samples().ids.tolist() for job in groups[0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for point, group in zip(points, groups, strict=True):
        found = [predictions_of(job) for job in group]
        worst = np.concatenate([worst_mean(list(stages)) for stages in found])
        assert point["worst"]["value"] == pytest.approx(worst.mean())
    for point, attack in ((points[2], "pgd-eot-constant-t"), (points[0], "pgd-eot")):
        gap = point["attacks"][attack]["value"] - point["worst"]["value"]
        assert point["flattered"]["value"] == pytest.approx(gap)
    assert (tmp_path / "digits" / "curve.png").stat().st_size > 10_000
    assert script.main(arguments) == 0  # everything is on disk
    assert (tmp_path / "digits" / "result.json").read_text() == first
    out = capsys.readouterr().out
    assert "above curve" in out
    gaps = [f"{100 * (points[2][k]['value'] - points[0][k]['value']):.1f} [" for k in ("clean", "worst")]
    line = out[out.index("paired by image") :].splitlines()[2]
    assert line.startswith(points[0]["name"])
    assert all(gap.lstrip("-") in line for gap in gaps)
    for bad in (["--seeds", "0,0"], ["--seeds", "-1"], ["--seeds", "a"], ["--steps", "0"], ["--norm-weight", "nan"]):
        assert script.main([*bad, "--out", str(tmp_path / "bad")]) == 2
        assert not (tmp_path / "bad" / "digits").exists()


def test_above_the_curve_by_hand():
    """A point at the clean accuracy midway between two constants lies above the curve by what it exceeds the middle."""
    script = load_script("noise_levels")
    n = 400

    def point(varies, clean, worst):
        values = {"clean": (np.arange(n) < clean * n) * 1.0, "worst": (np.arange(n) < worst * n) * 1.0}
        e = Estimate(clean, clean, clean)
        return script.Point("p", varies, e, {}, e, 0.1, 0.1, 1, values, e)

    constants = [point(False, 0.9, 0.1), point(False, 0.7, 0.3), point(False, 0.2, 0.35)]
    above = point(True, 0.8, 0.25)
    found = script.above_curve(above, [*constants, above])
    assert found.value == pytest.approx(0.05)
    assert 0.02 < 0.05 - found.low < 0.06
    assert 0.02 < found.high - 0.05 < 0.06
    # Paired: what equals a constant on every image lies on the curve in every resampling.
    same = script.above_curve(point(True, 0.7, 0.3), constants)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert script.above_curve(point(True, 0.95, 0.25), constants) is None
    near = point(True, 0.895, 0.25)
    near.values["clean"] = near.values["clean"][::-1]  # wrong on other images: often beyond the curve when resampled
    assert script.above_curve(near, constants) is None


def test_score_norms(tmp_path, capsys):
    """AUROC of the embedded norm by brute force over all pairs; larger radii stand out more."""
    script = load_script("score_norms")
    found = {"clean": torch.tensor([1.0, 2.0, 3.0, 2.5]), "attacked": torch.tensor([2.5, 2.6, 0.5, 4.0])}
    pairs = [(a > c) + 0.5 * (a == c) for a in found["attacked"].tolist() for c in found["clean"].tolist()]
    assert script.table(found).loc["attacked", "AUROC"] == pytest.approx(np.mean(pairs))
    arguments = ["--n-examples", "6", "--attack-steps", "5", "--eot", "1", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [r["images"] for r in rows[:2]] == ["clean", "pgd, eps 0.03"]
    assert rows[0]["AUROC"] is None
    assert rows[4]["AUROC"] == 1
    assert rows[0]["mean norm"] < rows[1]["mean norm"] < rows[2]["mean norm"]
    assert rows[5]["mean norm"] > 1.1 * rows[0]["mean norm"]
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert "AUROC" in capsys.readouterr().out
    assert script.main(["--n-examples", "1"]) == 2
    assert script.main(["--n-examples", "501"]) == 2
    assert script.main(["--dataset", "cifar10"]) == 2


def test_throughput(tmp_path):
    """Network calls of mixed noise levels: the sum of the samples' steps, however they are batched."""
    script = load_script("throughput")
    out = tmp_path / "t.json"
    arguments = ["--samples", "64", "--attacked", "8", "--batch", "24", "--repeats", "1", "--threads", "1"]
    assert script.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["calls to sum of steps"] == 1
    assert found["calls with the score norm, to steps + draws"] == 1
    assert found["mean to longest"] < found["calls to padding"] < 1  # padding is per chunk of 24
    assert script.main(["--samples", "0"]) == 2


def test_scaling(tmp_path, capsys, monkeypatch):
    """Ratios by hand; two processes are held to 1.7 of one with as many threads as each."""
    script = load_script("scaling")
    speed = {(1, 4): 5.0, (1, 2): 4.0, (2, 2): 6.0, (4, 1): 10.0}
    monkeypatch.setattr(script, "measure", lambda k, t, n, folder: speed[k, t])
    out = tmp_path / "s.json"
    assert script.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text())["samples per second"]["2x2"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x 4 threads: 5.00 samples/s"
    assert lines[2] == "2 x 2 threads: 6.00 samples/s, 1.20 of 1 x 4, 1.50 of 1 x 2 (LESS THAN 1.7)"
    assert lines[3].endswith("2.00 of 1 x 4, 2.50 of 1 x 2")
    assert script.main(["--runs", "1x4,2"]) == 2
    assert script.main(["--runs", "0x4"]) == 2
