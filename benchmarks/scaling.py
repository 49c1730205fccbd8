#!/usr/bin/env python
"""Throughput of the evaluation in several processes that torchrun starts, each with some threads.

Runs the same short evaluation (digits, DiffPure, PGD+EOT) as PROCESSESxTHREADS says, and compares the samples per
second of attack and judgement; starting up is not counted. Leave the machine alone meanwhile. Two processes are
compared with one that has as many threads as each of them (at least 1.7 times where all cores are free), and with one
that has them all: how much that gains depends on how well one process uses its threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from purify.checks import check_count, check_writable
from purify.evaluate.records import write_json
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
    return max(sum(spent[int(i)] for i in ids[share(ids, BATCH, rank, processes)]) for rank in range(processes))


def measure(processes: int, threads: int, n: int, folder: Path) -> float:
    """Samples per second of ``processes`` with ``threads`` each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    budget = ["--attack-steps", "10", "--eot", "8", "--n-examples", str(n), "--batch-size", str(BATCH)]
    settings = ["--noise-level", "constant", "--attacks", "pgd-eot", "--threads", str(threads)]
    subprocess.run([*launch, BENCHMARK, *budget, *settings, "--out", folder], check=True, capture_output=True)
    return n / busy(folder, processes)


def parse(text: str) -> list[tuple[int, int]]:
    """``1x4,2x2`` as processes and threads each."""
    try:
        found = [(int(k), int(t)) for k, t in (part.split("x") for part in text.split(","))]
    except ValueError as error:
        raise ValueError(f"--runs takes processes and threads like 1x4,2x2, got {text!r}.") from error
    for count in (n for run in found for n in run):
        check_count(count, "every number in --runs")
    return found


def report(speed: dict[tuple[int, int], float]) -> None:
    """Each run against those of one process."""
    for (k, t), value in speed.items():
        line = f"{k} x {t} threads: {value:.2f} samples/s"
        for single in (run for run in speed if run[0] == 1 and k > 1):
            line += f", {value / speed[single]:.2f} of 1 x {single[1]}"
            if k == 2 and single[1] == t:
                line += f" ({'at least' if value >= LIMIT * speed[single] else 'LESS THAN'} {LIMIT})"
        print(line)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="1x4,1x2,2x2,4x1", help="processes and threads of each (default: %(default)s)")
    p.add_argument("--n-examples", type=int, default=64, help="images (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/scaling.json"), help="default: %(default)s")
    args = p.parse_args(argv)
    try:
        runs = parse(args.runs)
        check_count(args.n_examples, "n-examples")
        check_writable(args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        speed = {(k, t): measure(k, t, args.n_examples, Path(folder) / f"{k}x{t}") for k, t in runs}
    report(speed)
    found = {"command": " ".join(sys.argv), "samples per second": {f"{k}x{t}": v for (k, t), v in speed.items()}}
    write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
