#!/usr/bin/env python
"""Time per gradient of our EOT-batched PGD against torchattacks' EOTPGD, through the same defended digits.

One gradient is one EOT draw of one image. Both attacks run in one process, in alternating order, at the same steps, EOT
draws, loss and images; ours also evaluates the last iterate, which is counted as its time. Theirs asks for one draw of
the batch at a time, ours for all: what that gains depends on how many images there are, so several batch sizes are
timed. Theirs runs twice: with weights frozen, as a DefendedClassifier freezes them, and with weights that require
gradients. Prints median ratios of paired runs and checks them; writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torchattacks
from torch import Tensor

from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import PGD
from purify.checks import check_count, check_writable
from purify.data import DATASETS, load_dataset
from purify.evaluate.records import write_json
from purify.machine import seconds, set_threads

OURS, PEER, PEER_WEIGHTS = "purify PGD", "torchattacks EOTPGD", "torchattacks EOTPGD, weights require gradients"
LIMIT = 2.0  # times faster than the peer


def defended(args: argparse.Namespace) -> DefendedClassifier:
    """Digits behind DiffPure; every call builds a model with weights of its own."""
    purifier = diffpure(zoo.score_model("digits"), args.t_star, args.reverse_steps, "ddpm")
    return DefendedClassifier(zoo.classifier("digits-standard"), purifier).to(args.device)


def build_works(args: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """One attack on ``x`` by each."""
    eps = DATASETS["digits"].eps["Linf"]
    frozen, thawed = defended(args), defended(args).requires_grad_(True)
    ours = PGD("Linf", eps, steps=args.steps, eot=args.eot, loss="ce", max_rows=args.max_rows)
    peer, peer_weights = (torchattacks.EOTPGD(model, eps, eps / 4, args.steps, args.eot) for model in (frozen, thawed))
    return {OURS: lambda: ours(frozen, x, y), PEER: lambda: peer(x, y), PEER_WEIGHTS: lambda: peer_weights(x, y)}


def times(args: argparse.Namespace, batch: int) -> dict[str, list[float]]:
    """Milliseconds per gradient of every repetition, in alternating order, after a run of each to warm up."""
    device = torch.device(args.device)
    x, y = (t[:batch].to(device) for t in load_dataset("digits", "test"))
    works = build_works(args, x, y)
    gradients = len(x) * args.steps * args.eot
    found: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(args.repeats + 1):
        for name in list(works)[:: 1 if repetition % 2 else -1]:
            spent = seconds(works[name], device)
            if repetition:
                found[name].append(1000 * spent / gradients)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", default="1,4,16,64", help="comma-separated numbers of images (default: %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="gradient steps (default: %(default)s)")
    p.add_argument("--eot", type=int, default=10, help="draws per gradient step (default: %(default)s)")
    p.add_argument("--max-rows", type=int, default=PGD.max_rows, help="rows at once in ours (default: %(default)s)")
    p.add_argument("--t-star", type=float, default=0.18, help="DiffPure's noise level (default: %(default)s)")
    p.add_argument("--reverse-steps", type=int, default=10, help="DiffPure's steps (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/attack-speed.json"), help="JSON (default: %(default)s)")
    return p


def parse(text: str) -> list[int]:
    """``1,4`` as numbers of images."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--batches takes whole numbers separated by commas, got {text!r}.") from error
    for batch in found:
        check_count(batch, "every number in --batches")
    return found


def measure(args: argparse.Namespace, batches: Sequence[int]) -> list[dict[str, object]]:
    """One row per batch size and peer: milliseconds per gradient and the ratio of paired runs."""
    rows: list[dict[str, object]] = []
    for batch in batches:
        found = times(args, batch)
        for name in (PEER, PEER_WEIGHTS):
            ratios = [theirs / ours for theirs, ours in zip(found[name], found[OURS], strict=True)]
            row = {
                "batch": batch,
                "peer": name,
                "ms ours": median(found[OURS]),
                "ms peer": median(found[name]),
                "ratio": median(ratios),
                "least": min(ratios),
                "greatest": max(ratios),
            }
            rows.append(row)
            print("{batch:4d} images, {peer}: {ms peer:.2f} ms to {ms ours:.2f} ms of ours,".format(**row), end=" ")
            print("{ratio:.2f} times [{least:.2f} to {greatest:.2f}]".format(**row), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("repeats", "reverse_steps"):
            check_count(getattr(args, name), name)
        batches = parse(args.batches)
        set_threads(args.threads)
        check_writable(args.out)
        rows = measure(args, batches)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        if row["peer"] == PEER:
            verdict = "ok  " if row["ratio"] >= LIMIT else "MISS"
            print(f"{verdict} {row['batch']} images: {row['ratio']:.2f} times as fast (limit {LIMIT:g})")
    options = {k: str(v) for k, v in vars(args).items()} | {"threads": torch.get_num_threads()}
    write_json(args.out, {"options": options, "rows": rows})
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
