"""What a run will take: a few steps are timed, and the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from purify.attacks.base import keyed
from purify.checks import ran_out
from purify.evaluate.progress import weight
from purify.evaluate.runner import Defence, Samples
from purify.machine import seconds
from purify.memory import free_bytes
from purify.purification import cost
from purify.purification.defended import DefendedClassifier
from purify.purification.gradients import Checkpoint, Full
from purify.purification.purifier import Purifier

PATIENCE = 2.0  # seconds that a measurement may take before batches stop growing


@dataclass(frozen=True)
class Cost:
    """What a defence takes.

    Attributes:
        rows: images times draws in the model at once.
        gradient, forward: seconds per row, at the greatest noise level, in the precision of the attacks.
        calls: network calls of all its attacks and judgements for one image, at most.
        seconds: of these in one process, for all images.
        memory: bytes that graphs of reverse steps and of the classifier take in a gradient of ``rows`` rows, of the
            attack that takes most.
    """

    rows: int
    gradient: float
    forward: float
    calls: float
    seconds: float
    memory: int


def estimate(defence: Defence, samples: Samples, rows: int, images: int | None = None) -> Cost:
    """Time a few rows and steps and add up what all stages of the defence need.

    ``images``: of which ``rows`` are draws, where attacks take fewer draws of some models than of others.

    Raises:
        ValueError: the model cannot take the images, or a batch of ``rows`` rows does not fit into memory.
    """
    model = defence.attacked
    try:
        asked = any(attack.takes_gradient for attack in defence.attacks)
        forward, gradient = seconds_per_row(model, samples, rows, asked)
        judged = forward if model is defence.model else seconds_per_row(defence.model, samples, rows, False)[0]
        memory = most_held(defence, samples.images[:1], rows, rows if images is None else images)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        advice = "lower --max-rows or --memory-budget" if ran_out(error) else "check its networks"
        raise ValueError(f"{defence.name} cannot take a gradient ({text}); {advice}.") from error
    free = free_bytes(samples.images.device)
    if memory > free:
        raise ValueError(
            f"{defence.name} needs about {memory / 2**30:.1f} GiB for the graphs of {rows} rows, and "
            f"{free / 2**30:.1f} GiB are free; lower --max-rows, to {max(1, rows * free // memory // 2)} say, or "
            "--memory-budget."
        )
    n = len(samples)
    fit = [attack for attack in defence.attacks if attack.applies_to(model)]
    passes = [attack.passes(model) for attack in fit]
    total = sum(gradients * gradient + forwards * forward for gradients, forwards in passes) * n
    total += len(defence.stages()) * defence.draws * judged * n
    each = sum(weight(defence, attack) for attack in (None, *fit))
    return Cost(rows, gradient, forward, each, total, memory)


def most_held(defence: Defence, x: Tensor, rows: int, images: int) -> int:
    """Bytes of graphs for ``images`` images like x (1, C, H, W), ``rows`` rows at most: the most of all attacks'."""
    held = [
        cost.held_bytes(part.purifier, x, min(rows, images * draws) * part.purifications, part.classifier)
        for model, draws in _climbs(defence)
        for part in model.modules()
        if isinstance(part, DefendedClassifier)
    ]
    return max(held, default=0)


def _climbs(defence: Defence) -> list[tuple[nn.Module, int]]:
    """The defence and what its attacks differentiate, each with the draws of an image at once."""
    own = defence.attacked
    return [(own, 1), *(climb for a in defence.attacks if a.applies_to(own) for climb in a.climbs(own))]


def seconds_per_row(model: nn.Module, samples: Samples, rows: int, with_gradient: bool) -> tuple[float, float]:
    """Of a forward pass and of a gradient, if asked for."""
    if isinstance(model, DefendedClassifier):
        return purified_times(model, samples, rows, with_gradient)
    return times(model, samples, rows, with_gradient)


