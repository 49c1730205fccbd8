#!/usr/bin/env python
"""Rank what finished runs measured: leaderboard.json, certified.json, leaderboard.md, plots, index.html (no server)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from purify.leaderboard import read_runs, write_leaderboard


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of finished runs")
    p.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows, certified = read_runs(args.runs)
        write_leaderboard(rows, args.out, certified)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.out / "leaderboard.md").read_text())
    print(f"Wrote {args.out / 'index.html'}, leaderboard.json, certified.json and leaderboard.md beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
