"""The page, its Markdown and its plots: they agree, link to what is there, and show no text as code."""

import json
import shutil
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from boards import Cells, worst_of

from purify.leaderboard import plots, read_certified, read_run, read_runs, write_leaderboard
from purify.leaderboard.links import command, portable


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
