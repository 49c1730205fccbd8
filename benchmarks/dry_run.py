#!/usr/bin/env python3
"""Does --dry-run say what a run takes? Its time and memory of a gradient, beside what one takes, for purifiers on the
embedded networks under every way of keeping graphs.

Both times are CPU seconds where this runs on a CPU, which hardly depend on what else the machine does: use --threads 1.
Memory is the peak of what lives during one gradient.

examples:
  benchmarks/dry_run.py --threads 1
  benchmarks/dry_run.py --datasets digits --purifiers diffpure gdmp --gradients checkpoint
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_fidelity import peak_bytes
from precision_speed import spent
from torch import Tensor

from purify import zoo
from purify.attacks import PGD
from purify.checks import check_count, check_writable
from purify.data import DATASETS, load_dataset
from purify.evaluate import dryrun
from purify.evaluate.runner import Defence, Samples
from purify.machine import set_threads
from purify.named import check_device
from purify.wrap import wrap

WITHIN = 0.25  # of what is taken
EMBEDDED = tuple(name for name in DATASETS if name in zoo.calibrations())
PURIFIERS = ("diffpure", "gdmp", "agdm", "gns", "ssni-l")
GRADIENTS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "checkpoint": {"kind": "checkpoint"},
    "half kept": {"kind": "checkpoint"},  # with half of the memory that full takes as its budget
}
Row = dict[str, Any]


def measure(dataset: str, purifier: str, gradient: str, args: argparse.Namespace, device: torch.device) -> Row:
    """What the dry run says of one defence, and what its gradient takes."""
    x, y = (t[: args.batch_size].to(device) for t in load_dataset(dataset, "test"))
    ids = torch.arange(len(x), device=device)
    engine = dict(GRADIENTS[gradient])
    if gradient == "half kept":
        whole = wrap(f"{dataset}-standard", dataset=dataset, purifier=purifier, gradient="full", steps=args.steps)
        engine["memory_budget"] = said(whole.to(device), x, y).memory // 2
    model = wrap(f"{dataset}-standard", dataset=dataset, purifier=purifier, gradient=engine, steps=args.steps)
    model = model.to(device)

    def work() -> Tensor:
        v = x.clone().requires_grad_()
        return torch.autograd.grad(model(v, sample_ids=ids).logsumexp(1).sum(), v)[0]

    cost, peak = said(model, x, y), peak_bytes(work, device)
    taken = statistics.median(spent(work, device) for _ in range(args.repeats))
    return {
        "dataset": dataset,
        "purifier": purifier,
        "gradient": gradient,
        "seconds": taken,
        "time, said to taken": cost.gradient * len(x) / taken,
        "peak MiB": peak / 2**20,
        "memory, said to taken": cost.memory / peak,
    }


def said(model: Any, x: Tensor, y: Tensor) -> Any:
    """The dry run's cost of an attack that takes one gradient."""
    defence = Defence("d", model, [PGD("Linf", 0.1, steps=1, eot=1)], 1, {})
    return dryrun.estimate(defence, Samples(x, y, torch.arange(len(x))), len(x))


def verdicts(rows: list[Row]) -> list[str]:
    """How many predictions are within the limit, and which are not."""
    found = []
    for what in ("memory, said to taken", "time, said to taken"):
        off = [row for row in rows if not 1 - WITHIN <= row[what] <= 1 + WITHIN]
        found.append(
            f"{'ok  ' if not off else 'MISS'} {what}: {len(rows) - len(off)} of {len(rows)} within {WITHIN:.0%}"
        )
        found += [f"     {row['dataset']} {row['purifier']} {row['gradient']}: {row[what]:.2f}" for row in off]
    return found


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--datasets", nargs="+", choices=EMBEDDED, default=list(EMBEDDED))
    p.add_argument("--purifiers", nargs="+", choices=PURIFIERS, default=list(PURIFIERS))
    p.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS))
    p.add_argument("--batch-size", type=int, default=16, help="images (default: %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="reverse steps (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="timed gradients (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/dry-run.json"), help="JSON (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("batch_size", "steps", "repeats"):
            check_count(getattr(args, name), f"--{name.replace('_', '-')}")
        device = check_device(args.device)
        set_threads(args.threads)
        dryrun.seconds = spent
        check_writable(args.out)
        rows = []
        for case in ((d, p, g) for d in args.datasets for p in args.purifiers for g in args.gradients):
            rows.append(measure(*case, args, device))
            print(
                ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True
            )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(verdicts(rows)))
    args.out.write_text(
        json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=2) + "\n"
    )
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
