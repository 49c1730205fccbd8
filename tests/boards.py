"""Small finished runs, made once for all tests of the leaderboard (a plugin of conftest.py), and what reads a page."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

SMALL = [
    *("--n-examples", "6", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--steps", "3"),
    *("--noise-level", "constant,ssni-l", "--attacks", "random-noise,pgd-eot,autoattack-rand"),
]
CERTIFIED = [
    *("--n-examples", "12", "--selection-draws", "10", "--draws", "64", "--attack-examples", "4", "--threads", "1"),
    *("--attack-steps", "2", "--eot", "2"),
]
COMMITTED = Path(__file__).parents[1] / "docs" / "leaderboard"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run of attacks; a test that changes it changes a copy."""
    from purify.cli.attack import main as benchmark

    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert benchmark([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def certified(tmp_path_factory):
    """Two finished runs of run_certify.py: L2 with other radii than L1; to be copied, too."""
    from purify.cli.certify import main as certify

    folder = tmp_path_factory.mktemp("certified")
    gauss = ["--method", "cohen,multiscale", "--sigma", "0.1,0.25", "--radii", "0,0.1,0.25,0.5"]
    split = ["--method", "ssn,dssn", "--model", "digits-standard", "--lam", "0.1", "--radii", "0,0.05"]
    assert certify([*CERTIFIED, *gauss, "--out", str(folder / "L2")]) == 0
    assert certify([*CERTIFIED, *split, "--out", str(folder / "L1")]) == 0
    return [folder / "L2", folder / "L1"]


def worst_of(row, value, **changes):
    """The row with another worst case."""
    from purify.evaluate.metrics import Estimate

    return replace(row, worst=dict.fromkeys(row.worst, Estimate(value, value, value)), **changes)


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
