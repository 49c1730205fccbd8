"""benchmarks/defences.py: it measures, resumes, and draws what is there."""

import json

from conftest import load_script

from purify import PURIFIERS


def test_defences_are_measured_once_and_drawn_with_the_baseline(tmp_path, capsys):
    script = load_script("defences")
    assert set(PURIFIERS) <= set(script.SYSTEMS)
    assert set(script.available("digits")) == set(script.SYSTEMS)
    assert "flow, 2 steps" not in script.available("fashion_mnist")
    few = ["--only", "adversarial training;consistency, 1 step", "--images", "2", "--calls", "60", "--draws", "2"]
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


def test_what_the_published_attack_would_report_is_added_to_rows_without_it(tmp_path, capsys):
    """Rows of the first version have none; what they hold stays, and it is measured on their own images."""
    script = load_script("defences")
    assert set(script.PUBLISHED) <= set(script.SYSTEMS)
    few = ["--only", "freqpure;flow, 2 steps", "--images", "2", "--calls", "60", "--draws", "2", "--first", "7"]
    arguments = [*few, "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    path = tmp_path / "digits-freqpure.json"
    row = json.loads(path.read_text())
    added = row.pop("published")
    assert (added["attack"], added["steps"], added["eot"]) == ("one step", 20, 4)
    old = {**row, "calls": 59}
    path.write_text(json.dumps(old))
    assert script.main(["--images", "1", *arguments[:2], "--out", str(tmp_path)]) == 0
    assert json.loads(path.read_text()) == {**old, "published": added}
    assert "published" not in json.loads((tmp_path / "digits-flow-2-steps.json").read_text())
    assert "| one step | " in capsys.readouterr().out


def test_a_row_is_held_against_the_baseline_on_its_images_by_its_strongest_attack():
    script = load_script("defences")
    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"clean": accuracy, "worst": accuracy, "calls": 3, "images": 48, "first": 0}
    broken = {**row, "published": {"attack": "one step", "steps": 20, "eot": 4, "value": 0.25, "low": 0.2, "high": 0.3}}
    lines = script.table({script.BASELINE: row, "a": row, "b": {**row, "images": 16}, "c": broken}).splitlines()
    assert [line.split(" | ")[3].strip() for line in lines[2:]] == ["0.0", "0.0", "", "25.0"]
    assert script.least(broken) == script.Estimate(0.25, 0.2, 0.3)


def test_settings_are_chosen_by_a_rule(tmp_path, capsys):
    """The most robust of those that cost little clean accuracy; numbers are kept."""
    script = load_script("defence_settings")
    rows = {
        name: {"clean": {"value": clean}, "worst": {"value": worst}}
        for name, clean, worst in (("a", 0.9, 0.2), ("b", 0.85, 0.3), ("c", 0.5, 0.4))
    }
    assert script.chosen(rows, 0.8) == "b"
    assert script.chosen(rows, 0.95) == "a"
    for name in script.GRIDS:
        tried = [system.build(script.DATASET).purifier.config() for system in script.settings(name).values()]
        assert len({json.dumps(config) for config in tried}) == len(tried)
    few = ["--only", "diffap", "--images", "1", "--calls", "60", "--draws", "1", "--out", str(tmp_path)]
    script.GRIDS["diffap"] = (*script.GRIDS["diffap"][:2], ((0.2, 15),))
    assert script.main(few) == 0
    first = capsys.readouterr().out
    assert script.main(few) == 0
    assert capsys.readouterr().out == first
    assert "| diffap | t* 0.2, scale 15 |" in (tmp_path / "settings.md").read_text()
    assert script.main(["--only", "gns", "--out", str(tmp_path)]) == 2
