"""benchmarks/defences.py: it measures, resumes, and draws what is there."""

import json

from conftest import load_script

from purify import PURIFIERS


def test_defences_are_measured_once_and_drawn_with_the_baseline(tmp_path, capsys):
    script = load_script("defences")
    assert set(PURIFIERS) <= set(script.SYSTEMS)
    assert set(script.available("digits")) == set(script.SYSTEMS)
    assert "adbm" not in script.available("fashion_mnist")
    few = ["--only", "adversarial training;consistency, 1 step", "--images", "2", "--calls", "40", "--draws", "2"]
    arguments = [*few, "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    path = tmp_path / "digits-consistency-1-step.json"
    row = json.loads(path.read_text())
    assert row["worst"]["value"] <= row["clean"]["value"] <= 1
    path.write_text(json.dumps({**row, "worst": {"value": 0.25, "low": 0.2, "high": 0.3}}))
    assert script.main(arguments) == 0
    assert "25.0 [20.0, 30.0]" in capsys.readouterr().out
    table = (tmp_path / "digits.md").read_text()
    assert "| adversarial training |" in table
    assert (tmp_path / "digits.svg").read_text().startswith("<?xml")


def test_bad_input_is_one_sentence(tmp_path, capsys):
    script = load_script("defences")
    for arguments in (["--only", "nothing"], ["--dataset", "mnist"], ["--images", "0"]):
        assert script.main([*arguments, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
