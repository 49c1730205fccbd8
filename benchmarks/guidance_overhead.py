#!/usr/bin/env python
"""What guidance costs per reverse step, in units of one forward and backward pass of the auxiliary network.

A plain step, a guided step and the auxiliary network's forward and backward pass (with respect to the image) run in
turn in one process, without gradients of the whole, as in purification. The limit is 1.1 for guidance that takes the
score network's answer for constant; through the score network it costs a backward pass of that, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from purify import Purifier, agdm, diffpure, gdmp, zoo
from purify.checks import check_count, check_writable, choose
from purify.data import load_dataset
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.purification.process import ReverseStep
from purify.settings import setting

LIMIT = 1.1


def first_step(purifier: Purifier, x: Tensor) -> tuple[ReverseStep, Tensor]:
    """The first reverse step and the state that it starts from."""
    t_star = torch.full((len(x),), purifier.level.highest, dtype=torch.float64)
    noise = purifier.noise(len(x), x.device, range(len(x)), 0, 0)
    one_round = purifier.process(t_star, noise, images=2 * x - 1).rounds[0]
    return one_round.reverse[0], one_round.diffuse(2 * x - 1)


def auxiliary_pass(name: str, x: Tensor) -> Callable[[], object]:
    """Forward and backward pass of a zoo classifier with respect to the image."""
    network = zoo.classifier(name)

    def work() -> object:
        with torch.enable_grad():
            images = x.clone().requires_grad_()
            return torch.autograd.grad(network(images).square().sum(), images)

    return work


@torch.no_grad()
def measure(dataset: str, n: int, repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, interleaved."""
    x = load_dataset(dataset, "test")[0][:n]
    model, t_star, name = zoo.score_model(dataset), setting("diffpure", dataset).t_star, f"{dataset}-guide"
    purifiers = {
        "plain": diffpure(model, t_star, 10, "ddpm"),
        "gdmp": gdmp(model, t_star, 10, scale=100.0, rounds=1),
        "agdm": agdm(model, t_star, 10, auxiliary=name),
        "agdm through the score network": agdm(model, t_star, 10, auxiliary=name, through_score=True),
    }
    pairs = {kind: first_step(p, x) for kind, p in purifiers.items()}
    work: dict[str, Callable[[], object]] = {kind: (lambda s=s, u=u: s(u)) for kind, (s, u) in pairs.items()}
    work["auxiliary"] = auxiliary_pass(name, x)
    seconds: dict[str, list[float]] = {kind: [] for kind in work}
    for _ in range(repeats + 1):
        for kind, one in work.items():
            start = time.perf_counter()
            one()
            seconds[kind].append(time.perf_counter() - start)
    return {kind: median(values[1:]) for kind, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: %(default)s)")
    p.add_argument("--n-examples", type=int, default=128, help="images in a batch (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=20, help="measurements, of which the median counts (default: 20)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/guidance_overhead.json"), help="default: %(default)s")
    args = p.parse_args(argv)
    try:
        choose(args.dataset, dict.fromkeys(("digits", "fashion_mnist")), "data set of this benchmark")
        for what in ("n_examples", "repeats"):
            check_count(getattr(args, what), what)
        check_writable(args.out)
        set_threads(args.threads)
        seconds = measure(args.dataset, args.n_examples, args.repeats)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    guided = [kind for kind in seconds if kind not in ("plain", "auxiliary")]
    found = {kind: (seconds[kind] - seconds["plain"]) / seconds["auxiliary"] for kind in guided}
    print(f"{args.dataset}, {args.n_examples} images; a step's guidance in forward and backward passes of the network:")
    for kind, ratio in found.items():
        limit = "" if "through" in kind else f" ({'at most' if ratio <= LIMIT else 'MORE THAN'} {LIMIT})"
        print(f"{kind:32s} {ratio:.2f}{limit}")
    print(f"plain step {seconds['plain'] / seconds['auxiliary']:.2f}")
    write_json(args.out, {"seconds": seconds, "ratios": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
