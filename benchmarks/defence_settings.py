#!/usr/bin/env python3
"""Which settings a purifier gets on Fashion-MNIST: a small grid under a small attack, on images that no table shows.

    python benchmarks/defence_settings.py --out runs/settings
    python benchmarks/defence_settings.py --out runs/settings --only "diffpure;freqpure"

The images are of the second half of the test set. Chosen is the setting that keeps most under attack among those whose
clean accuracy is at most --lost points below DiffPure's, and of equals the one with more of it; if there is none, the
one with most clean accuracy. Each setting's numbers go into a file of its own, so that the command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defences import System, measure
from judging import Judge, shown

from purify.checks import check_count, check_writable, choose
from purify.diffusion.reverse import DDIM
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.purification.plans import Held

DATASET = "fashion_mnist"
FIRST = 5000  # of the second half
REFERENCE = "diffpure"


def freqpure(t_star: float, radius: float) -> dict[str, Any]:
    return {"t_star": t_star, "steps": 10, "reverse": "ddpm", "amplitude_radius": radius, "phase_radius": radius}


def diffap(t_star: float, scale: float) -> dict[str, Any]:
    return {"t_star": t_star, "steps": 5, "scale": scale}


def mimicdiffusion(t_star: float, scale: float) -> dict[str, Any]:
    own = {"scale": scale, "t_min": 0.0, "t_max": 1.0}
    return {"t_star": t_star, "steps": 10, "reverse": DDIM(1.0), **own}


def likelihood(t_star: float, steps: int) -> dict[str, Any]:
    return {"t_star": t_star, "steps": Held(steps, spread=0.185)}


def langevin(t_star: float, step: float) -> dict[str, Any]:
    return {"t_star": t_star, "steps": 20, "step": step}


def heterogeneous(t_star: float, threshold: float) -> dict[str, Any]:
    return {"t_star": t_star, "steps": 10, "threshold": threshold, "auxiliary": f"{DATASET}-standard"}


# By purifier: the names of what is varied, how options are made of it, and its values.
GRIDS: dict[str, tuple[tuple[str, str], Any, tuple[tuple[float, float], ...]]] = {
    "freqpure": (("t*", "radius"), freqpure, ((0.2, 1), (0.2, 2), (0.3, 1), (0.3, 2))),
    "diffap": (("t*", "scale"), diffap, ((0.2, 15), (0.2, 50), (0.3, 15), (0.3, 50))),
    "mimicdiffusion": (("t*", "scale"), mimicdiffusion, ((0.2, 4), (0.2, 12), (0.3, 12), (0.3, 36))),
    "likelihood": (("t*", "steps"), likelihood, ((0.1, 10), (0.145, 5), (0.145, 10), (0.2, 10))),
    "langevin": (("t*", "step"), langevin, ((0.05, 0.1), (0.05, 0.15), (0.1, 0.1), (0.1, 0.2))),
    "heterogeneous": (("t*", "threshold"), heterogeneous, ((0.2, 0.9), (0.2, 0.5), (0.25, 0.5), (0.3, 0.5))),
}


def settings(purifier: str) -> dict[str, System]:
    """What is tried of a purifier, by name; of the reference, its own setting."""
    if purifier == REFERENCE:
        return {"its setting": System(purifier)}
    (one, two), options, values = GRIDS[purifier]
    return {f"{one} {a:g}, {two} {b:g}": System(purifier, options=options(a, b)) for a, b in values}


def chosen(rows: Mapping[str, Mapping[str, Any]], least: float) -> str:
    """The most robust of those with the clean accuracy ``least``, or else the one with most clean accuracy."""
    kept = {name: row for name, row in rows.items() if row["clean"]["value"] >= least}
    if not kept:
        return max(rows, key=lambda name: rows[name]["clean"]["value"])
    return max(kept, key=lambda name: (kept[name]["worst"]["value"], kept[name]["clean"]["value"]))


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], lost: float) -> str:
    """In Markdown; the chosen ones are marked."""
    (reference,) = found[REFERENCE].values()
    lines = ["| purifier | setting | clean | under attack | |", "| --- | --- | --- | --- | --- |"]
    for purifier, rows in found.items():
        best = chosen(rows, reference["clean"]["value"] - lost / 100)
        for name, row in rows.items():
            mark = "chosen" if name == best and purifier != REFERENCE else ""
            lines.append(f"| {purifier} | {name} | {shown(row['clean'])} | {shown(row['worst'])} | {mark} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="which purifiers, separated by semicolons (default: all)")
    p.add_argument("--images", type=int, default=16, help=f"test images from {FIRST} (default: 16)")
    p.add_argument("--calls", type=int, default=600, help="network calls per image (default: 600)")
    p.add_argument("--draws", type=int, default=6, help="purifications that judge each image (default: 6)")
    p.add_argument("--lost", type=float, default=5.0, help="points of clean accuracy below DiffPure's (default: 5)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--out", type=Path, required=True, help="folder of the numbers and the table")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        known = [REFERENCE, *GRIDS]
        asked = args.only.split(";") if args.only else known
        wanted = [choose(name.strip(), dict(zip(known, known, strict=True)), "purifier") for name in asked]
        for what in ("images", "calls", "draws"):
            check_count(getattr(args, what), f"--{what}")
        check_writable(args.out / "settings.md")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for purifier in dict.fromkeys([REFERENCE, *wanted]):
        for name, system in settings(purifier).items():
            path = args.out / f"{purifier}-{name.replace(', ', '-').replace(' ', '-').replace('*', '')}.json"
            if not path.is_file():
                write_json(path, measure(system, Judge(DATASET, args.images, FIRST, args.draws), args.calls))
            row = found.setdefault(purifier, {})[name] = json.loads(path.read_text())
            print(f"{purifier}, {name}: clean {shown(row['clean'])}, attacked {shown(row['worst'])}", flush=True)
    (args.out / "settings.md").write_text(table(found, args.lost))
    print(f"\n{table(found, args.lost)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
