#!/usr/bin/env python3
"""The runs behind docs/leaderboard, unattended: the adaptive attack and those that its self-checks compare it with.

    python benchmarks/leaderboard_runs.py --minutes 120      # the same command goes on where it stopped
    purify leaderboard docs/leaderboard/runs/* --out docs/leaderboard

Each run is a ``purify attack`` of its own, one thread each, the cheapest first. When the time is up the processes are
stopped; the batches of 32 that they finished are kept. A run that is complete is moved to --keep without its
adversarial images. Runs in docs/leaderboard that say --batch-size 128 were made before: another batch changes no more
than rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from purify.checks import check_count, check_weight, check_writable, choose
from purify.leaderboard.links import portable

ATTACKS = "random-noise,transfer,guide-transfer,adaptive"  # those that do not apply to a purifier are left out
CALLS = {"digits": 10_000, "fashion_mnist": 6000}
# An AGDM gradient takes three times as many; the others still fell when their calls were doubled.
MORE = {
    ("digits", "agdm", "constant"): 20_000,
    ("digits", "agdm", "ssni-l"): 40_000,
    ("digits", "gns", "ssni-l"): 20_000,
    ("fashion_mnist", "agdm", "constant"): 10_000,
    ("fashion_mnist", "agdm", "ssni-l"): 20_000,
    ("fashion_mnist", "diffpure", "ssni-l"): 12_000,
    ("fashion_mnist", "gdmp", "ssni-l"): 12_000,
    ("fashion_mnist", "gns", "constant"): 20_000,
    ("fashion_mnist", "gns", "ssni-l"): 20_000,
}
IMAGES = {"digits": 256, "fashion_mnist": 128}
# Purifier, noise level, classifier: the cheapest first.
SYSTEMS = (
    ("diffpure", "constant", "standard"),
    ("diffpure", "ssni-l", "standard"),
    ("diffpure", "ssni-n", "standard"),
    ("diffpure", "constant", "at"),
    ("agdm", "constant", "standard"),
    ("agdm", "ssni-l", "standard"),
    ("agdm", "constant", "at"),
    ("gdmp", "constant", "standard"),
    ("gdmp", "ssni-l", "standard"),
    ("gns", "constant", "standard"),
    ("gns", "ssni-l", "standard"),
)


@dataclass(frozen=True)
class Run:
    """One row: a purifier behind a classifier."""

    dataset: str
    purifier: str
    level: str
    classifier: str

    @property
    def name(self) -> str:
        parts = [self.purifier, *([] if self.level == "constant" else [self.level])]
        parts += [] if self.classifier == "standard" else [self.classifier]
        return "-".join([self.dataset, *parts, str(IMAGES[self.dataset]), "adaptive"])

    def command(self, out: Path) -> list[str]:
        given = {
            "dataset": self.dataset, "purifier": self.purifier, "noise-level": self.level,
            "model": f"{self.dataset}-{self.classifier}", "attacks": ATTACKS, "budget": "standard",
            "calls": MORE.get((self.dataset, self.purifier, self.level), CALLS[self.dataset]),
            "n-examples": IMAGES[self.dataset], "batch-size": 32, "max-rows": 256, "threads": 1, "out": out,
        }  # fmt: skip
        return [sys.executable, "-m", "purify", "attack", *(w for k, v in given.items() for w in (f"--{k}", str(v)))]


def runs(datasets: list[str], only: list[str]) -> Iterator[Run]:
    """The runs of these data sets whose name holds one of ``only``; all if that is empty."""
    for dataset in datasets:
        for system in SYSTEMS:
            run = Run(dataset, *system)
            if not only or any(part in run.name for part in only):
                yield run


def work(run: Run, args: argparse.Namespace, end: float) -> None:
    """Run it, or go on with it, until it or the time ends."""
    kept, out = args.keep / run.name, args.out / run.name
    left = end - time.monotonic()
    if kept.exists() or left <= 0:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(args.out / f"{run.name}.log", "a") as log:
        try:
            status = subprocess.run(run.command(out), stdout=log, stderr=log, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{run.name}: time is up; the same command goes on.", flush=True)
            return
    if status:
        print(f"{run.name}: failed with {status}; see {log.name}.", flush=True)
        return
    keep(out, kept)
    worst = json.loads((kept / "result.json").read_text())["verdict"].splitlines()[-1].strip()
    print(f"{run.name}: {(time.monotonic() - start) / 60:.0f} min; {worst}", flush=True)


def keep(out: Path, kept: Path) -> None:
    """Copy what the leaderboard shows of a run; its options and commands without the folders of this machine."""
    partial = kept.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(out, partial, ignore=shutil.ignore_patterns("adversarial", ".lock", "*.png"))
    for name in ("run.yaml", "manifest.json"):
        (partial / name).write_text(portable((partial / name).read_text()))
    partial.rename(kept)  # whole or not at all


def check(args: argparse.Namespace) -> list[Run]:
    """The runs that are asked for.

    Raises:
        ValueError: an unknown data set, no run of such a name, a number that means nothing, a folder that cannot be
            written to.
    """
    datasets, only = ([part for part in given.split(",") if part] for given in (args.dataset, args.only))
    for dataset in datasets:
        choose(dataset, IMAGES, "data set")
    found = list(runs(datasets, only))
    if not found:
        raise ValueError(f"--only {args.only} names no run: {', '.join(run.name for run in runs(datasets, []))}.")
    check_count(args.workers, "--workers")
    check_weight(args.minutes, "--minutes")
    for folder, option in ((args.out, "--out"), (args.keep, "--keep")):
        check_writable(folder / "anything", option)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits,fashion_mnist")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--minutes", type=float, default=120.0, help="all processes stop then")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard-runs"), help="where runs are made")
    parser.add_argument("--keep", type=Path, default=Path("docs/leaderboard/runs"), help="where complete ones go")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    try:
        asked = check(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda run: work(run, args, end), asked))
    missing = [run.name for run in asked if not (args.keep / run.name).exists()]
    print(f"{len(asked) - len(missing)} of {len(asked)} runs are complete; not: {', '.join(missing) or 'none'}.")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
