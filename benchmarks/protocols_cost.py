#!/usr/bin/env python3
"""What the protocols cost: gradients and network calls of a plain run, and of all protocols beside it.

    python benchmarks/protocols_cost.py                     # the demo's attacks on DiffPure, at its budget
    python benchmarks/protocols_cost.py --attacks pgd-eot   # beside a single attack
    python benchmarks/protocols_cost.py --planned --budget standard  # nothing is run

Gradients are counted as attacks tell them (purify/attacks/counting.py). Calls are rows of the score network's forward
passes, by a hook, a pass that is differentiated at the price of a gradient. What is planned is more: attacks that stop
early spend less. Answers of 32 and 128 purifications are left out, as by default. All other options are those of
`purify attack`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from purify.attacks.counting import heard
from purify.cli.attack import parser
from purify.cli.parsing import described
from purify.evaluate.attacking import Prepared, prepare
from purify.evaluate.description import Evaluation
from purify.evaluate.progress import weight
from purify.evaluate.protocols import PROTOCOLS
from purify.evaluate.protocols.measure import planned, purified
from purify.purification.calls import GRADIENT
from purify.purification.defended import DefendedClassifier

IMAGES = 8


class Meter:
    """Counts of one part of the work."""

    def __init__(self, prepared: Prepared) -> None:
        self.gradients = self.calls = 0
        for d in prepared.defences:
            if isinstance(d.model, DefendedClassifier):
                d.model.purifier.score_model.network.register_forward_hook(self._network)
                break  # the others share it

    def _network(self, network: Any, inputs: Any, output: torch.Tensor) -> None:
        asked = torch.is_grad_enabled() and output.requires_grad
        self.calls += len(output) * (GRADIENT if asked else 1)

    def hear(self, rows: int, each: int | None = None) -> None:
        """What attacks tell."""
        self.gradients += rows

    def read(self) -> tuple[int, int]:
        """Gradients and calls since the last reading."""
        found = self.gradients, self.calls
        self.gradients = self.calls = 0
        return found


def measure(asked: Evaluation) -> dict[str, tuple[int, int]]:
    """Gradients and calls of the run, and of all protocols after it."""
    prepared = prepare(asked)
    meter = Meter(prepared)
    with heard(meter.hear), prepared.open("benchmarks/protocols_cost.py") as folder:
        meter.read()  # checks before the run
        prepared.attack(folder)
        run = meter.read()
        prepared.protocols(folder)
    return {"run": run, "protocols": meter.read()}


def plan(asked: Evaluation) -> tuple[float, float]:
    """Calls for one image, of all networks, that a run and its protocols plan."""
    prepared = prepare(asked)
    run = sum(weight(d, attack) for d in prepared.defences for attack in d.stages())
    names, effort = prepared.protocol_names, prepared.effort
    return run, sum(planned(names, d, effort) for d in purified(prepared.defences))


def main(argv: list[str] | None = None) -> int:
    """Print counts per image, and ratios."""
    # The engine full recomputes nothing, so that every pass is seen once.
    defaults = ["--n-examples", str(IMAGES), "--gradient", "full", "--noise-level", "constant"]
    p = parser("protocols_cost.py")
    p.add_argument("--planned", action="store_true", help="say what is planned, and run nothing")
    args = p.parse_args([*defaults, *(sys.argv[1:] if argv is None else argv)])
    run, more = plan(described(Evaluation, args).replace(protocol=tuple(PROTOCOLS)))
    print(f"planned: {run:.0f} calls per image for the run, {1 + more / run:.2f} times that with all protocols")
    if args.planned:
        return 0
    with tempfile.TemporaryDirectory() as place:
        asked = described(Evaluation, args).replace(protocol=tuple(PROTOCOLS), out=Path(place) / "run")
        found = measure(asked)
        images = asked.n_examples
    for part, (gradients, calls) in found.items():
        print(f"{part:10} {gradients / images:10.1f} gradients {calls / images:12.1f} calls per image")
    total = [1 + more / of for more, of in zip(found["protocols"], found["run"], strict=True)]
    print(f"with all protocols {total[0]:.2f} times the gradients and {total[1]:.2f} times the calls of the run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
