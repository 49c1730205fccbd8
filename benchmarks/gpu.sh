#!/usr/bin/env bash
# What purify takes on one card, in some 8 minutes: benchmarks/gpu.sh [--toy] [--out FOLDER]; see docs/gpu.md.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 "$root/benchmarks/gpu.py" "$@"
