#!/usr/bin/env python
"""Rank the defences of finished runs: leaderboard.json, leaderboard.md, plots, index.html (no server needed)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from purify.leaderboard import read_run, write_leaderboard


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders that run_autoattack.py wrote")
    p.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows = [row for run in args.runs for row in read_run(run)]
        write_leaderboard(rows, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.out / "leaderboard.md").read_text())
    print(f"Wrote {args.out / 'index.html'}, leaderboard.json and leaderboard.md beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
