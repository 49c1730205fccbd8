"""What is read from the folders of finished runs of attacks, and what is refused."""

import json
import shutil

import pytest

from purify.cli.leaderboard import main as leaderboard
from purify.evaluate.report import SCHEMA
from purify.evaluate.selfchecks import INEXACT
from purify.leaderboard import read_certified, read_run, read_runs
from purify.leaderboard.rows import made_by


def test_rows_have_the_numbers_of_the_run(run):
    rows = {row.name: row for row in read_run(run)}
    assert list(rows) == ["undefended", "diffpure", "diffpure ssni-l", "adversarial training"]
    result = json.loads((run / "result.json").read_text())
    for name, row in rows.items():
        stored = result["results"][name]
        assert row.clean["mean"].value == stored["clean"]["mean"]["value"]
        assert row.worst["any_of_r"].value == stored["worst case"]["any_of_r"]["value"]
        assert row.noise["majority"].value == stored["random-noise"]["majority"]["value"]
        assert set(row.attacks) == {"pgd-eot", "autoattack-rand"}
    assert rows["diffpure"].t_star == pytest.approx((0.18, 0.18))
    assert rows["undefended"].t_star is None
    assert {row.classifier for name, row in rows.items() if name != "adversarial training"} == {"digits-standard"}
    assert rows["adversarial training"].classifier == "digits-at"
    assert rows["diffpure"].network_calls == 3
    assert rows["diffpure ssni-l"].network_calls == 11
    assert rows["diffpure"].command.startswith("--n-examples 6")
    failed = {c["name"] for c in result["self_checks"] if c["defence"] == "diffpure" and not c["passed"]}
    assert {c.split(":")[0] for c in rows["diffpure"].failed_checks} == failed


