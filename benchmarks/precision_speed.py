#!/usr/bin/env python3
"""What half precision under attack saves, and what it costs the gradient: PGD+EOT in each precision, in one process.

Cosines are with the gradient in float64: of the whole defence, and of the purification alone (a fixed linear function
of its unclamped result), without the kinks of the clamp and of the classifier, where next to nothing turns a gradient.

The networks: the U-Net of google/ddpm-cifar10-32 (35 million parameters) with random weights and a ResNet-18 behind it,
batch 8, 20 steps; the embedded Fashion-MNIST and digits behind DiffPure; and, asked for as photographs, the same U-Net
and ResNet-18 after a short training on natural images (half an hour). On a CPU the time is the
process's CPU seconds, which hardly depend on what else the machine does; on a GPU it is wall time. Runs are
interleaved. Cosines come first, so that compiled networks are compiled before anything is timed.

examples:
  benchmarks/precision_speed.py --threads 1
  benchmarks/precision_speed.py --threads 1 --systems fashion_mnist digits --repeats 5
  benchmarks/precision_speed.py --threads 1 --systems cifar10-sized --precisions float32+compile bf16+compile
  benchmarks/precision_speed.py --threads 1 --systems photographs --train-steps 300  # stopped, it goes on
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from card.bench import TOY, Size, score_model
from card.photographs import crops, trained
from torch import Tensor, nn
from torchvision.models import resnet18

from purify import machine, zoo
from purify.attacks import PGD
from purify.checks import check_count, check_writable
from purify.data import load_dataset
from purify.diffusion.precision import FLOAT32, PRECISIONS
from purify.diffusion.schedule import DiscreteVP
from purify.evaluate.precision import COSINE, offered
from purify.evaluate.records import write_json
from purify.evaluate.runner import Samples
from purify.evaluate.selfchecks import input_gradient, reference
from purify.machine import set_threads
from purify.named import check_device
from purify.presets import diffpure
from purify.purification.defended import DefendedClassifier
from purify.purification.purifier import twin

CIFAR, TRAINED = "cifar10-sized", "photographs"
TARGETS = {CIFAR: 0.6, TRAINED: 0.6, "fashion_mnist": 0.72}  # of float32's time, on one thread
CHECKED = 2  # images whose gradients are held against float64
EPS = {CIFAR: 8 / 255, TRAINED: 8 / 255, "fashion_mnist": 0.1, "digits": 0.3}
SYSTEMS = tuple(EPS)
DEFAULT = [name for name in SYSTEMS if name != TRAINED]
Row = dict[str, Any]


def system(name: str, args: argparse.Namespace, device: torch.device) -> tuple[DefendedClassifier, Samples]:
    """A defended classifier and the images that are attacked."""
    n, steps = (TOY.batch, TOY.steps) if args.toy else (args.batch_size, args.steps)
    size = TOY if args.toy else Size()
    if name == TRAINED:
        classifier, score = trained(size, args.train_steps, args.out.parent / TRAINED)
        x, y = crops(size.image, n, seen=False)
    elif name == CIFAR:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier, x = resnet18(num_classes=10).eval(), torch.rand(n, 3, size.image, size.image)
        score, y = score_model(size, DiscreteVP.linear(1000)), torch.arange(n) % 10
    else:
        classifier, score = zoo.classifier(f"{name}-standard"), zoo.score_model(name)
        x, y = (part[:n] for part in load_dataset(name, "test"))
    model = DefendedClassifier(classifier, diffpure(score, 0.1, steps, "ddpm")).to(device)
    return model, Samples(x.to(device), y.to(device), torch.arange(n))


def spent(work: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of the process; on a GPU wall seconds."""
    if device.type != "cpu":
        return machine.seconds(work, device)
    start = time.process_time()
    work()
    return time.process_time() - start


class Linear(nn.Module):
    """Two classes whose margin is a fixed random linear function of the image."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape.numel(), 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to (N, 2)."""
        return x.flatten(1) @ self.weight


