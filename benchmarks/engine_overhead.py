#!/usr/bin/env python3
"""What exact gradients take beyond the passes of the networks that they need, for every purifier in the presets.

The calls of the score network and of an auxiliary network in one gradient are recorded: how often each is run forward,
backward to its input, and backward through that. Then the same passes run bare, of the same batch, without anything of
purify around them. Times are CPU seconds of this process (a GPU's: wall time), runs interleaved, medians of ratios.

- full: time to its own bare passes (limit 1.15; DiffPure on digits 1.06, on Fashion-MNIST 1.03).
- checkpoint: time to the bare passes of full, and to its own, one forward pass more per step.
- score only: the bare passes of full to those of the score network alone, which tells what the guide itself takes.

examples:
  benchmarks/engine_overhead.py --threads 1
  benchmarks/engine_overhead.py --threads 1 --datasets fashion_mnist --purifiers diffpure agdm --repeats 9
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify import machine, presets, zoo
from purify.checks import check_count, check_writable
from purify.data import load_dataset
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.named import check_device
from purify.purification.gradients import Checkpoint, Full
from purify.purification.purifier import Purifier
from purify.settings import setting

DATASETS = ("digits", "fashion_mnist")
LIMIT = 1.15  # of a gradient's own bare passes
PLAIN = {"digits": 1.06, "fashion_mnist": 1.03}  # the limit of DiffPure
CHECKPOINT = 1.55  # of the bare passes of full, for DiffPure: one forward pass more is 1.5


@dataclass
class Call:
    """One forward pass: what the network was given, and the backward passes through it."""

    network: nn.Module
    arguments: tuple[Any, ...]
    graph: bool
    backward: int = 0
    differentiated: int = 0  # backward passes whose own graph was kept: second derivatives


@dataclass
class Recorder:
    """Calls of some networks, in order."""

    networks: list[nn.Module]
    calls: list[Call] = field(default_factory=list)

    def see(self, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        inputs = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
        call = Call(network, inputs, output.requires_grad)
        self.calls.append(call)

        def back(grad: Tensor) -> None:
            if torch.is_grad_enabled():
                call.differentiated += 1
            else:
                call.backward += 1

        if output.requires_grad:
            output.register_hook(back)

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [network.register_forward_hook(self.see) for network in self.networks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def bare(call: Call) -> None:
    """The same passes of the network alone."""
    with torch.set_grad_enabled(call.graph):
        first, *rest = call.arguments
        x = first.requires_grad_(call.graph)
        output = call.network(x, *rest)
        if call.differentiated:
            (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
            torch.autograd.grad(slope, x, first.detach())
            return
        for left in range(call.backward, 0, -1):
            torch.autograd.grad(output, x, output.detach(), retain_graph=left > 1)


def gradient_work(purifier: Purifier, x: Tensor) -> Callable[[], Tensor]:
    """A gradient of a purification, with respect to the images."""
    ids = torch.arange(len(x), device=x.device)

    def work() -> Tensor:
        images = x.clone().requires_grad_()
        return torch.autograd.grad(purifier(images, sample_ids=ids, seed=1), images, torch.ones_like(x))[0]

    return work


def networks(purifier: Purifier) -> list[nn.Module]:
    found = [purifier.score_model.network, purifier.auxiliary]
    return [network for network in found if network is not None]


def recorded(purifier: Purifier, work: Callable[[], object]) -> list[Call]:
    """The network calls of ``work``."""
    recorder = Recorder(networks(purifier))
    with recorder.recording():
        work()
    return recorder.calls


def counts(purifier: Purifier, calls: list[Call]) -> dict[str, int]:
    """Passes of each network: forward, backward, and backward through a backward pass."""
    found: Counter[str] = Counter()
    for call in calls:
        name = "score" if call.network is purifier.score_model.network else "guide"
        found[f"{name} forward"] += 1
        found[f"{name} backward"] += call.backward
        found[f"{name} twice"] += call.differentiated
    return {name: count for name, count in found.items() if count}


def spent(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of the process; on a GPU wall seconds."""
    if device.type != "cpu":
        return machine.seconds(work, device)
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, dataset: str, args: argparse.Namespace) -> dict[str, Any]:
    """One purifier on one data set."""
    device = check_device(args.device)
    x = load_dataset(dataset, "test")[0][: args.batch_size].to(device)
    preset, _ = presets.find_preset(name)
    purifier = preset(zoo.score_model(dataset), **setting(name, dataset).options()).to(device)
    engines = {"full": Full(), "checkpoint": Checkpoint()}
    gradients = {e: gradient_work(purifier.with_gradient(engine), x) for e, engine in engines.items()}
    calls = {e: recorded(purifier, work) for e, work in gradients.items()}
    score = [call for call in calls["full"] if call.network is purifier.score_model.network]
    works: dict[str, Callable[[], object]] = {
        **gradients,
        "bare full": lambda: [bare(call) for call in calls["full"]],
        "bare checkpoint": lambda: [bare(call) for call in calls["checkpoint"]],
        "bare score": lambda: [bare(call) for call in score],
    }
    taken: dict[str, list[float]] = {key: [] for key in works}
    for repetition in range(args.repeats + 1):
        for key in list(works)[:: -1 if repetition % 2 else 1]:
            seconds = spent(works[key], device)
            if repetition:
                taken[key].append(seconds)

    def ratio(a: str, b: str) -> float:
        return statistics.median(p / q for p, q in zip(taken[a], taken[b], strict=True))

    return {
        "dataset": dataset,
        "purifier": name,
        "full": ratio("full", "bare full"),
        "checkpoint": ratio("checkpoint", "bare full"),
        "checkpoint, own": ratio("checkpoint", "bare checkpoint"),
        "to score only": ratio("bare full", "bare score"),
        "ms per image": 1000 * statistics.median(taken["full"]) / len(x),
        "passes": counts(purifier, calls["full"]),
    }


def verdicts(row: dict[str, Any]) -> list[str]:
    """Whether a row keeps to its limits."""
    plain = row["purifier"] == "diffpure"
    limits = {"full": PLAIN[row["dataset"]] if plain else LIMIT}
    limits["checkpoint" if plain else "checkpoint, own"] = CHECKPOINT if plain else LIMIT
    what = f"{row['dataset']}, {row['purifier']}"
    return [
        f"{'ok  ' if row[key] <= limit else 'MISS'} {what}: {key} {row[key]:.3f} (limit {limit:g})"
        for key, limit in limits.items()
    ]


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    p.add_argument("--purifiers", nargs="+", default=list(presets.PURIFIERS), help="default: all presets")
    p.add_argument("--batch-size", type=int, default=64, help="images (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/engine_overhead.json"), help="JSON (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows = []
    try:
        for name in ("batch_size", "repeats"):
            check_count(getattr(args, name), f"--{name.replace('_', '-')}")
        set_threads(args.threads)
        check_writable(args.out)
        for dataset in args.datasets:
            for name in args.purifiers:
                rows.append(measure(name, dataset, args))
                print(
                    ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()),
                    flush=True,
                )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(line for row in rows for line in verdicts(row)))
    write_json(args.out, {"threads": torch.get_num_threads(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
