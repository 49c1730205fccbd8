"""A leaderboard from a small run: numbers as in the run, escaped text, a page that works in a browser."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from purify.evaluate.command import main as benchmark
from purify.leaderboard import read_run, write_leaderboard
from purify.leaderboard.rows import Row

SMALL = [
    *("--n-examples", "6", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--steps", "3"),
    *("--noise-level", "constant,ssni-l", "--attacks", "random-noise,pgd-eot,autoattack-rand"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert benchmark([*SMALL, "--out", str(folder)]) == 0
    return folder


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
    assert rows["diffpure"].network_calls == 3
    assert rows["diffpure ssni-l"].network_calls == 11
    assert rows["diffpure"].command.startswith("--n-examples 6")
    failed = {c["name"] for c in result["self_checks"] if c["defence"] == "diffpure" and not c["passed"]}
    assert {c.split(":")[0] for c in rows["diffpure"].failed_checks} == failed


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


class Cells(HTMLParser):
    """Text of the table's rows, and every link and image."""

    def __init__(self):
        super().__init__()
        self.rows, self.links, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "tr":
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
        for value in (entry["name"], entry["robust_acc"], entry["clean_acc"], entry["strongest_attack"]):
            assert value in text
            assert value in markdown
        assert entry["budget"] in markdown
    for link in page.links:
        assert (tmp_path / "board" / link).exists(), link
    assert "http" not in "".join(page.links)


def test_names_from_runs_are_escaped(run, tmp_path):
    first = read_run(run)[0]
    evil = Row(**{**vars(first), "name": "<script>alert(1)</script>"})
    write_leaderboard([evil], tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_nothing_to_rank_and_a_folder_that_cannot_be_written(run, tmp_path):
    with pytest.raises(ValueError, match="nothing to rank"):
        write_leaderboard([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_leaderboard(read_run(run), tmp_path / "file" / "below")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_sorts_and_filters_in_a_browser(run, tmp_path):
    write_leaderboard(read_run(run), tmp_path)
    page = tmp_path / "index.html"
    script = (
        "<script>document.querySelectorAll('#board thead button')[4].click();"
        "const f=document.querySelector('#filter');f.value='diffpure';f.dispatchEvent(new Event('input'));</script>"
    )
    (tmp_path / "driven.html").write_text(page.read_text().replace("</body>", script + "</body>"))
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*chromium, "--dump-dom", f"file://{tmp_path / 'driven.html'}"], capture_output=True, text=True, check=True
    ).stdout
    assert "2 of 4 rows" in dom
    assert 'aria-sort="descending"' in dom
    names = [row.split("<small")[0].split("</th>")[0] for row in dom.split('<th scope="row">')[1:]]
    order = sorted(read_run(run), key=lambda r: -r.clean["mean"].value)
    found = {n: i for i, n in enumerate(names)}
    values = [next(r for r in order if r.name == n).clean["mean"].value for n in found]
    assert values == sorted(values, reverse=True)
