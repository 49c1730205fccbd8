"""Radii at another alpha from a run's records: those of a run that had this alpha."""

import json
import shutil

import numpy as np
import pytest
from kills import lines

from purify.certify.bounds import betting_bound
from purify.certify.sampling import Anytime, Draws
from purify.cli.certify import main
from purify.evaluate.recompute import recompute

RUN = [
    *("--method", "cohen,multiscale,ssn,dssn", "--sigma", "0.1,0.7", "--n-examples", "5", "--selection-draws", "10"),
    *("--draws", "150", "--attack-examples", "0", "--threads", "1"),
]
ANYTIME = [
    *("--method", "cohen,multiscale", "--sigma", "0.25,0.7", "--n-examples", "6", "--draws", "200"),
    *("--attack-examples", "0", "--threads", "1"),
    *("--sampling", "anytime", "--radii", "0,0.25,0.5"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run at two alphas, and one with anytime sampling."""
    folder = tmp_path_factory.mktemp("runs")
    for name, run in (("0.2", RUN), ("0.001", RUN), ("anytime", ANYTIME)):
        alpha = "0.001" if name == "anytime" else name
        assert main([*run, "--alpha", alpha, "--out", str(folder / name)]) == 0
    return folder


def test_it_is_what_drawing_again_gives(runs, capsys):
    assert main(["--recompute", str(runs / "0.2"), "--alpha", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "L2, alpha 0.001: certified accuracy" in text
    assert "inside" not in text
    found = json.loads((runs / "0.2" / "result-alpha-0.001.json").read_text())["results"]
    drawn = json.loads((runs / "0.001" / "result.json").read_text())["results"]
    assert found["multiscale"].pop("draws") > drawn["multiscale"].pop("draws")  # those that were spent, at more scales
    assert found == drawn
    assert {r["attack"] for r in lines(runs / "0.2")} == {"certificate"}  # the records stay


def test_the_runs_own_alpha_gives_its_own_results(runs):
    for name, alpha in (("0.2", 0.2), ("anytime", 0.001)):
        stored = json.loads((runs / name / "result.json").read_text())["results"]
        found = recompute(runs / name, alpha)
        assert {n: r.summary.acr.value for n, r in found.items()} == {n: r["acr"]["value"] for n, r in stored.items()}
        assert {n: r.summary.draws for n, r in found.items()} == {n: r["draws"] for n, r in stored.items()}


def test_anytime_radii_are_those_of_the_looks_taken(runs):
    looks = np.array(Draws(100, 200, stop=Anytime((0.0,))).looks)
    for alpha in (0.1, 1e-5):
        records = [r for r in lines(runs / "anytime") if r["defence"] == "cohen 0.25"]
        bounds = [betting_bound(r["hits"], looks[: len(r["hits"])], alpha).max() for r in records]
        found = recompute(runs / "anytime", alpha, radii=(0.0,))["cohen 0.25"]
        right = [r["selected"] == r["label"] for r in records]
        assert (found.summary.correct >= 0).tolist() == [b >= 0.5 and ok for b, ok in zip(bounds, right, strict=True)]


def test_what_was_not_drawn_is_refused_in_one_sentence(runs, tmp_path, capsys):
    """At a larger alpha a cascade that could not decide may go on to a scale that it has not asked."""
    stages = {r["sample"]: r["stage"] for r in lines(runs / "0.001") if r["defence"] == "multiscale"}
    further = {r["sample"]: r["stage"] for r in lines(runs / "0.2") if r["defence"] == "multiscale"}
    assert any(further[i] > stages[i] for i in stages)
    assert main(["--recompute", str(runs / "0.001"), "--alpha", "0.2"]) == 2
    error = capsys.readouterr().err
    assert "would go on to sigma 0.1, for which nothing was drawn; choose a smaller alpha, or certify again." in error
    assert main(["--recompute", str(runs / "0.2"), "--alpha", "1e-60"]) == 2
    assert "every image would abstain; make at least" in capsys.readouterr().err
    for words, what in (
        (["--recompute", str(tmp_path)], "holds no finished run"),
        (["--recompute", str(runs / "0.2"), "--sigma", "2"], "takes --alpha and --radii, all else is the run's; leave"),
        (["--recompute", str(runs / "0.2"), "--precision=float32"], "all else is the run's; leave --precision out."),
    ):
        assert main(words) == 2
        assert what in capsys.readouterr().err


def test_old_and_damaged_records(runs, tmp_path, capsys):
    """Records of 0.2 lack the class of abstentions, the scales passed and the looks of an early stop."""

    def changed(name, change, draws=None):
        folder = tmp_path / name
        shutil.copytree(runs / ("anytime" if draws else "0.2"), folder)
        records = lines(folder)
        for record in records:
            change(record)
        (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if draws:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["config"]["systems"]["cohen 0.25"]["draws"] = draws
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return main(["--recompute", str(folder), "--alpha", "0.01"]), capsys.readouterr().err

    assert changed("old", lambda r: r.pop("selected"))[0] == 0
    assert "lack the counts of the scales passed" in changed("older", lambda r: r.pop("passed", None))[1]
    assert "were changed by hand" in changed("damaged", lambda r: r.pop("counts"))[1]
    early = {"n0": 100, "n": 200, "alpha": 0.001, "stop": {"radius": 0.0, "looks": 4}}
    assert "stopped early by the rule of version 0.2" in changed("early", lambda r: None, early)[1]
