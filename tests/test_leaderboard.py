"""A leaderboard from a small run: numbers as in the run, escaped text, a page that works in a browser."""

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script

from purify.evaluate.certify_command import main as certify
from purify.evaluate.command import main as benchmark
from purify.evaluate.metrics import worst_mean
from purify.leaderboard import read_certified, read_run, read_runs, write_leaderboard

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
    assert by_name["cohen 0.1"].budget == "n0 10, n 64; 12 images; PGD 2 x EOT 2 inside the radius"


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
    write_leaderboard(read_run(run), tmp_path / "alone")
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
        (r.name == "cohen 0.25", r.name + "refuted" * (r.name == "cohen 0.25"))
        for r in sorted(found, key=lambda r: (-r.found.acr.value, r.name))
    ]
    assert "| ! [cohen 0.25](../copy/manifest.json) |" in (tmp_path / "board" / "leaderboard.md").read_text()
    assert json.loads((tmp_path / "board" / "leaderboard.json").read_text()) == []


def test_names_from_runs_are_escaped(run, certified, tmp_path):
    evil = {"name": "<script>alert(1)</script>"}
    row, proven = replace(read_run(run)[0], **evil), replace(read_certified(certified[0])[0], **evil)
    write_leaderboard([row], tmp_path, [proven])
    text = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") == 2


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


def test_the_committed_leaderboard_is_that_of_the_committed_records(tmp_path):
    committed = Path(__file__).parent.parent / "docs" / "leaderboard"
    shutil.copytree(committed / "runs", tmp_path / "runs")
    rows, certified = read_runs(sorted((tmp_path / "runs").iterdir()))
    write_leaderboard(rows, tmp_path, certified)
    for name in ("leaderboard.json", "certified.json", "leaderboard.md", "index.html"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), f"{name}: run benchmarks/leaderboard.py"
    assert {row.dataset for row in rows} == {"digits", "fashion_mnist"}
    assert {row.name.split()[0] for row in rows} >= {"diffpure", "gdmp", "agdm", "gns"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_sorts_and_filters_in_a_browser(run, certified, tmp_path):
    rows, found = read_runs([run, *certified])
    write_leaderboard(rows, tmp_path, found)
    page = tmp_path / "index.html"
    script = (
        "<script>document.querySelectorAll('#board thead button')[4].click();"
        "const f=document.querySelector('#filter');f.value='diffpure';f.dispatchEvent(new Event('input'));"
        "for (const t of document.querySelectorAll('table')) if (t.id !== 'board') t.querySelector('button').click();"
        "</script>"
    )
    (tmp_path / "driven.html").write_text(page.read_text().replace("</body>", script + "</body>"))
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*chromium, "--dump-dom", f"file://{tmp_path / 'driven.html'}"], capture_output=True, text=True, check=True
    ).stdout
    assert "2 of 9 rows" in dom
    assert dom.count('aria-sort="descending"') == 3
    names = [row.split("<small")[0].split("</th>")[0] for row in dom.split('<th scope="row" rowspan="2">')[1:]]
    clean = {r.name: r.clean["mean"].value for r in rows}
    values = [clean[n] for n in names[:4]]
    assert values == sorted(values, reverse=True)
    assert names[4:] == ["ssn", "dssn", "multiscale", "cohen 0.25", "cohen 0.1"]
