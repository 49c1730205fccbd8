#!/usr/bin/env python3
"""Robust accuracy of a purified classifier, attacked through exact gradients.

Without arguments: the embedded demo on 8x8 digits, a few minutes on a CPU.
"""

from __future__ import annotations

import sys

from purify.cli.attack import main

if __name__ == "__main__":
    sys.exit(main(prog="benchmarks/run_autoattack.py"))
