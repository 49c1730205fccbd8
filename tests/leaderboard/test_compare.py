"""benchmarks/compare.py: differences between two runs, paired by image."""

import json

import numpy as np
import pytest
from boards import SMALL
from conftest import load_script

from purify.cli.attack import main as benchmark
from purify.evaluate.metrics import worst_mean
from purify.leaderboard import read_certified, read_run


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
