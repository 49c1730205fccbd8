"""Protocols of a run that is complete: measured, stored beside its records, and summed up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from purify.checks import choose
from purify.evaluate.differentiable import is_differentiable
from purify.evaluate.progress import Progress, weight
from purify.evaluate.protocols import PROTOCOLS
from purify.evaluate.protocols.averaged import Averaged, Point
from purify.evaluate.protocols.base import Attacked, Effort, Found, Line, Protocol, Stage
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, batches, share
from purify.purification.defended import DefendedClassifier

FOLDER = "protocols"  # in a run's folder: a folder of the same kind


def find_protocols(names: Sequence[str]) -> list[Protocol]:
    """The protocols of these names.

    Raises:
        ValueError: unknown name.
    """
    return [choose(name, PROTOCOLS, "protocol") for name in dict.fromkeys(names)]


def purified(defences: Sequence[Defence]) -> list[Defence]:
    """Those with randomness to ask about. Without it every protocol says what the run itself says."""
    return [d for d in defences if isinstance(d.model, DefendedClassifier)]


def check_protocols(names: Sequence[str], defences: Sequence[Defence], images: Tensor, averages: Sequence[int]) -> None:
    """Raise ValueError unless every purified defence can be judged by all of these protocols.

    The run's own attacks may do without a gradient where protocols cannot, so they are not found out by it.
    """
    for protocol in find_protocols(names):
        for defence in purified(defences):
            assert isinstance(defence.model, DefendedClassifier)
            name, classifier = f"The classifier of {defence.name}", defence.model.classifier
            if protocol.climbs(averages) and not is_differentiable(classifier, images, name):
                raise ValueError(
                    f"The protocol {protocol.name} needs gradients, and the classifier of {defence.name} has none; "
                    "leave it out of --protocol, or take another network's: --model-gradient bpda."
                )
            protocol.check(defence)


def planned(names: Sequence[str], defence: Defence, effort: Effort) -> float:
    """Network calls of these protocols for one image."""
    return sum(protocol.planned(defence, effort) for protocol in find_protocols(names))


@dataclass(frozen=True)
class Measured:
    """What the protocols of a purified defence came to.

    Attributes:
        lines: what each number means.
        points: the curve over purifications per answer; none if the protocol averaged was not asked for.
        calls: network calls that all of it took for one image.
        run_calls: those of the run itself, attacks and judges, as they are planned.
    """

    lines: list[Line]
    points: list[Point]
    calls: float
    run_calls: float


def measure_protocols(
    run: RunFolder,
    defences: Sequence[Defence],
    samples: Samples,
    names: Sequence[str],
    effort: Effort,
    progress: bool = True,
) -> dict[str, Measured]:
    """Measure what is not stored yet, in all processes of the run; what it means, by purified defence.

    Records are in a folder ``protocols`` below the run's, which belongs to the run's configuration: protocols can be
    added to a run that has ended.

    Args:
        run: a folder whose records are complete, and merged.
        defences, samples: as they were evaluated.
        names: of ``PROTOCOLS``.
        effort: what they may spend.
        progress: whether a bar is shown.
    """
    config = run.config
    own = {"run": config, "steps": effort.steps}
    asked = purified(defences)
    total = sum(planned(names, d, effort) for d in asked) * len(samples)
    with (
        RunFolder(run.path / FOLDER, own, run.sessions[-1], run.ranks) as folder,
        Progress(total, progress and run.ranks.first) as bar,
    ):
        return {
            d.name: _defence(Attacked(run, folder, d, samples, config["seed"], effort), find_protocols(names), bar)
            for d in asked
        }


def _defence(attacked: Attacked, protocols: Sequence[Protocol], bar: Progress) -> Measured:
    spent = 0.0
    for protocol in protocols:
        for stage in protocol.stages(attacked):
            bar.stage(f"{attacked.defence.name}, {stage.name}")
            _measure(attacked, stage, bar)
            attacked.folder.merge()
            spent += attacked.calls(stage.name)
    return Measured(
        [line for protocol in protocols for line in protocol.lines(attacked)],
        [point for p in protocols if isinstance(p, Averaged) for point in p.points(attacked)],
        spent,
        sum(weight(attacked.defence, a) for a in attacked.defence.stages()),
    )


def _measure(attacked: Attacked, stage: Stage, bar: Progress) -> None:
    """Store what a stage says of every sample of this process, batch by batch."""
    folder, defence, size = attacked.folder, attacked.defence, attacked.effort.batch_size
    samples = attacked.samples[share(attacked.samples.ids, size, folder.ranks.rank, folder.ranks.world)]
    for rows in batches(samples.ids, size):
        batch = samples[rows]
        wanted = [i for i, s in enumerate(batch.ids.tolist()) if (defence.name, stage.name, s) not in folder]
        if not wanted:
            bar.skip(stage.planned * len(batch))
            continue
        start = time.perf_counter()
        with bar.work(defence, stage.planned * len(batch)):
            found = stage.measure(batch)
        seconds = (time.perf_counter() - start) / len(batch)
        for i in wanted:
            image = None if found.images is None else found.images[i].cpu().numpy()
            folder.append(_record(attacked, stage, batch, found, i, seconds), image)


def _record(attacked: Attacked, stage: Stage, batch: Samples, found: Found, i: int, seconds: float) -> dict[str, Any]:
    return {
        "defence": attacked.defence.name,
        "attack": stage.name,
        "sample": int(batch.ids[i]),
        "label": int(batch.labels[i]),
        "predictions": found.predictions[i].tolist(),
        **(found.more[i] if found.more else {}),
        "calls": round(float(found.calls[i] if isinstance(found.calls, Tensor) else found.calls)),
        "seconds": round(seconds, 4),
    }
