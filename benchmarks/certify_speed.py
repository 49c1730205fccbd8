#!/usr/bin/env python3
"""How fast denoised smoothing is certified: against a plain loop over images, and against the bare forward passes.

All in one process, at equal draws through the same denoiser and classifier, alternating; ratios of medians. The
plain loop runs twice: with batches of 1000, the default of Cohen et al.'s program, and with as many rows as ours,
which tells how much of the difference is the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from purify import zoo
from purify.certify import Draws, Smooth, denoised_smoothing
from purify.certify.bounds import lower_bound
from purify.certify.counts import ROWS
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.machine import seconds, set_threads
from purify.named import check_device


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="benchmarks/certify_speed.py", description=__doc__)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--sigma", type=float, default=0.25)
    p.add_argument("--samples", type=int, default=4, help="images (default: 4)")
    p.add_argument("--draws", type=int, default=2000, help="n (default: 2000); n0 is 100")
    p.add_argument("--plain-batch", type=int, default=1000, help="batch of the plain loop (default: 1000, as Cohen's)")
    p.add_argument("--max-rows", type=int, help="noisy images in the model at once (default: 256; on a GPU 8192)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, help="JSON file to write")
    return p


@torch.no_grad()
def plain_loop(smooth: Smooth, images: Tensor, draws: Draws, batch: int) -> list[int]:
    """One image after the other as in Cohen et al.'s program: the image repeated, fresh noise by torch.randn, classes
    moved to the CPU and counted there one by one."""

    def sample(x: Tensor, n: int) -> np.ndarray:
        counts = np.zeros(CLASSES, dtype=int)
        while n > 0:
            size = min(batch, n)
            n -= size
            repeated = x.repeat(size, 1, 1, 1)
            answers = smooth.classifier(repeated + smooth.sigma * torch.randn_like(repeated)).argmax(1)
            for answer in answers.cpu().numpy():
                counts[answer] += 1
        return counts

    found = []
    for x in images:
        chosen = int(sample(x, draws.n0).argmax())
        hits = sample(x, draws.n)[chosen]
        found.append(chosen if lower_bound(hits, draws.n, draws.alpha) >= 0.5 else -1)
    return found


@torch.no_grad()
def forward_passes(classifier: nn.Module, noisy: Tensor, rows: int) -> int:
    """Nothing but the network, as many rows as the certificates take; ``noisy`` is used again and again."""
    last = 0
    while rows > 0:
        size = min(len(noisy), rows)
        rows -= size
        last = int(classifier(noisy[:size]).argmax(1)[-1])  # waits for the device
    return last


CLASSES = 10  # of both embedded data sets
OURS, PLAIN, SAME_BATCH, BARE = "ours", "plain loop", "plain loop in our batches", "forward passes"


def build_works(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed, each with the same number of noisy images in the model."""
    choose(args.dataset, {k: v for k, v in DATASETS.items() if k in zoo.names("score")}, "embedded data set")
    for what in ("samples", "draws", "repeats", "plain_batch"):
        check_count(getattr(args, what), what)
    if args.max_rows is not None:
        check_count(args.max_rows, "max_rows")
    set_threads(args.threads)
    device = check_device(args.device)
    draws, rows = Draws(100, args.draws), ROWS[device.type] if args.max_rows is None else args.max_rows
    score, classifier = zoo.score_model(args.dataset).to(device), zoo.classifier(f"{args.dataset}-standard").to(device)
    smooth = denoised_smoothing(classifier, score, args.sigma, rows)
    images = load_dataset(args.dataset, "test")[0][: args.samples].to(device)
    noisy = images[:1] + args.sigma * torch.randn(rows, *images.shape[1:], device=device)
    smooth.certify(images[:1], Draws(10, max(rows, 10)))  # warm up
    return {
        PLAIN: lambda: plain_loop(smooth, images, draws, args.plain_batch),
        SAME_BATCH: lambda: plain_loop(smooth, images, draws, rows),
        OURS: lambda: smooth.certify(images, draws).classes.tolist(),
        BARE: lambda: forward_passes(smooth.classifier, noisy, len(images) * (draws.n0 + draws.n)),
    }


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each, and their ratios."""
    works = build_works(args)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            times[name].append(seconds(work, torch.device(args.device)))
    middle = {name: statistics.median(t) for name, t in times.items()}
    return {
        **{f"{name}, seconds per image": t / args.samples for name, t in middle.items()},
        "images per second, ours to plain loop": middle[PLAIN] / middle[OURS],
        "images per second, ours to plain loop in our batches": middle[SAME_BATCH] / middle[OURS],
        "time, ours to forward passes": middle[OURS] / middle[BARE],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; bad input is one line on stderr and status 2."""
    args = parser().parse_args(argv)
    try:
        if args.out is not None:
            check_writable(args.out)
        found = measure(args)
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