def smooth(model: DefendedClassifier, samples: Samples) -> DefendedClassifier:
    """The purification alone: nothing clamped, nothing classified."""
    readout = Linear(samples.images.shape[1:]).eval().to(samples.images.device)
    return DefendedClassifier(readout, twin(model.purifier, clip=False))


def cosines(model: DefendedClassifier, few: Samples, names: Sequence[str]) -> dict[str, float]:
    """Of the gradient in each precision with that in float64, least of the images."""
    exact = input_gradient(reference(model), few, torch.float64, 0)
    used = {name: input_gradient(model.with_precision(name), few, torch.float32, 0) for name in names}
    return {name: torch.cosine_similarity(g, exact, dim=1).min().item() for name, g in used.items()}


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row per precision: time of the attack, as it is and to float32's, and the gradient's cosines."""
    model, samples = system(name, args, device)
    names, few = (FLOAT32, *(args.precisions or offered(samples))), samples[torch.arange(CHECKED)]
    whole = cosines(model, few, names)
    alone = cosines(smooth(model, few), replace(few, labels=torch.zeros_like(few.labels)), names)
    rows: dict[str, Row] = {
        p: {"system": name, "precision": p, "cosine": whole[p], "cosine, purification": alone[p]} for p in names
    }
    attack = PGD("Linf", EPS[name], steps=args.attack_steps, eot=args.eot)
    taken: dict[str, list[float]] = {p: [] for p in names}
    for repetition in range(args.repeats):
        for p in names[:: -1 if repetition % 2 else 1]:
            attacked = model.with_precision(p)
            taken[p].append(spent(partial(attack, attacked, samples.images, samples.labels), device))
    for p, row in rows.items():
        ratios = [half / usual for half, usual in zip(taken[p], taken[FLOAT32], strict=True)]
        row["seconds"] = statistics.median(taken[p])
        row["time to float32"], row["least"], row["greatest"] = statistics.median(ratios), min(ratios), max(ratios)
    return list(rows.values())


def verdicts(rows: list[Row]) -> list[str]:
    """Whether half precision keeps to the targets."""
    said = []
    for row in rows:
        if row["precision"] == FLOAT32:
            continue
        what = f"{row['system']}, {row['precision']}"
        target, ratio, cosine = TARGETS.get(row["system"]), row["time to float32"], row["cosine"]
        if target is not None:
            said.append(f"{'ok  ' if ratio <= target else 'MISS'} {what}: time {ratio:.3f} (target {target:g})")
        said.append(f"{'ok  ' if cosine >= COSINE else 'MISS'} {what}: cosine {cosine:.4f} (limit {COSINE:g})")
    return said


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, default=DEFAULT, metavar="SYSTEM")
    others = [name for name in PRECISIONS if name != FLOAT32]
    p.add_argument(
        "--precisions", nargs="+", choices=others, metavar="PRECISION",
        help=f"held against float32: {', '.join(others)} (default: those that auto offers, not compiled)",
    )  # fmt: skip
    p.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="reverse steps (default: %(default)s)")
    p.add_argument("--attack-steps", type=int, default=1, help="gradient steps of PGD (default: %(default)s)")
    p.add_argument("--eot", type=int, default=1, help="draws per gradient (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=2, help="timed runs of each (default: %(default)s)")
    p.add_argument("--train-steps", type=int, default=300, help=f"of {TRAINED} (default: %(default)s)")
    p.add_argument("--toy", action="store_true", help="tiny networks and few steps: does it run at all?")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/precision.json"), help="JSON (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("batch_size", "steps", "attack_steps", "eot", "repeats", "train_steps"):
            check_count(getattr(args, name), f"--{name.replace('_', '-')}")
        device = check_device(args.device)
        set_threads(args.threads)
        check_writable(args.out)
        rows: list[Row] = []
        for name in args.systems:
            for row in measure(name, args, device):
                rows.append(row)
                print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(verdicts(rows)))
    options = {k: str(v) for k, v in vars(args).items()} | {"threads": torch.get_num_threads()}
    write_json(args.out, {"options": options, "rows": rows})
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
