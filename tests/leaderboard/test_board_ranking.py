"""Which system stands where, and by which of its measurements."""

import json
import shutil
from dataclasses import replace

import pytest
from boards import COMMITTED, Cells, worst_of

from purify.evaluate.budgets import reduced
from purify.leaderboard import read_run, read_runs, write_leaderboard


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


def test_nothing_to_rank_and_a_folder_that_cannot_be_written(run, tmp_path):
    with pytest.raises(ValueError, match="nothing to rank"):
        write_leaderboard([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_leaderboard(read_run(run), tmp_path / "file" / "below")


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
