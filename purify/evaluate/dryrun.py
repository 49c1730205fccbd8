"""What a run will take: one gradient of full size is timed, and the rest is arithmetic."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from purify.attacks.base import keyed
from purify.evaluate.runner import Defence, Samples


@dataclass(frozen=True)
class Cost:
    """What a defence takes.

    Attributes:
        rows: images times draws in the model at once.
        gradient, forward: seconds per row.
        seconds: of all its attacks and judgements in one process.
        peak: bytes: on a GPU what torch allocated in that gradient, on a CPU the most that the process has held so far.
    """

    rows: int
    gradient: float
    forward: float
    seconds: float
    peak: int


def estimate(defence: Defence, samples: Samples, rows: int) -> Cost:
    """Time one gradient and one forward pass of ``rows`` rows and add up what all stages of the defence need.

    Raises:
        ValueError: the model cannot take the images, or the batch does not fit into memory.
    """
    index = torch.arange(rows) % len(samples)
    x, ids = samples.images[index], samples.ids[index].to(samples.images.device)
    call = keyed(defence.model, 0)
    draws = torch.arange(rows, device=x.device) // len(samples)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x, ids, draws)

    def gradient() -> Tensor:
        images = x.clone().requires_grad_()
        return torch.autograd.grad(call(images, ids, draws).logsumexp(1).sum(), images)[0]

    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
    try:
        per_forward, per_gradient = seconds(forward, x) / rows, seconds(gradient, x) / rows
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        full = isinstance(error, torch.OutOfMemoryError) or "allocate" in text
        advice = "lower --max-rows or --memory-budget" if full else "check its networks"
        raise ValueError(f"{defence.name} cannot do a gradient of {rows} rows ({text}); {advice}.") from error
    n = len(samples)
    total = sum(a.gradients * per_gradient + a.forwards * per_forward for a in defence.attacks) * n
    total += len(defence.stages()) * defence.draws * per_forward * n
    return Cost(rows, per_gradient, per_forward, total, peak_bytes(x))


def seconds(work: object, x: Tensor) -> float:
    """Wall time of ``work()``, the second of two runs."""
    assert callable(work)
    for _ in range(2):
        start = time.perf_counter()
        work()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def peak_bytes(x: Tensor) -> int:
    """The most memory held so far, where x lives."""
    if x.is_cuda:
        return torch.cuda.max_memory_allocated(x.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(costs: dict[str, Cost]) -> pd.DataFrame:
    """Costs by defence, for reading."""
    rows = {
        name: {
            "rows at once": c.rows,
            "ms per gradient": f"{1000 * c.gradient:.3g}",
            "ms per forward": f"{1000 * c.forward:.3g}",
            "peak memory, GiB": f"{c.peak / 2**30:.2f}",
            "time": duration(c.seconds),
        }
        for name, c in costs.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def duration(seconds: float) -> str:
    """Hours, minutes or seconds."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def dry_run(defences: Sequence[Defence], samples: Samples, max_rows: int) -> dict[str, Cost]:
    """The cost of each defence."""
    costs = {}
    for defence in defences:
        eot = max((getattr(a, "eot", 1) for a in defence.attacks), default=1)
        costs[defence.name] = estimate(defence, samples, min(max_rows, len(samples) * eot))
    return costs
