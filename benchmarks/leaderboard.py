#!/usr/bin/env python3
"""Rank what finished runs measured: leaderboard.json, certified.json, leaderboard.md, plots, index.html (no server)."""

from __future__ import annotations

import sys

from purify.cli.leaderboard import main

if __name__ == "__main__":
    sys.exit(main(prog="benchmarks/leaderboard.py"))