def purified_times(
    model: DefendedClassifier, samples: Samples, rows: int, with_gradient: bool = True
) -> tuple[float, float]:
    """Seconds per row of a forward pass and of a gradient: those of one step and of three, extended to all.

    Steps that do not fit into a memory budget are recomputed and cost a forward pass more: of all steps that is another
    share than of the few that are timed.
    """
    purifier = model.purifier
    steps, rounds = cost.most_steps(purifier), len(purifier.rounds)
    short = times(_shortened(model, 1), samples, rows, with_gradient)
    if steps <= rounds:
        return short
    longer = times(_shortened(model, 3), samples, rows, with_gradient)
    timed = min(3 * rounds, steps)
    forward, gradient = (max(b - a, 0.0) / (timed - rounds) for a, b in zip(short, longer, strict=True))
    left, recomputed = steps - rounds, 0.0
    if with_gradient and _budgeted(purifier):
        kept = cost.kept_steps(purifier, samples.images[:1], rows)
        first, then, whole = (max(0, n - kept) for n in (rounds, timed, steps))
        recomputed = whole - first - (then - first) * left / (timed - rounds)
    return short[0] + forward * left, short[1] + gradient * left + recomputed * forward


def _shortened(model: DefendedClassifier, steps: int) -> DefendedClassifier:
    return model.with_purifier(cost.shortened(model.purifier, steps))


def _budgeted(purifier: Purifier) -> bool:
    """Whether the gradient keeps some step graphs and recomputes others."""
    return isinstance(purifier.engine, Full | Checkpoint) and purifier.engine.memory_budget is not None


def times(model: nn.Module, samples: Samples, rows: int, with_gradient: bool = True) -> tuple[float, float]:
    """Seconds per row of a forward pass and of a gradient, if asked for, in batches that grow until they fill or take
    too long."""
    call, size = keyed(model, 0), 1
    while True:
        index = torch.arange(size) % len(samples)
        x, ids = samples.images[index], samples.ids[index].to(samples.images.device)
        draws = torch.arange(size, device=x.device) // len(samples)

        def forward(x: Tensor = x, ids: Tensor = ids, draws: Tensor = draws) -> Tensor:
            with torch.no_grad():
                return call(x, ids, draws)

        def gradient(x: Tensor = x, ids: Tensor = ids, draws: Tensor = draws) -> Tensor:
            images = x.clone().requires_grad_()
            return torch.autograd.grad(call(images, ids, draws).logsumexp(1).sum(), images)[0]

        works = (forward, gradient) if with_gradient else (forward,)
        spent = [*([seconds(work, x.device) for _ in range(2)][1] for work in works), 0.0]
        if size >= rows or sum(spent) > PATIENCE:
            return spent[0] / size, spent[1] / size
        size = min(2 * size, rows)


def table(costs: dict[str, Cost]) -> pd.DataFrame:
    """Costs by defence, for reading."""
    rows = {
        name: {
            "rows at once": c.rows,
            "ms per gradient": f"{1000 * c.gradient:.3g}",
            "ms per forward": f"{1000 * c.forward:.3g}",
            "network calls per image": f"{c.calls:,.0f}",
            "graphs, GiB": f"{c.memory / 2**30:.2f}",
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


def dry_run(defences: Sequence[Defence], samples: Samples, batch_size: int, max_rows: int) -> dict[str, Cost]:
    """The cost of each defence."""
    rows = {d.name: rows_at_once(d, len(samples), batch_size, max_rows) for d in defences}
    return {d.name: estimate(d, samples, rows[d.name], min(batch_size, len(samples))) for d in defences}


def rows_at_once(defence: Defence, samples: int, batch_size: int, max_rows: int) -> int:
    """Images times draws in the model at once, of the attack that has most."""
    draws = max((draws for _, draws in _climbs(defence)), default=1)
    return min(max_rows, min(batch_size, samples) * draws)
