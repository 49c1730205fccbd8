#!/usr/bin/env python
"""Throughput of the evaluation in 1, 2 and more processes that torchrun starts, each with its share of the threads.

Runs the same short evaluation (digits, DiffPure, PGD+EOT) with each number of processes, with --threads CPU threads in
all, and compares the samples per second of attack and judgement; starting up is not counted. Leave the machine alone
meanwhile. The limit is 1.7 for 2 processes on 4 free cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from purify.checks import check_count
from purify.evaluate.ranks import Ranks
from purify.evaluate.runner import share

BENCHMARK = Path(__file__).parent / "run_autoattack.py"
LIMIT = 1.7
BATCH = 16


def busy(folder: Path, processes: int) -> float:
    """Seconds that the busiest process worked on the defended model."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["defence"] == "diffpure"]
    spent = {s: sum(r["seconds"] for r in records if r["sample"] == s) for s in {r["sample"] for r in records}}
    ids = torch.tensor(sorted(spent))
    return max(
        sum(spent[int(i)] for i in ids[share(ids, BATCH, Ranks(rank, processes))]) for rank in range(processes)
    )


def measure(processes: int, threads: int, n: int, folder: Path) -> float:
    """Samples per second."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    budget = ["--attack-steps", "10", "--eot", "8", "--n-examples", str(n), "--batch-size", str(BATCH)]
    settings = ["--noise-level", "constant", "--attacks", "pgd-eot", "--threads", str(threads // processes)]
    subprocess.run([*launch, BENCHMARK, *budget, *settings, "--out", folder], check=True, capture_output=True)
    return n / busy(folder, processes)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", default="1,2,4", help="comma-separated numbers (default: %(default)s)")
    p.add_argument("--threads", type=int, default=4, help="CPU threads in all (default: %(default)s)")
    p.add_argument("--n-examples", type=int, default=64, help="images (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/scaling.json"), help="default: %(default)s")
    args = p.parse_args(argv)
    try:
        counts = [int(k) for k in args.processes.split(",")]
        for count in (*counts, args.threads, args.n_examples):
            check_count(count, "every number")
        if max(counts) > args.threads:
            raise ValueError(f"{max(counts)} processes need at least as many threads; raise --threads.")
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        speed = {k: measure(k, args.threads, args.n_examples, Path(folder) / str(k)) for k in counts}
    for k, value in speed.items():
        ratio = value / speed[counts[0]]
        limit = f" ({'at least' if ratio >= LIMIT else 'LESS THAN'} {LIMIT})" if (counts[0], k) == (1, 2) else ""
        each = f"{k} processes, {args.threads // k} threads each"
        print(f"{each}: {value:.2f} samples/s, {ratio:.2f} of {counts[0]}{limit}")
    args.out.write_text(json.dumps({"samples per second": speed}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
