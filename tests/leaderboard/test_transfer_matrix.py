"""Adversarial images of one run judged on another, against the models called by hand."""

import json
import shutil

import numpy as np
import pytest
import torch

from purify import zoo
from purify.cli.attack import main as attack
from purify.cli.compare import main
from purify.diffusion.noise import derive_seed
from purify.evaluate.attacking import prepare
from purify.evaluate.description import Evaluation
from purify.leaderboard.groups import measurements
from purify.leaderboard.transfer import parties

SMALL = [
    *("--n-examples", "6", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--threads", "1"),
    *("--noise-level", "constant", "--attacks", "random-noise,transfer,pgd-eot", "--batch-size", "4"),
]
NAMES = ["undefended", "diffpure, A", "adversarial training", "diffpure, B"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same attacks on two purifiers; the models without one are alike in both."""
    folder = tmp_path_factory.mktemp("runs")
    assert attack([*SMALL, "--steps", "2", "--t-star", "0.1", "--out", str(folder / "A")]) == 0
    assert attack([*SMALL, "--steps", "3", "--t-star", "0.2", "--out", str(folder / "B")]) == 0
    return folder


@pytest.fixture(scope="module")
def matrix(runs):
    assert main(["--transfer", str(runs / "A"), str(runs / "B"), "--out", str(runs / "T")]) == 0
    return json.loads((runs / "T" / "transfer.json").read_text())


def test_the_diagonal_is_what_the_runs_say(runs, matrix):
    assert list(matrix["parties"]) == NAMES
    for name, party in matrix["parties"].items():
        result = json.loads((runs / party["run"] / "result.json").read_text())["results"][party["defence"]]
        assert matrix["matrix"][name][name] == result[party["attack"]]["mean"]
        assert matrix["clean"][name] == result["clean"]["mean"]
        stages = set(result) - {"clean", "random-noise", "worst case"}
        assert result[party["attack"]]["mean"]["value"] == min(result[s]["mean"]["value"] for s in stages)


def test_other_cells_are_answers_of_the_target_on_its_own_judging_draws(runs, matrix):
    records = [json.loads(line) for line in (runs / "B" / "records.jsonl").read_text().splitlines()]
    labels = {r["sample"]: r["label"] for r in records}
    bare = {"undefended": zoo.classifier("digits-standard"), "adversarial training": zoo.classifier("digits-at")}
    for target, classifier in bare.items():
        for source in NAMES:
            party = matrix["parties"][source]
            folder = runs / party["run"] / "adversarial" / party["defence"] / party["attack"]
            right = [
                int(classifier(torch.from_numpy(np.load(folder / f"{i}.npy"))[None]).argmax(1)) == labels[i]
                for i in range(6)
            ]
            assert matrix["matrix"][source][target]["value"] == pytest.approx(np.mean(right))


def test_a_purifier_as_a_target(runs, matrix):
    prepared = prepare(Evaluation.from_yaml(runs / "B" / "run.yaml"))
    model = next(d.model for d in prepared.defences if d.name == "diffpure")
    seed = derive_seed(0, "judge")
    stored = [json.loads(line) for line in (runs / "T" / "records.jsonl").read_text().splitlines()]
    for record in stored:
        if record["defence"] == "diffpure, B" and record["attack"] == "diffpure, A":
            attacked = runs / "A" / "adversarial" / "diffpure" / matrix["parties"]["diffpure, A"]["attack"]
            x = torch.from_numpy(np.load(attacked / f"{record['sample']}.npy"))[None]
            answers = [int(model(x, sample_ids=[record["sample"]], draw=d, seed=seed).argmax(1)) for d in range(3)]
            assert record["predictions"] == answers
    cell = [r for r in stored if (r["defence"], r["attack"]) == ("diffpure, B", "diffpure, A")]
    assert len(cell) == 6
    right = np.mean([[p == r["label"] for p in r["predictions"]] for r in cell])
    assert matrix["matrix"]["diffpure, A"]["diffpure, B"]["value"] == pytest.approx(right)


def test_it_resumes_and_draws(runs, matrix, tmp_path, capsys):
    shutil.copytree(runs / "T", tmp_path / "T")
    file = tmp_path / "T" / "records.jsonl"
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:20]))
    command = ["--transfer", str(runs / "A"), str(runs / "B"), "--out", str(tmp_path / "T")]
    assert main(command) == 0
    assert sorted(file.read_text().splitlines(True)) == sorted(lines)
    assert len(lines) == 4 * 3 * 6
    assert json.loads((tmp_path / "T" / "transfer.json").read_text()) == matrix
    out = capsys.readouterr().out
    assert "6 images of digits, Linf 0.3" in out
    for name, party in matrix["parties"].items():
        assert f"{name} ({party['attack']})" in out
    assert (tmp_path / "T" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 0  # nothing is left to judge
    assert len(file.read_text().splitlines()) == len(lines)


def test_what_cannot_be_paired_is_said_in_a_sentence(runs, tmp_path, capsys):
    shutil.copytree(runs / "A", tmp_path / "A")
    other, fewer = tmp_path / "other", tmp_path / "fewer"
    assert attack([*SMALL, "--steps", "2", "--eps", "0.2", "--out", str(other)]) == 0
    assert attack([*SMALL, "--steps", "2", "--n-examples", "5", "--out", str(fewer)]) == 0
    capsys.readouterr()
    for folder, words in ((other, "Linf 0.2) and"), (fewer, "(5 images of digits, Linf 0.3)")):
        assert main(["--transfer", str(runs / "A"), str(folder), "--out", str(tmp_path / "T")]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "a transfer matrix needs runs of the same --data, --n-examples, --threat-model and --eps." in error
    (tmp_path / "A" / "run.yaml").unlink()
    assert main(["--transfer", str(tmp_path / "A"), "--out", str(tmp_path / "T")]) == 2
    assert "has no run.yaml, so its defences cannot be built again" in capsys.readouterr().err
    text = (runs / "A" / "run.yaml").read_text().replace("t_star: 0.1", "t_star: 0.12")
    (tmp_path / "A" / "run.yaml").write_text(text)
    assert main(["--transfer", str(tmp_path / "A"), "--out", str(tmp_path / "T")]) == 2
    assert "was made with other models than its run.yaml names today: defences.diffpure" in capsys.readouterr().err
    assert main([str(runs / "A")]) == 2
    assert "There is nothing to compare" in capsys.readouterr().err
    assert main([str(runs / "A"), str(runs / "B"), "--out", "somewhere"]) == 2
    assert "--out and --device are for --transfer" in capsys.readouterr().err
    assert main(["--transfer", str(runs / "A"), "--defence", "diffpure"]) == 2
    assert "leave --defence out" in capsys.readouterr().err
    assert not (tmp_path / "T").exists()


def test_parties_have_names_of_their_own(runs, tmp_path):
    shutil.copytree(runs / "B", tmp_path / "A")
    assert [p.name for p in parties([runs / "A"])] == ["undefended", "diffpure", "adversarial training"]
    both = [p.name for p in parties([runs / "A", tmp_path / "A"])]
    assert both == ["undefended", f"diffpure, {runs / 'A'}", "adversarial training", f"diffpure, {tmp_path / 'A'}"]
    assert len(measurements([runs / "A", runs / "B"])) == 4
