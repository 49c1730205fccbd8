#!/usr/bin/env python3
"""How much better or worse than one defence are others? Differences on the same images, with paired intervals."""

from __future__ import annotations

import sys

from purify.cli.compare import main

if __name__ == "__main__":
    sys.exit(main(prog="benchmarks/compare.py"))
