#!/usr/bin/env python3
"""Certified accuracy of smoothed classifiers, with an attack inside the certified radii as a cross-check.

Without arguments: denoised smoothing of the embedded digits classifier.
"""

from __future__ import annotations

import sys

from purify.cli.certify import main

if __name__ == "__main__":
    sys.exit(main(prog="benchmarks/run_certify.py"))
