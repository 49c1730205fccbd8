"""Rank what finished runs measured: leaderboard.json, certified.json, leaderboard.md, plots, index.html (no server)."""

from __future__ import annotations

import argparse
from pathlib import Path

from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.leaderboard import read_runs, write_leaderboard
from purify.options import PATH


def parser(prog: str = "purify leaderboard") -> Parser:
    """All options."""
    p = Parser(prog=prog, description=__doc__)
    p.add_argument("runs", nargs="+", type=taking(PATH), metavar="RUN_DIR", help="folders of finished runs")
    p.add_argument("--out", type=taking(PATH), default=Path("runs/leaderboard"), help="folder (default: %(default)s)")
    return p


def run(args: argparse.Namespace, command: str) -> int:
    """Read the runs, write everything, print the tables."""
    rows, certified = read_runs(args.runs)
    write_leaderboard(rows, args.out, certified)
    print((args.out / "leaderboard.md").read_text())
    print(f"Wrote {args.out / 'index.html'}, leaderboard.json, certified.json and leaderboard.md beside it.")
    return 0


def main(argv: list[str] | None = None, prog: str = "purify leaderboard") -> int:
    """Make a leaderboard; returns the exit status."""
    return guarded(parser(prog), run, argv)