def test_what_several_runs_measured_alike_is_one_row(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert [row.run for row in read_runs([run, copy])[0]] == [str(run)] * 4
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["defences"]["diffpure"]["purifier"]["seed"] = 7  # the same numbers of another defence
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rows = read_runs([run, copy])[0]
    assert [row.name for row in rows if row.run == str(copy)] == ["diffpure"]


def test_stored_checks_are_read_with_a_tolerance_and_new_ones_are_derived(run, tmp_path):
    """From the records of runs that knew neither: a check at its limit passes, an inexact gradient that wins fails."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    result = json.loads((copy / "result.json").read_text())
    check = {"defence": "diffpure", "limit": 0.05, "passed": False, "meaning": "m"}
    result["self_checks"] = [
        {**check, "name": "by rounding", "value": 0.050000000000000044},
        {**check, "name": "by a draw", "value": 0.05625},
        {**check, "name": "not asked", "value": None},
    ]
    (copy / "result.json").write_text(json.dumps(result))
    assert read_run(copy)[1].failed_checks == ("by a draw: m", "not asked: m")
    for file in ("manifest.json", "records.jsonl", "result.json"):  # AutoAttack's records under another attack's name
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace("autoattack-rand", "pgd-eot-first-order"))
    row = read_run(copy)[1]
    exact, inexact = (row.attacks[name]["mean"].value for name in ("pgd-eot", "pgd-eot-first-order"))
    assert abs(exact - inexact) > 0.05
    assert any(c.startswith(INEXACT) for c in row.failed_checks) is (exact > inexact)
    for file in ("manifest.json", "records.jsonl", "result.json"):  # and the other way round
        text = (copy / file).read_text().replace('"pgd-eot"', '"x"').replace("pgd-eot-first-order", "pgd-eot")
        (copy / file).write_text(text.replace('"x"', '"pgd-eot-first-order"'))
    assert any(c.startswith(INEXACT) for c in read_run(copy)[1].failed_checks) is (exact < inexact)


def test_unfinished_and_damaged_runs_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"not the folder of a finished run \(manifest.json is missing\)"):
        read_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    lines = (copy / "records.jsonl").read_text().splitlines(True)
    (copy / "records.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="is not finished: adversarial training, autoattack-rand, lacks samples"):
        read_run(copy)
    (copy / "records.jsonl").write_text("".join(lines[:-1]) + "{\n")
    with pytest.raises(ValueError, match=f"line {len(lines)}, is damaged"):
        read_run(copy)
    (copy / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        read_run(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r | {"predictions": [r["label"]] * 3}, "result.json and the records differ for diffpure"),
        (lambda r: r | {"sample": (r["sample"] + 1) % 6}, "diffpure, pgd-eot, are not those of its 6 samples"),
        (lambda r: r | {"label": (r["label"] + 1) % 10}, "diffpure, pgd-eot, are not those of its 6 samples"),
    ],
)
def test_records_changed_by_hand_are_refused(change, message, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    hit = [r["defence"] == "diffpure" and r["attack"] in ("pgd-eot", "autoattack-rand") for r in records]
    first = next(i for i, h in enumerate(hit) if h)
    chosen = hit if "differ" in message else [i == first for i in range(len(records))]
    changed = [change(r) if c else r for r, c in zip(records, chosen, strict=True)]
    path.write_text("".join(json.dumps(r) + "\n" for r in changed))
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "copy")


def with_schema(folder, copy, schema):
    """A copy of a run whose result.json has this schema; None: as runs before schemas."""
    shutil.copytree(folder, copy)
    result = json.loads((copy / "result.json").read_text())
    result = {k: v for k, v in result.items() if k not in ("schema", "verdict", "config")}
    (copy / "result.json").write_text(json.dumps(result if schema is None else {"schema": schema, **result}))
    return copy


def test_results_without_a_schema_are_read_as_those_with_one(run, tmp_path):
    assert json.loads((run / "result.json").read_text())["schema"] == SCHEMA == 2
    for schema in (None, 1, 2):
        rows = read_run(with_schema(run, tmp_path / str(schema), schema))
        assert all(row.repeats(other) for row, other in zip(rows, read_run(run), strict=True))


@pytest.mark.parametrize("schema", [3, "2025-11"])
def test_results_of_a_newer_purify_are_refused(schema, run, certified, tmp_path, capsys):
    """Whatever a newer purify changed in the other files."""
    attacked = with_schema(run, tmp_path / "attacked", schema)
    proven = with_schema(certified[0], tmp_path / "proven", schema)
    (attacked / "manifest.json").write_text("{}")
    for folder in (attacked, proven):
        message = f"{folder / 'result.json'} has schema {schema}, and this purify reads schemas up to 2: update purify."
        for read in (read_run, read_certified, lambda path: read_runs([path])):
            with pytest.raises(ValueError, match="schema") as error:
                read(folder)
            assert str(error.value) == message
        assert leaderboard([str(folder), "--out", str(tmp_path / "board")]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "board").exists()


def test_the_budget_of_the_adaptive_attack_is_its_calls():
    from purify.attacks import PGD, Adaptive
    from purify.cli.attack import describe
    from purify.leaderboard.rows import _stated

    attack = Adaptive("Linf", 0.3, calls=400)
    assert describe(attack) == "adaptive 400 calls"
    assert _stated(attack.budget()) == "adaptive 400 calls"
    assert _stated(PGD("Linf", 0.3, steps=2, eot=3).budget()) == "pgd-eot 2 x EOT 3"


def test_the_command_of_a_run_that_was_made_in_shards_makes_all_of_it():
    sessions = [
        {"command": "purify attack --shard 1/2 --out runs/A --seed 3"},
        {"command": "purify attack --shard 2/2"},
    ]
    assert made_by(sessions) == "purify attack --out runs/A --seed 3"
    assert made_by([{"command": "purify attack --out runs/A --shard=1/2"}]) == "purify attack --out runs/A"


def test_a_curve_is_no_run_and_names_those_it_has(tmp_path):
    (tmp_path / "eps-0.3").mkdir()
    (tmp_path / "eps-0.1").mkdir()
    with pytest.raises(ValueError, match=r"holds a curve over eps; name a run of it, as .*eps-0\.1\."):
        read_run(tmp_path)
