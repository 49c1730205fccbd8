"""Rows of certificates: numbers as in the run, beside attacked systems and alone."""

import json
import shutil

import pytest
from boards import Cells

from purify import zoo
from purify.leaderboard import read_certified, read_run, read_runs, write_leaderboard
from purify.leaderboard.certified import stated


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
