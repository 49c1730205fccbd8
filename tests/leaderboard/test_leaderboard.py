"""A leaderboard from a small run: numbers as in the run, escaped text, a page that works in a browser."""

import json
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import load_script

from purify import zoo
from purify.cli.attack import main as benchmark
from purify.cli.certify import main as certify
from purify.cli.leaderboard import main as leaderboard
from purify.evaluate.budgets import reduced
from purify.evaluate.metrics import Estimate, worst_mean
from purify.evaluate.report import SCHEMA
from purify.evaluate.selfchecks import INEXACT
from purify.leaderboard import plots, read_certified, read_run, read_runs, write_leaderboard
from purify.leaderboard.certified import stated
from purify.leaderboard.links import command, portable

SMALL = [
    *("--n-examples", "6", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--steps", "3"),
    *("--noise-level", "constant,ssni-l", "--attacks", "random-noise,pgd-eot,autoattack-rand"),
]
CERTIFIED = [
    *("--n-examples", "12", "--selection-draws", "10", "--draws", "64", "--attack-examples", "4", "--threads", "1"),
    *("--attack-steps", "2", "--eot", "2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert benchmark([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Two finished runs of run_certify.py: L2 with other radii than L1."""
    folder = tmp_path_factory.mktemp("certified")
    gauss = ["--method", "cohen,multiscale", "--sigma", "0.1,0.25", "--radii", "0,0.1,0.25,0.5"]
    split = ["--method", "ssn,dssn", "--model", "digits-standard", "--lam", "0.1", "--radii", "0,0.05"]
    assert certify([*CERTIFIED, *gauss, "--out", str(folder / "L2")]) == 0
    assert certify([*CERTIFIED, *split, "--out", str(folder / "L1")]) == 0
    return [folder / "L2", folder / "L1"]


def refuted_run(folder, copy, name):
    """A copy of a run in which an attack inside the radius of ``name`` has succeeded."""
    shutil.copytree(folder, copy)
    records = [json.loads(line) for line in (copy / "records.jsonl").read_text().splitlines()]
    hit = next(r for r in records if r["defence"] == name and r.get("radius") and "refuted" in r)
    hit["refuted"] = True
    (copy / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = json.loads((copy / "result.json").read_text())
    result["results"][name]["refuted"] = 1
    (copy / "result.json").write_text(json.dumps(result))
    return copy


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


def worst_of(row, value, **changes):
    """The row with another worst case."""
    return replace(row, worst=dict.fromkeys(row.worst, Estimate(value, value, value)), **changes)


def test_a_system_stands_once_by_most_images_then_lowest_worst_case(run, tmp_path):
    """Whatever its runs called, differentiated and judged it; other systems and other images stay apart."""
    base = replace(read_run(run)[1], reduced=False)
    purifier, trained = base.config["purifier"], read_run(run)[3]
    guess = {**base.config, "purifier": {**purifier, "gradient": {"kind": "bpda"}}, "exact": False, "draws": 7}
    steps = {**base.config, "purifier": {**purifier, "steps": {"kind": "fixed_steps", "steps": 4}}}
    others = [
        worst_of(base, 0.9, run="others", images=frozenset((i + 6, 0) for i, _ in base.images)),
        worst_of(base, 0.8, run="steps", config=steps),
        worst_of(base, 0.7, run="classifier", config={**base.config, "classifier": "another"}),
        worst_of(base, 0.6, run="eps", eps=0.1),
        worst_of(base, 0.55, run="at-1", config=trained.config, name="undefended"),
    ]
    same = [
        worst_of(base, 0.5, run="same-1", config=guess, exact=False),
        worst_of(base, 0.4, run="same-2", images=frozenset(list(base.images)[:2])),
        worst_of(base, 0.65, run="same-3", name="mine"),
        worst_of(others[-1], 0.58, run="at-2", name="adversarial training"),
    ]
    expected = ["eps", "others", "steps", "classifier", "at-1", "at-2", "same-1", "same-3", "same-2"]
    for rows in ([*others, *same], [*same, *others], [*others, *same][::-1]):
        write_leaderboard(rows, tmp_path)
        entries = json.loads((tmp_path / "leaderboard.json").read_text())
        assert [e["manifest"].split("/")[-2] for e in entries] == expected
    leads = {e["manifest"].split("/")[-2]: e["stronger"] for e in entries}
    assert [name for name, above in leads.items() if above is None] == [*expected[:5], "same-1"]
    assert leads["at-2"].endswith("at-1/manifest.json")
    assert leads["same-2"] == leads["same-3"] == next(e["manifest"] for e in entries if "same-1" in e["manifest"])
    lines = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if "manifest.json)" in line]
    assert [line.startswith("| *also:* ") for line in lines] == [leads[name] is not None for name in expected]
    assert sum("no purifier" in line for line in lines) == 2
    page = Cells()
    page.feed((tmp_path / "index.html").read_text())
    assert len(page.rows) == 1 + 6
    assert "also measured: 65.0 on 6, 40.0 on 6 images" in page.rows[-1]
    assert sum("also measured" in text for text in page.rows) == 2


def test_a_reduced_budget_stands_last_and_never_for_a_system(run, tmp_path):
    """Neither when it looks better than all others nor when it looks worse than its own system's full budget."""
    rows = read_run(run)
    assert all(row.reduced for row in rows)  # --preset quick with two steps
    full = replace(rows[1], reduced=False)
    write_leaderboard([worst_of(rows[2], 0.9), worst_of(full, 0.5), worst_of(rows[1], 0.1)], tmp_path)
    entries = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [(e["robust_acc"], e["reduced"], e["stronger"]) for e in entries] == [
        ("50.0", False, None),
        ("90.0", True, None),
        ("10.0", True, None),
    ]
    page = Cells()
    page.feed((tmp_path / "index.html").read_text())
    assert ["not to be quoted" in text for text in page.rows[1:]] == [False, True, True]
    lines = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if "manifest.json)" in line]
    assert ["*reduced:*" in line for line in lines] == [False, True, True]


@pytest.mark.parametrize(
    ("stated", "dataset", "expected"),
    [
        ({"preset": "standard", "steps": 40, "eot": 10}, "digits", False),
        ({"preset": "standard", "steps": 20, "eot": 8}, "fashion_mnist", False),
        ({"preset": "standard", "steps": 20, "eot": 10}, "digits", True),
        ({"preset": "standard", "steps": 40, "eot": 1}, "digits", True),
        ({"preset": "paper", "steps": 200, "eot": 20}, "cifar10", False),
        ({"preset": "quick", "steps": 40, "eot": 10}, "digits", True),
    ],
)
def test_budgets_below_the_standard_one_are_reduced(stated, dataset, expected):
    assert reduced(stated, dataset) is expected


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


def test_plots_show_each_point_of_each_system(run, tmp_path, monkeypatch):
    rows = read_run(run)
    rows = [rows[0], replace(rows[1], failed_checks=("c",)), replace(rows[1], name="twin", failed_checks=()), rows[3]]
    figures = {}
    monkeypatch.setattr(plots, "_save", lambda fig, handles, path: figures.setdefault(path.stem, (fig, handles)))
    shown = [replace(row, reduced=False) for row in rows]
    plots.draw_plots([*shown, replace(rows[2], name="reduced")], tmp_path)
    fig, handles = figures["digits-cost"]
    points = [c.lines[0] for c in fig.axes[0].containers]
    x = [p.get_xdata()[0] for p in points]
    assert len(set(x)) == len(x) == 2
    assert np.mean(x) == pytest.approx(3)
    assert np.ptp(x) < 0.1
    assert [p.get_markerfacecolor() == "none" for p in points] == [True, False]
    assert list(handles) == ["diffpure", "twin", "hollow: marked in the table"]
    fig, handles = figures["digits-robust-clean"]
    drawn = fig.axes[0].containers
    assert next(iter(handles)) == "no purifier, digits-standard"
    for container, row in zip(drawn, shown, strict=True):
        clean, worst = row.clean["mean"], row.worst["mean"]
        assert container.lines[0].get_xydata()[0] == pytest.approx([100 * clean.value, 100 * worst.value])
        wide, high = (bars.get_segments()[0] for bars in container.lines[2])
        assert wide[:, 0] == pytest.approx([100 * clean.low, 100 * clean.high])
        assert high[:, 1] == pytest.approx([100 * worst.low, 100 * worst.high])


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


def test_certified_rows_have_the_numbers_of_the_run(certified):
    rows, found = read_runs(certified)
    assert rows == []
    assert [r.name for r in found] == ["cohen 0.1", "cohen 0.25", "multiscale", "ssn", "dssn"]
    for row in found:
        folder = certified[row.norm == "L1"]
        stored = json.loads((folder / "result.json").read_text())["results"][row.name]
        records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        own = [r for r in records if r["defence"] == row.name and r["attack"] == "certificate"]
        right = [r["radius"] for r in own if r["predictions"] == [r["label"]]]
        assert len(own) == row.samples == 12
        for radius, estimate in zip(row.found.radii, row.found.certified, strict=True):
            assert estimate.value == pytest.approx(sum(r >= radius for r in right) / 12)
        assert row.found.acr.value == pytest.approx(sum(right) / 12)
        assert row.found.acr.value == stored["acr"]["value"]
        assert [e.low for e in row.found.certified] == [e["low"] for e in stored["certified"]]
        assert (row.norm, row.found.radii) == (stored["norm"], stored["radii"])
        assert row.command.startswith("--n-examples 12")
    by_name = {r.name: r for r in found}
    assert (by_name["cohen 0.1"].alpha, by_name["dssn"].alpha) == (0.001, None)
    assert by_name["dssn"].found.draws == int(0.2 * 255)
    assert by_name["cohen 0.1"].budget == "n0 10, n 64, denoiser digits; 12 images; PGD 2 x EOT 2 inside the radius"
    assert (by_name["cohen 0.1"].network_calls, by_name["dssn"].network_calls) == (74, None)


def test_unfinished_and_changed_certified_runs_are_refused(certified, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(certified[0], copy)
    lines = (copy / "records.jsonl").read_text().splitlines(True)
    first = next(line for line in lines if '"certificate"' in line and "multiscale" in line)
    (copy / "records.jsonl").write_text("".join(line for line in lines if line != first))
    with pytest.raises(ValueError, match="is not finished: multiscale, certificate, lacks samples"):
        read_certified(copy)
    (copy / "records.jsonl").write_text("".join(line for line in lines if "pgd inside" not in line))
    with pytest.raises(ValueError, match=r"the records of cohen 0.1 are not those of result\.json"):
        read_certified(copy)
    radius = next(r["radius"] for r in map(json.loads, lines) if r.get("radius"))
    (copy / "records.jsonl").write_text("".join(lines).replace(f'"radius": {radius}', '"radius": 9.0', 1))
    with pytest.raises(ValueError, match=r"are not those of result\.json"):
        read_certified(copy)
    (copy / "result.json").unlink()
    with pytest.raises(ValueError, match=r"not the folder of a finished run \(result.json is missing\)"):
        read_runs([copy])


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


COMMITTED = Path(__file__).parents[2] / "docs" / "leaderboard"


class Cells(HTMLParser):
    """Text of the tables' rows (an entry's two rows as one), and every link and image."""

    def __init__(self):
        super().__init__()
        self.rows, self.links, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("thead", "tbody"):
            self.rows.append("")
        self.inside = tag in ("td", "th") or (self.inside and tag != "table")
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_data(self, data):
        if self.inside and self.rows:
            self.rows[-1] += data


def test_page_and_markdown_and_json_agree(run, tmp_path):
    write_leaderboard(read_run(run), tmp_path / "board")
    entries = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [float(e["robust_acc"]) for e in entries] == sorted((float(e["robust_acc"]) for e in entries), reverse=True)
    assert {"name", "dataset", "threat_model", "eps", "clean_acc", "autoattack_acc"} <= set(entries[0])
    page = Cells()
    page.feed((tmp_path / "board" / "index.html").read_text())
    markdown = (tmp_path / "board" / "leaderboard.md").read_text()
    assert len(page.rows) == 5
    for entry, text in zip(entries, page.rows[1:], strict=True):
        for key in ("name", "classifier", "robust_acc", "clean_acc", "strongest_attack"):
            assert entry[key] in text
            assert entry[key] in markdown
        assert entry["budget"] in markdown
    for link in page.links:
        assert (tmp_path / "board" / link).exists(), link
    assert "http" not in "".join(page.links)


def test_a_page_without_certified_runs_does_not_speak_of_them(run, tmp_path):
    write_leaderboard(read_run(run), tmp_path)
    for name in ("index.html", "leaderboard.md"):
        text = (tmp_path / name).read_text()
        assert "ertified" not in text.split("</style>")[-1]
        assert "diffpure ssni-l" in text
    assert json.loads((tmp_path / "certified.json").read_text()) == []
    assert not list(tmp_path.glob("*certified*.svg"))


def test_certified_runs_beside_attacked_ones(run, certified, tmp_path):
    """Entries of leaderboard.json stay as they were; page and Markdown show what certified.json holds."""
    write_leaderboard(read_runs([run])[0], tmp_path / "alone")
    rows, found = read_runs([run, *certified])
    board = tmp_path / "board"
    write_leaderboard(rows, board, found)
    assert json.loads((board / "leaderboard.json").read_text()) == json.loads(
        (tmp_path / "alone" / "leaderboard.json").read_text()
    )
    entries = json.loads((board / "certified.json").read_text())
    assert {e["kind"] for e in entries} == {"certified"}
    assert [e["norm"] for e in entries] == ["L1", "L1", "L2", "L2", "L2"]
    acr = [e["estimates"]["acr"]["value"] for e in entries if e["norm"] == "L2"]
    assert acr == sorted(acr, reverse=True)
    page = Cells()
    page.feed((board / "index.html").read_text())
    markdown = (board / "leaderboard.md").read_text()
    heads = [r for r in page.rows if "Abstained" in r]
    assert len(page.rows) == 5 + 3 + 4
    assert [("0.05" in h.split(), "0.5" in h.split()) for h in heads] == [(True, False), (False, True)]
    for entry in entries:
        text = next(t for t in page.rows if t.strip().startswith(entry["name"]))
        line = next(part for part in markdown.splitlines() if f"[{entry['name']}]" in part)
        assert set(entry["certified"]) == {f"{r:g}" for r in entry["radii"]}
        for value in (*entry["certified"].values(), entry["acr"], entry["abstained"]):
            share, interval = value.split(" ", 1)
            assert f"{share}{interval}" in text
            assert value in line
        assert f"{entry['refuted']} of {entry['attacked']}" in text
        assert entry["command"] in text
    assert '<small class="bad">refuted' not in (board / "index.html").read_text()
    for link in page.links:
        assert (board / link).exists(), link
    for norm in ("L1", "L2"):
        curve = (board / f"digits-certified-{norm}.svg").read_text()
        assert f"digits-certified-{norm}.svg" in page.links
        assert curve.count('clip-path="url(') >= 2


def test_certified_runs_alone_and_a_refuted_certificate(certified, tmp_path):
    copy = refuted_run(certified[0], tmp_path / "copy", "cohen 0.25")
    found = read_certified(copy)
    assert {r.name: r.found.refuted for r in found} == {"cohen 0.1": 0, "cohen 0.25": 1, "multiscale": 0}
    write_leaderboard([], tmp_path / "board", found)
    page = Cells()
    page.feed((tmp_path / "board" / "index.html").read_text())
    assert [("refuted" in text, text.strip().split("\n")[0]) for text in page.rows[1:]] == [
        (r.name == "cohen 0.25", f"{r.name}digits-standard{'refuted' * (r.name == 'cohen 0.25')}")
        for r in sorted(found, key=lambda r: (-r.found.acr.value, r.name))
    ]
    assert "| ! [cohen 0.25](../copy/manifest.json) |" in (tmp_path / "board" / "leaderboard.md").read_text()
    assert json.loads((tmp_path / "board" / "leaderboard.json").read_text()) == []


def test_names_from_runs_are_escaped(run, certified, tmp_path):
    evil = {"name": "<script>alert(1)</script>"}
    row, proven = replace(read_run(run)[1], **evil), replace(read_certified(certified[0])[0], **evil)
    write_leaderboard([row], tmp_path, [proven])
    text = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") == 3  # two names, and what a picture shows


def test_every_row_links_to_its_run_wherever_both_are_moved(run, certified, tmp_path):
    """Files and pictures that are there, by relative paths, whatever the folders are called."""
    runs, board = tmp_path / "here" / "runs", tmp_path / "here" / "board"
    odd = runs / 'attack #1 (t=0.2) "100 %"'
    shutil.copytree(run, odd)
    shutil.copytree(certified[0], runs / "L2")
    (runs / "L2" / "certified-L2.png").unlink()
    rows, found = read_runs([odd, runs / "L2"])
    weaker = worst_of(rows[1], 1.0, name="diffpure ssni-l")
    absolute = replace(rows[2], classifier=f"{tmp_path}/net.py:make", config={**rows[2].config, "classifier": "other"})
    write_leaderboard([rows[1], weaker, absolute], board, found)
    (tmp_path / "here").rename(tmp_path / "there")
    board = tmp_path / "there" / "board"
    page = Cells()
    page.feed((board / "index.html").read_text())
    links = [unquote(link) for link in page.links]
    assert all((board / link).is_file() and not link.startswith("/") for link in links)
    above = f"../runs/{odd.name}"
    for name in ("result.json", "records.jsonl", "manifest.json", "run.yaml"):
        assert links.count(f"{above}/{name}") == 3
        assert links.count(f"../runs/L2/{name}") == len(found)
    assert links.count(f"{above}/samples-diffpure.png") == 2  # a link to what it shows
    assert links.count(f"{above}/samples-diffpure-ssni-l.png") == 4
    assert not any("certified-L2.png" in link for link in links)
    for name in ("index.html", "leaderboard.md", "leaderboard.json", "certified.json"):
        assert str(tmp_path) not in (board / name).read_text()
        assert str(run.parent) not in (board / name).read_text()
    entries = json.loads((board / "leaderboard.json").read_text())
    assert {e["classifier"] for e in entries} == {"digits-standard", "net.py:make"}
    assert all(e["command"].endswith(f"--out {run.name}") for e in entries)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--out /home/me/runs/a --eot 2", "--out a --eot 2"),
        ("--model=/home/me/net.py:make", "--model=net.py:make"),
        ("--set agdm.auxiliary=/a/b.py:c,/d/e.pt", "--set agdm.auxiliary=b.py:c,e.pt"),
        ("--out '/home/my runs/a'", "--out 'my runs/a'"),
        (r"--out C:\Users\me\a", "--out a"),
        ("--out runs/a --attacks x,y/z", "--out runs/a --attacks x,y/z"),
    ],
)
def test_commands_do_not_show_the_folders_of_a_machine(text, expected, run):
    assert portable(text) == expected
    row = read_run(run)[0]
    assert command(replace(row, command=text)) == f"python benchmarks/run_autoattack.py {expected}"
    assert command(replace(row, command="from Python")) == "from Python"
    assert command(replace(row, command="")) == "python benchmarks/run_autoattack.py"


def test_without_scripts_the_page_is_a_plain_table(run, certified, tmp_path):
    """All rows are seen, and nothing that would need a script; the page loads nothing from elsewhere."""
    rows, found = read_runs([run, *certified])
    write_leaderboard(rows, tmp_path, found)
    text = (tmp_path / "index.html").read_text()
    plain = text.split("<script>")[0].split("</style>")[1]
    assert '<form role="search" hidden>' in plain
    assert plain.count("hidden") == 1
    assert plain.count("<button") == 1  # in the form
    assert not any(word in text for word in ("http:", "https:", "@import", "url(", "fetch("))


def test_certified_rows_name_their_classifier(certified, tmp_path):
    """By its fingerprint: embedded ones have a name, others the first digits."""
    assert [row.classifier for row in read_runs(certified)[1]] == ["digits-standard"] * 5
    copy = tmp_path / "copy"
    shutil.copytree(certified[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["systems"]["cohen 0.1"]["classifier"] = "0123456789abcdef"
    del manifest["config"]["systems"]["multiscale"]["classifier"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert [row.classifier for row in read_certified(copy)] == ["0123456789ab", "digits-standard", "unknown"]


def test_nothing_to_rank_and_a_folder_that_cannot_be_written(run, tmp_path):
    with pytest.raises(ValueError, match="nothing to rank"):
        write_leaderboard([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_leaderboard(read_run(run), tmp_path / "file" / "below")


def test_compare_pairs_the_images_of_two_runs(run, tmp_path, capsys):
    """Against differences taken by hand from the records; a run with fewer images is compared on those."""
    script = load_script("compare")
    fewer, weaker = tmp_path / "fewer", tmp_path / "weaker"
    assert benchmark([*SMALL, "--n-examples", "4", "--out", str(fewer)]) == 0
    assert benchmark([*SMALL, "--n-examples", "4", "--attack-steps", "1", "--out", str(weaker)]) == 0
    capsys.readouterr()

    def values(folder, name, n):
        """Clean and worst-case values of the first n samples."""
        lines = (folder / "records.jsonl").read_text().splitlines()
        found = [r for r in map(json.loads, lines) if r["defence"] == name and r["sample"] < n]
        stages = dict.fromkeys(r["attack"] for r in found)
        right = {s: [[p == r["label"] for p in r["predictions"]] for r in found if r["attack"] == s] for s in stages}
        return [np.mean(right["clean"], 1), worst_mean([np.array(r) for r in right.values()])]

    assert script.main([str(run), str(run), str(fewer)]) == 0
    lines = [line.replace(" ! ", "   ") for line in capsys.readouterr().out.splitlines()[3:]]
    names = [row.name for row in read_run(run)]
    assert len(lines) == 8
    for i, line in enumerate(lines):
        folder, n = (run, 6) if i < 4 else (fewer, 4)
        assert line.startswith(names[i % 4])
        assert f" {n} " in line
        for own, base in zip(values(folder, names[i % 4], n), values(run, "diffpure", 6), strict=True):
            assert f" {100 * own.mean():.1f} " in line
            assert f" {100 * (own - base[:n]).mean():.1f} [" in line
    assert script.main([str(run), str(weaker)]) == 2
    assert "met another budget of" in capsys.readouterr().err
    assert script.main([str(run), str(run), "--defence", "gdmp"]) == 2
    assert "has no defence 'gdmp'; it has undefended" in capsys.readouterr().err


def test_compare_says_that_it_takes_no_certificates(run, certified, capsys):
    script = load_script("compare")
    for folders in ([run, certified[0]], [certified[0], run]):
        assert script.main([str(folder) for folder in folders]) == 2
        error = capsys.readouterr().err
        assert f"{certified[0]} is a run of certificates (run_certify.py)" in error
        assert "run_autoattack.py" in error
    with pytest.raises(ValueError, match=r"is a run of attacks \(run_autoattack.py\); give folders of run_certify.py"):
        read_certified(run)


def test_the_committed_leaderboard_is_that_of_the_committed_records(tmp_path):
    shutil.copytree(COMMITTED / "runs", tmp_path / "runs")
    rows, certified = read_runs(sorted((tmp_path / "runs").iterdir()))
    write_leaderboard(rows, tmp_path, certified)
    for name in ("leaderboard.json", "certified.json", "leaderboard.md", "index.html"):
        assert (tmp_path / name).read_text() == (COMMITTED / name).read_text(), f"{name}: run benchmarks/leaderboard.py"
    assert {row.dataset for row in rows} == {"digits", "fashion_mnist"}
    assert {row.name.split()[0] for row in rows} >= {"diffpure", "gdmp", "agdm", "gns"}
    entries = json.loads((COMMITTED / "leaderboard.json").read_text())
    bare = [(e["classifier"], e["eps"]) for e in entries if e["name"] == "no purifier" and e["stronger"] is None]
    assert len(set(bare)) == len(bare) >= 4
    assert {e["classifier_called"] for e in entries if e["classifier"].endswith("-at")} == {"adversarial training"}


def opened(page, tmp_path, script="", address="", width=1280):
    """The DOM of a page after ``script`` ran in it, and the page's title, which the script may set to its findings."""
    driven = page.with_name("driven.html")
    tell = "setTimeout(() => parent.postMessage(document.documentElement.outerHTML, '*'), 100)"
    driven.write_text(page.read_text().replace("</body>", f"<script>{script};{tell}</script></body>"))
    frame = f'<iframe src="driven.html{address}" style="width: {width}px; height: 800px; border: 0"></iframe>'
    told = "<script>addEventListener('message', e => { document.documentElement.innerHTML = e.data; })</script>"
    page.with_name("frame.html").write_text(f"<!doctype html>{told}{frame}")  # a window is never as narrow as a phone
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    chromium += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
    address = page.with_name("frame.html").as_uri()
    dom = subprocess.run([*chromium, address], capture_output=True, text=True, check=True).stdout
    return dom, dom.split("<title>")[1].split("</title>")[0]


in_a_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")


@pytest.mark.slow
@in_a_browser
def test_the_page_sorts_and_filters_in_a_browser(run, certified, tmp_path):
    rows, found = read_runs([run, *certified])
    full = replace(rows[1], name="full", reduced=False, clean=worst_of(rows[1], 0.0).worst)
    write_leaderboard([*rows, full, worst_of(full, 1.0)], tmp_path, found)
    script = (
        "document.querySelectorAll('#board thead button')[4].click();"
        "const f=document.querySelector('[name=q]');f.value='diffpure';"
        "f.dispatchEvent(new Event('input', {bubbles: true}));"
        "for (const t of document.querySelectorAll('table')) if (t.id !== 'board') t.querySelector('button').click();"
    )
    dom, _ = opened(tmp_path / "index.html", tmp_path, script)
    assert "2 of 10 rows" in dom
    assert dom.count('aria-sort="descending"') == 3
    heads = [row.split("</th>")[0] for row in dom.split('<th scope="row" rowspan="')[1:]]
    names = [head[3:].split("</small>")[0].replace("<small>", ", ") for head in heads]
    assert names[0] == "full, digits-standard"  # before all others, which have reduced budgets
    assert heads[0].startswith("3")  # with a weaker measurement below
    clean = {f"{r.title}, {r.classifier}": r.clean["mean"].value for r in rows}
    values = [clean[n.removesuffix(", adversarial training")] for n in names[1:5]]
    assert values == sorted(values, reverse=True)
    assert [n.split(",")[0] for n in names[5:]] == ["ssn", "dssn", "multiscale", "cohen 0.25", "cohen 0.1"]


@pytest.mark.slow
@in_a_browser
def test_filters_stand_in_the_address(run, certified, tmp_path):
    """Each is read from it, all are written to it, and Clear empties it."""
    rows, found = read_runs([run, *certified])
    rows = [replace(row, failed_checks=("c",) * (row.name == "diffpure")) for row in rows]
    write_leaderboard(rows, tmp_path, found)
    names = {row.name: row.title for row in rows}
    seen = (
        "document.title = [...document.querySelectorAll('tbody')].filter(e => e.checkVisibility())"
        ".map(e => e.querySelector('th').firstChild.textContent).sort().join() + location.hash"
    )
    expected = {
        "#threat=Linf+0.3": names.values(),
        "#classifier=digits-at": ["no purifier"],
        "#classifier=digits-standard&threat=L1+radius": ["dssn", "ssn"],
        "#threat=L2+radius&q=0.25": ["cohen 0.25"],
        "#threat=Linf+0.3&passed=on": [names[row.name] for row in rows if not row.marked],
        "#dataset=digits&threat=L1+radius&passed=on": ["dssn", "ssn"],
        "#dataset=unknown": [*names.values(), *(row.name for row in found)],
    }
    for address, shown in expected.items():
        _, title = opened(tmp_path / "index.html", tmp_path, seen, address)
        assert unescape(title) == ",".join(sorted(shown)) + address
    script = (
        "document.querySelector('[name=passed]').click();"
        "const f = document.querySelector('[name=threat]'); f.value = 'L1 radius';"
        "f.dispatchEvent(new Event('input', {bubbles: true}));" + seen
    )
    _, title = opened(tmp_path / "index.html", tmp_path, script, "#q=dssn")
    assert unescape(title) == "dssn#q=dssn&threat=L1+radius&passed=on"
    script = f"document.querySelector('[type=reset]').click(); setTimeout(() => {{ {seen} }}, 50)"
    _, title = opened(tmp_path / "index.html", tmp_path, script, "#q=dssn")
    assert title == ",".join(sorted([*names.values(), *(row.name for row in found)]))


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1280, 1000, 390])
def test_no_column_is_lost(width, tmp_path):
    """The committed page: what is wider than the page scrolls, with a hint; on a phone nothing is."""
    shutil.copytree(COMMITTED, tmp_path / "board", ignore=shutil.ignore_patterns("runs"))
    script = (
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "const wide = [...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth);"
        "const cells = [...document.querySelectorAll('tr.main > *')].filter(c => c.getBoundingClientRect().width < 20);"
        "const fits = document.documentElement.scrollWidth <= innerWidth;"
        "const told = wide.every(s => s.tabIndex === 0 && s.previousElementSibling.checkVisibility());"
        "document.title = [innerWidth, fits, told, wide.length > 0, cells.length].join()"
    )
    _, title = opened(tmp_path / "board" / "index.html", tmp_path, script, width=width)
    assert title == f"{width},true,true,{'true' if width == 1000 else 'false'},0"


def test_the_budget_of_certificates_says_what_a_draw_takes_and_when_drawing_stops():
    fixed = {"n0": 100, "n": 10_000, "alpha": 0.001, "stop": None}
    assert stated({"draws": fixed}) == "n0 100, n 10,000"
    anytime = {**fixed, "stop": {"radii": [0.0, 0.25]}}
    dense = {"draws": anytime, "votes": 5, "steps": 4, "precision": "bf16"}
    expected = "at most, stopped once the radii 0, 0.25 are settled, each 5 x 4 network calls, bf16 denoiser"
    assert stated(dense) == f"n0 100, n 10,000 {expected}"
    few = {"draws": fixed, "steps": 2, "reverse": "ddim", "score_model": zoo.score_model("digits-flow").fingerprint()}
    assert stated(few) == "n0 100, n 10,000, each 2 network calls of ddim, denoiser digits-flow"
    old = {**fixed, "stop": {"radius": 0.5, "looks": 4}}  # of version 0.2
    assert stated({"draws": old}) == "n0 100, n 10,000, stopped at radius 0.5 in 4 looks"


def test_the_budget_of_the_adaptive_attack_is_its_calls():
    from purify.attacks import PGD, Adaptive
    from purify.cli.attack import describe
    from purify.leaderboard.rows import _stated

    attack = Adaptive("Linf", 0.3, calls=400)
    assert describe(attack) == "adaptive 400 calls"
    assert _stated(attack.budget()) == "adaptive 400 calls"
    assert _stated(PGD("Linf", 0.3, steps=2, eot=3).budget()) == "pgd-eot 2 x EOT 3"


def test_a_curve_is_no_run_and_names_those_it_has(tmp_path):
    (tmp_path / "eps-0.3").mkdir()
    (tmp_path / "eps-0.1").mkdir()
    with pytest.raises(ValueError, match=r"holds a curve over eps; name a run of it, as .*eps-0\.1\."):
        read_run(tmp_path)
