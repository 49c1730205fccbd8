#!/usr/bin/env python
"""What the attacks that were released with recent defences would have reported, beside the exact gradient.

Each attacks a model that is not the one defended: other steps, no guidance, or no gradient of the purifier. Its
adversarial images are judged behind the defence itself, on purifications that no attack has seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from judging import Judge

from purify import DefendedClassifier, Purifier, diffpure, zoo
from purify.attacks import PGD
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.purification.purifier import twin
from purify.wrap import build_purifier


def unguided(purifier: Purifier) -> Purifier:
    """The same without what ties its steps to the input."""
    assert purifier.guidance is not None
    return twin(purifier, guidance=replace(purifier.guidance, scale=0.0))


# What each released program attacks in place of the defence; see the defences' pages.
RELEASED: dict[str, tuple[str, Callable[[Purifier], Purifier]]] = {
    "freqpure": ("one step", lambda p: p.with_steps(1)),
    "diffap": ("no guidance", unguided),
    "mimicdiffusion": ("DiffPure, t* 0.2, 5 steps", lambda p: diffpure(p.score_model, 0.2, 5, "ddpm")),
    "heterogeneous": ("2 steps", lambda p: p.with_steps(2)),
    "likelihood": ("BPDA", lambda p: p.with_gradient("bpda")),
    "langevin": ("BPDA", lambda p: p.with_gradient("bpda")),
}


def measure(name: str, judge: Judge, steps: int, eot: int) -> dict[str, str]:
    """Accuracies in % with 95 % intervals: clean, under the released attack, under exact gradients."""
    defence = build_purifier(name, None, judge.dataset)
    classifier = zoo.classifier(f"{judge.dataset}-standard")
    model = DefendedClassifier(classifier, defence)
    what, weaken = RELEASED[name]
    attack = PGD("Linf", DATASETS[judge.dataset].eps["Linf"], steps=steps, eot=eot)
    attacked = {f"released ({what})": DefendedClassifier(classifier, weaken(defence)), "exact": model}
    found = {how: judge.accuracy(model, judge.attacked(attack, target)) for how, target in attacked.items()}
    return {how: str(value).strip() for how, value in {"clean": judge.accuracy(model), **found}.items()}


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--purifiers", default=",".join(RELEASED), help="which, separated by commas (default: all)")
    p.add_argument("--images", type=int, default=32, help="first test images (default: 32)")
    p.add_argument("--steps", type=int, default=20, help="of PGD (default: 20)")
    p.add_argument("--eot", type=int, default=4, help="draws per step (default: 4)")
    p.add_argument("--draws", type=int, default=10, help="purifications that judge each image (default: 10)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--out", type=Path, default=None, help="where to write the numbers, too")
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        names = args.purifiers.split(",")
        for name in names:
            choose(name, RELEASED, "purifier")
        choose(args.dataset, dict.fromkeys(("digits", "fashion_mnist")), "data set")
        for name in ("images", "steps", "eot", "draws"):
            check_count(getattr(args, name), f"--{name}")
        if args.out is not None:
            check_writable(args.out)
        set_threads(args.threads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {}
    for name in names:
        found[name] = measure(name, Judge(args.dataset, args.images, 0, args.draws), args.steps, args.eot)
        print(name, *(f"{what} {value}" for what, value in found[name].items()), sep="; ", flush=True)
    if args.out is not None:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
