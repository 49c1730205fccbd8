#!/usr/bin/env python3
"""How noisy one draw's gradient is, and whether a shorter process's gradient on common noise would take that noise off.

At the clean images of the first half of the test set and at images under attack (``--attack-calls`` network calls of
the adaptive attack on them), D draws of the margin's gradient through the whole process and, on the same keyed noise,
through the adaptive attack's shorter one:

- *cosine*: of one draw with the mean of the others; 1 / sqrt(1 + 1/snr) for noise without a direction;
- *draws*: whose mean has a cosine of 0.9 with the expected gradient, by the measured variance;
- *correlation*: of both processes' deviations from their means;
- *multilevel*: calls for the same variance with the shorter process as control variate (Giles 2008; Peherstorfer et
  al. 2016, the optimum for two models: (sqrt(1 - rho^2) + sqrt(rho^2 c))^2 at cost ratio c), to those without. Below 1
  it saves.

Medians over images.

    python benchmarks/gradient_noise.py --systems diffpure,agdm,gdmp
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import purify
from purify import zoo
from purify.attacks import Adaptive
from purify.attacks.adaptive.phases import shorter
from purify.attacks.base import keyed
from purify.attacks.losses import margin_loss
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.presets import PURIFIERS
from purify.purification.calls import calls

WANTED = 0.9  # cosine of a step's gradient with the expected one
PLACES = ("clean", "under attack")


def gradients(model: Any, x: Tensor, y: Tensor, ids: Tensor, draws: int, rows: int) -> Tensor:
    """The margin's gradient at every draw, (draws, N, C * H * W)."""
    call, n, found = keyed(model, 0), len(x), []
    for part in torch.arange(draws * n).split(rows):
        z = x[part % n].requires_grad_()
        with torch.enable_grad():
            loss = margin_loss(call(z, ids[part % n], part // n), y[part % n]).sum()
        found.append(torch.autograd.grad(loss, z)[0].flatten(1))
    return torch.cat(found).reshape(draws, n, -1).double()


def measured(whole: Tensor, short: Tensor, ratio: float) -> dict[str, Tensor]:
    """What is quoted, for each image: of gradients (draws, N, D) through both processes; ``ratio``: of their costs."""
    draws, mean = len(whole), whole.mean(0)
    others = (mean * draws - whole) / (draws - 1)
    off, off_short = whole - mean, short - short.mean(0)
    noise = off.square().sum((0, 2)) / (draws - 1)
    signal = (mean.square().sum(1) - noise / draws).clamp_min(0)  # without the noise that the mean still has
    power = off_short.square().sum((0, 2)) / (draws - 1)
    shared = ((off * off_short).sum((0, 2)) / (draws - 1)).square() / (noise * power).clamp_min(1e-30)
    shared = shared.clamp_max(1)
    mixed = ((1 - shared).sqrt() + (shared * ratio).sqrt()).square()
    return {
        "cosine": torch.cosine_similarity(whole, others, dim=2).mean(0),
        "draws": noise / signal * WANTED**2 / (1 - WANTED**2),
        "correlation": shared.sqrt(),
        "multilevel": mixed.clamp_max(1),
    }


def study(system: str, place: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    model: Any = purify.wrap(f"{args.dataset}-standard", dataset=args.dataset, purifier=system)
    images, labels = load_dataset(args.dataset, "test")
    ids = torch.arange(min(args.images, len(images) // 2))
    x, y = images[ids], labels[ids]
    if place != PLACES[0]:
        eps = DATASETS[args.dataset].eps["Linf"]
        x = Adaptive("Linf", eps, calls=args.attack_calls)(model, x, y, sample_ids=ids).images
    less = shorter(model)
    ratio = calls(less).gradient / calls(model).gradient
    whole, short = (gradients(m, x, y, ids, args.draws, args.max_rows) for m in (model, less))
    found = measured(whole, short, ratio)
    row: dict[str, Any] = {"system": system, "place": place, "cost ratio": ratio}
    return row | {name: values.nanmedian().item() for name, values in found.items()}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits")
    p.add_argument("--systems", default="diffpure,agdm,gdmp,gns", help="purifiers, separated by commas")
    p.add_argument("--images", type=int, default=24)
    p.add_argument("--draws", type=int, default=64)
    p.add_argument("--attack-calls", type=int, default=3000)
    p.add_argument("--max-rows", type=int, default=256)
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/gradient_noise.json"))
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        choose(args.dataset, {k: v for k, v in DATASETS.items() if k in zoo.names("score")}, "embedded data set")
        systems = args.systems.split(",")
        for name in systems:
            choose(name, PURIFIERS, "purifier")
        for name, least in (("images", 1), ("draws", 2), ("attack_calls", 1), ("max_rows", 1)):
            check_count(getattr(args, name), f"--{name.replace('_', '-')}", least)
        set_threads(args.threads)
        check_writable(args.out)
        rows = []
        for system in systems:
            for place in PLACES:
                rows.append(study(system, place, args))
                print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in rows[-1].items()), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(args.out, {"options": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
