#!/usr/bin/env python3
"""What a large network takes here: memory while its file is loaded, and one PGD step with exact gradients behind it,
beside what the dry run says of that. One JSON line is printed, and one line for reading.

- loading: greatest resident memory beyond that before, relative to the size of the file (at most 1.1).
- graphs: peak of what tensors take during the step, and the dry run's memory relative to it (within 25 %).
- seconds: CPU seconds of the step, the first one; with --time those of a gradient, and the dry run's relative to it.
- resident: peak of the process, with weights and what the kernels take.

examples:
  benchmarks/large.py --dataset cifar10 --score-model checkpoint_8.pth --model Standard
  benchmarks/large.py --dataset imagenet --score-model guided-imagenet256 --model Salman2020Do_R50 --steps 1
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import diffusers.models.unets.unet_2d  # noqa: F401 - a library is no part of a file's size
import torch
from gradient_fidelity import peak_bytes
from precision_speed import spent
from torch import nn

from purify.attacks import PGD
from purify.checkpoints import PUBLIC, find
from purify.checkpoints.diffusers import weights_file
from purify.checks import check_count
from purify.evaluate import dryrun
from purify.evaluate.runner import Defence, Samples
from purify.machine import set_threads
from purify.named import load_score
from purify.sources import resolve_data
from purify.wrap import wrap


def resident(peak: bool = True) -> int:
    """Bytes that are resident now, or at most since :func:`restart`; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    name = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{name}:\s+(\d+)", status.read_text()) if status.is_file() else None
    return 0 if found is None else 1024 * int(found[1])


def restart() -> None:
    """Forget the peak."""
    if Path("/proc/self/clear_refs").is_file():
        Path("/proc/self/clear_refs").write_text("5")


def file_size(name: str, model: nn.Module) -> int:
    """Bytes of the file that ``name`` stands for; of a ``file.py:function``, of the model's weights."""
    path = find(name) if name in PUBLIC else Path(name)
    if path.is_dir():
        path = weights_file(path / "unet") or weights_file(path) or path
    if path.is_file():
        return path.stat().st_size
    return sum(w.nbytes for w in model.state_dict().values())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one combination."""
    restart()
    before = resident(peak=False)
    score = load_score(args.score_model, args.dataset)
    loading, size = resident() - before, file_size(args.score_model, score)
    row: dict[str, Any] = {"score": args.score_model, "file MB": size / 1e6, "loading": loading / size}
    row["parameters"] = sum(p.numel() for p in score.parameters())
    if args.model is None:
        return row
    settings: dict[str, Any] = {"t_star": 0.1, "steps": args.steps, "gradient": {"kind": args.gradient}}
    model = wrap(args.model, args.dataset, purifier=args.purifier, score_model=score, **settings)
    x = torch.rand(args.rows, *resolve_data(args.dataset).shape, generator=torch.Generator().manual_seed(0))
    samples = Samples(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
    attack = PGD("Linf", 4 / 255, steps=1, eot=1)
    defence = Defence("d", model, [attack], 1, {})
    said = dryrun.most_held(defence, x[:1], len(x), len(x))
    seconds: list[float] = []
    restart()
    peak = peak_bytes(lambda: seconds.append(spent(lambda: attack(model, x, samples.labels), x.device)), x.device)
    row |= {
        "model": args.model,
        "steps": args.steps,
        "seconds": seconds[0],
        "graphs MB": peak / 1e6,
        "graphs, said to taken": said / peak,
        "resident MB": resident() / 1e6,
    }
    if args.time:
        row |= timed(model, defence, samples)
    return row


def timed(model: nn.Module, defence: Defence, samples: Samples) -> dict[str, float]:
    """Seconds of one gradient, and what the dry run says of them."""
    dryrun.seconds = spent
    said = dryrun.estimate(defence, samples, len(samples)).gradient * len(samples)

    def gradient() -> None:
        v = samples.images.clone().requires_grad_()
        torch.autograd.grad(model(v, sample_ids=samples.ids).logsumexp(1).sum(), v)

    taken = statistics.median(spent(gradient, samples.images.device) for _ in range(3))
    return {"seconds of a gradient": taken, "seconds, said to taken": said / taken}


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dataset", default="cifar10", help="whose images' shape is taken (default: %(default)s)")
    p.add_argument("--score-model", required=True, help="name, file, folder, or file.py:function")
    p.add_argument("--model", help="classifier: RobustBench name, or file.py:function; without one, loading alone")
    p.add_argument("--purifier", default="diffpure", help="preset (default: %(default)s)")
    p.add_argument("--gradient", choices=("full", "checkpoint"), default="checkpoint", help="(default: %(default)s)")
    p.add_argument("--steps", type=int, default=2, help="reverse steps (default: %(default)s)")
    p.add_argument("--rows", type=int, default=1, help="images (default: %(default)s)")
    p.add_argument("--time", action="store_true", help="the dry run's time, too, which takes a few gradients more")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("steps", "rows"):
            check_count(getattr(args, name), f"--{name}")
        set_threads(args.threads)
        row = measure(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(row))
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
