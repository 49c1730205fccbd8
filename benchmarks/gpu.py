#!/usr/bin/env python3
"""What purify takes on one card: exact gradients against DiffPure's adjoint and a plain loop, certification, the
largest batch, the dry run's predictions, and how often the host waits for the device.

The networks, a U-Net of the size of ddpm-cifar10-32 and a ResNet-18, have seen natural images in a short training.
gpu.json and gpu.md are written after every section, so that one that fails loses no other.

examples:
  benchmarks/gpu.sh
  benchmarks/gpu.sh --toy --out runs/gpu-toy
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from card.batches import largest_batch
from card.bench import BFLOAT16, FLOAT32, TOY, Bench, Row, Size, word
from card.certification import certification
from card.gradients import compiled, gradients, step_memory
from card.photographs import crops, trained
from card.predictions import predictions
from card.waits import waits

from purify.checks import check_writable
from purify.diffusion.precision import rounds_to_tf32
from purify.evaluate.records import write_json
from purify.named import check_device

SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "gradients, float32": lambda bench: gradients(bench, FLOAT32),
    "gradients, bf16": lambda bench: gradients(bench, BFLOAT16),
    "gradients, bf16+compile": compiled,
    "memory per step": step_memory,
    "waits": waits,
    "certification": certification,
    "dry run": predictions,
    "largest batch": largest_batch,
}


def machine(bench: Bench) -> Row:
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if cuda else "CPU",
        "torch": torch.__version__,
        "convolutions of float32 in": "TF32" if rounds_to_tf32(bench.device) else "float32",
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "batch": bench.size.batch,
        "image": bench.size.image,
        "steps": bench.size.steps,
    }


def section(bench: Bench, measure: Callable[[Bench], list[Row]], late: bool) -> Row:
    """One section's rows, or the error that it ended with."""
    if late:
        return {"error": "not begun: the time was up"}
    start = time.perf_counter()
    bench.free()
    try:
        result: Row = {"rows": measure(bench)}
    except Exception as error:  # the other sections shall have their turn
        traceback.print_exc()
        result = {"error": word(error)}
    return {**result, "seconds": time.perf_counter() - start}


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/")


def markdown(report: Row) -> str:
    """The whole report as tables."""
    lines = [", ".join(f"{k} {cell(v)}" for k, v in report["machine"].items()) + "."]
    for name, found in report["sections"].items():
        rows = found.get("rows", [])
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {name}", "", found.get("error", "")][: 4 if "error" in found else 3]
        if rows:
            lines += ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
            lines += ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--toy", action="store_true", help="tiny networks and few steps: does it run at all?")
    p.add_argument("--device", help="cpu or cuda (default: cuda, for a toy cpu)")
    p.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=list(SECTIONS))
    p.add_argument("--minutes", type=float, default=6.0, help="no section begins later (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure section by section; write gpu.json and gpu.md after each."""
    args, start = parser().parse_args(argv), time.perf_counter()
    try:
        device = check_device(args.device or ("cpu" if args.toy else "cuda"))
        check_writable(args.out / "gpu.json")
        size = TOY if args.toy else Size()
        networks = trained(size, size.training, args.out / "trained", device, save_every=size.training)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bench = Bench(size, device, *networks, *crops(size.image, size.batch, seen=False))
    print(f"training: {time.perf_counter() - start:.0f} s since the start", flush=True)
    report: Row = {"machine": machine(bench), "sections": {}}
    for name in args.only:
        late = time.perf_counter() - start > 60 * args.minutes
        report["sections"][name] = section(bench, SECTIONS[name], late)
        write_json(args.out / "gpu.json", report)
        (args.out / "gpu.md").write_text(markdown(report))
        print(f"{name}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    print("\n" + markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
