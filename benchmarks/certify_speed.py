#!/usr/bin/env python3
"""How fast images are certified: against the bare forward passes, and denoised smoothing against a plain loop, too.

All in one process, at equal draws through the same networks, alternating; ratios of medians. The plain loop runs
twice: with batches of 1000, the default of Cohen et al.'s program, and with as many rows as ours, which tells how much
of the difference is the batch. Times are those of the process (CPU) with --cpu-time, for a machine that is shared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from purify import zoo
from purify.certify import SSN, Anytime, Cascade, Certifier, Draws, Smooth, denoised_smoothing
from purify.certify.bounds import lower_bound
from purify.certify.counts import ROWS
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.diffusion.precision import PRECISIONS
from purify.evaluate.records import write_json
from purify.machine import seconds, set_threads
from purify.named import check_device


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="benchmarks/certify_speed.py", description=__doc__)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--system", default="denoised", help=f"{', '.join(SYSTEMS)} (default: denoised)")
    p.add_argument("--precision", default="float32", help="of the denoiser: float32, bf16 or fp16 (default: float32)")
    p.add_argument("--anytime", action="store_true", help="anytime sampling for radii 0, sigma, 2 sigma")
    p.add_argument("--sigma", type=float, default=0.25, help="a cascade has twice this, too (default: 0.25)")
    p.add_argument("--samples", type=int, default=4, help="images (default: 4)")
    p.add_argument("--draws", type=int, default=2000, help="n (default: 2000); n0 is 100")
    p.add_argument("--plain-batch", type=int, default=1000, help="batch of the plain loop (default: 1000, as Cohen's)")
    p.add_argument("--max-rows", type=int, help="noisy images in the model at once (default: 256; on a GPU 8192)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--device", default="cpu")
    p.add_argument("--cpu-time", action="store_true", help="time of this process instead of the clock's")
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


def denoised(args: argparse.Namespace, device: torch.device, sigma: float, rows: int) -> Smooth:
    """Denoised smoothing with the embedded networks."""
    score, classifier = zoo.score_model(args.dataset).to(device), zoo.classifier(f"{args.dataset}-standard").to(device)
    return denoised_smoothing(classifier, score.with_precision(args.precision), sigma, rows)


SYSTEMS: dict[str, Callable[[argparse.Namespace, torch.device, int], Certifier]] = {
    "denoised": lambda args, device, rows: denoised(args, device, args.sigma, rows),
    "cascade": lambda args, device, rows: Cascade(
        tuple(denoised(args, device, s, rows) for s in (args.sigma, 2 * args.sigma))
    ),
    "cohen": lambda args, device, rows: Smooth(
        zoo.classifier(f"{args.dataset}-standard").to(device), args.sigma, max_rows=rows
    ),
    "ssn": lambda args, device, rows: SSN(zoo.classifier(f"{args.dataset}-ssn").to(device), 1.0, max_rows=rows),
}


def build_works(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed, each with the same number of noisy images in the model."""
    choose(args.dataset, {k: v for k, v in DATASETS.items() if k in zoo.names("score")}, "embedded data set")
    choose(args.precision, PRECISIONS, "precision")
    build = choose(args.system, SYSTEMS, "system")
    for what in ("samples", "draws", "repeats", "plain_batch"):
        check_count(getattr(args, what), what)
    if args.max_rows is not None:
        check_count(args.max_rows, "max_rows")
    set_threads(args.threads)
    device = check_device(args.device)
    rows = ROWS[device.type] if args.max_rows is None else args.max_rows
    stop = Anytime((0.0, args.sigma, 2 * args.sigma)) if args.anytime else None
    draws = Draws(100, args.draws, stop=stop)
    certifier = build(args, device, rows)
    images = load_dataset(args.dataset, "test")[0][: args.samples].to(device)
    noisy = images[:1] + args.sigma * torch.randn(rows, *images.shape[1:], device=device)
    certifier.certify(images[:1], Draws(10, max(rows, 10)))  # warm up
    passes = int(certifier.certify(images, draws).draws.sum())  # of a cascade some images take more
    model = next(iter(certifier.noisy_models().values())).classifier
    loops: dict[str, Callable[[], object]] = {}
    if isinstance(certifier, Smooth) and stop is None:
        loops[PLAIN] = lambda: plain_loop(certifier, images, draws, args.plain_batch)
        loops[SAME_BATCH] = lambda: plain_loop(certifier, images, draws, rows)
    return {
        **loops,
        OURS: lambda: certifier.certify(images, draws).classes.tolist(),
        BARE: lambda: forward_passes(model, noisy, passes),
    }


def taken(work: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds that ``work`` takes, by the clock or of this process."""
    if not args.cpu_time:
        return seconds(work, torch.device(args.device))
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each, and their ratios."""
    works = build_works(args)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            times[name].append(taken(work, args))
    middle = {name: statistics.median(t) for name, t in times.items()}
    loops = [name for name in (PLAIN, SAME_BATCH) if name in middle]
    return {
        **{f"{name}, seconds per image": t / args.samples for name, t in middle.items()},
        **{f"images per second, ours to {name}": middle[name] / middle[OURS] for name in loops},
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
            write_json(args.out, found)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
