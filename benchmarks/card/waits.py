"""How often the host waits for the device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gradient_fidelity import Gradient, engine_gradient

import purify
from card.bench import Bench, Row
from purify.diffusion.reverse import EulerMaruyama
from purify.diffusion.schedule import ContinuousVP, DiscreteVP
from purify.purification.gradients import Checkpoint

PACKAGE, BENCHMARKS = str(Path(purify.__file__).parent), str(Path(__file__).parents[1])


def waits(bench: Bench) -> list[Row]:
    """Where the host waits for the device in one gradient, and how often per reverse step."""
    if bench.device.type != "cuda":
        return [{"place": "not asked: there is no device to wait for"}]
    rows: list[Row] = []
    n = bench.size.steps
    for name, schedule in (("discrete", DiscreteVP.linear(1000)), ("continuous", ContinuousVP())):
        model = bench.model.with_settings(schedule=schedule, time_scale=1000, time_offset=0)
        settings = [replace(bench.setting(steps=k), model=model) for k in (n, 2 * n)]
        few, many = (waiting(engine_gradient(s, Checkpoint(), EulerMaruyama())) for s in settings)
        places = {p: {"times": few[p], "per step": (many[p] - few[p]) / n} for p in few | many}
        places["all of them"] = {"times": few.total(), "per step": (many.total() - few.total()) / n}
        rows += [{"schedule": name, "place": place, **counts} for place, counts in places.items()]
    return rows


def waiting(work: Gradient) -> Counter[str]:
    """How often each place in purify (or in these scripts) makes the host wait, after a first run."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *args: Any, **options: Any) -> None:
        if "called a synchronizing" in str(message):
            found[place()] += 1

    work()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def place() -> str:
    """The innermost line of purify that is being run, or of the benchmark."""
    frames = [f for f in traceback.extract_stack()[:-2] if f.filename.startswith((PACKAGE, BENCHMARKS))]
    ours = [f for f in frames if f.filename.startswith(PACKAGE)] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "inside torch"
