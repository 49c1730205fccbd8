"""Accuracy against eps: a run for each radius, on the same images and judging draws, and what they come to together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from purify.attacks.threats import THREATS
from purify.checks import check_unique
from purify.evaluate.attacking import Prepared, folder_name, prepare
from purify.evaluate.description import NO_ATTACK, Evaluation
from purify.evaluate.finish import Finished
from purify.evaluate.metrics import CRITERIA, Estimate, difference, worst_mean
from purify.evaluate.pictures import BARE, COLOURS, MARKERS, panels, percents, save
from purify.evaluate.provenance import default_folder
from purify.evaluate.records import SCHEMA, RunFolder, check_folder, curve_folder, write_json, writing
from purify.evaluate.runner import CLEAN, Defence, Samples, predictions, stage_name, worst_only_predictions

PICTURE = "curve.png"
WORST = "worst case"


@dataclass(frozen=True)
class Point:
    """Accuracy that is left at a radius; at 0 that of clean images."""

    eps: float
    accuracy: Estimate


@dataclass(frozen=True)
class Rise:
    """Accuracy that is higher at a larger radius: the attack missed what it had found at the smaller one.

    Attributes:
        defence: where.
        smaller, larger: the two radii.
        points: by how much, paired over images, with its 95 % interval.
        certain: whether that is more than noise of the judging draws and of the choice of images.
    """

    defence: str
    smaller: float
    larger: float
    points: Estimate
    certain: bool

    def __str__(self) -> str:
        what = f"{self.defence}: eps {self.larger:g} leaves more than eps {self.smaller:g} does"
        by = f"by {str(self.points).strip()} points, paired"
        if not self.certain:
            return f"{what}, {by}, which may be noise."
        return f"{what}, {by}: the larger ball holds the smaller one, so the attack is weak; raise --attack-steps."


@dataclass(frozen=True)
class Curve:
    """What a curve came to.

    Attributes:
        points: by defence, from eps 0 on.
        rises: where accuracy is higher at a larger eps.
        file, picture: result.json, and the plot.
        runs: what each eps came to.
    """

    points: dict[str, list[Point]]
    rises: list[Rise]
    file: Path
    picture: Path
    runs: dict[float, Finished]


@dataclass(frozen=True)
class PreparedCurve:
    """A curve of which everything is built and checked, and nothing attacked yet.

    Attributes:
        asked: the description, with several eps.
        eps: all radii but 0, from the smallest on.
        largest: the run at the last of them.
        path: the folder of the curve, which has one for each eps.
    """

    asked: Evaluation
    eps: tuple[float, ...]
    largest: Prepared
    path: Path

    def at(self, eps: float) -> Prepared:
        """The run at one of the radii: the same models and images, and the attacks with that radius."""
        request = self.largest.request
        asked = request.asked.replace(eps=eps, out=self.path / curve_folder(eps))
        attacks = [_within(a, eps) for a in self.largest.attacks]
        defences = [dataclasses.replace(d, attacks=[_within(a, eps) for a in d.attacks]) for d in self.largest.defences]
        config = {**self.largest.config, "attacks": {d.name: [a.budget() for a in d.attacks] for d in defences}}
        request = dataclasses.replace(request, asked=asked)
        return dataclasses.replace(self.largest, request=request, attacks=attacks, defences=defences, config=config)

    def finish(self, runs: Mapping[float, Run]) -> Curve:
        """Points, rises, result.json and the plot, from the complete runs at all radii."""
        criterion = self.asked.worst_only or "mean"
        found = {e: run.finished.results for e, run in runs.items()}
        points = {
            name: [Point(0.0, rows[CLEAN][criterion]), *(Point(e, found[e][name][WORST][criterion]) for e in self.eps)]
            for name, rows in found[self.eps[0]].items()
        }
        risen = list(self._rises(runs))
        body = {
            "schema": SCHEMA,
            "curve": {name: [asdict(p) for p in found] for name, found in points.items()},
            "criterion": criterion,
            "threat_model": self.asked.threat_model,
            "rises": [asdict(rise) for rise in risen],
            "runs": {f"{e:g}": curve_folder(e) for e in self.eps},
            "config": {name: v for name, v in self.largest.config.items() if name != "attacks"},
        }
        write_json(self.path / "result.json", body)
        with writing(self.path / "run.yaml") as partial:
            partial.write_text(self.asked.to_yaml())
        allowed = self.largest.request.budget
        title = f"{self.asked.title}, {len(self.largest.samples)} images, {allowed.steps} steps x {allowed.eot} draws"
        picture = draw(self.path / PICTURE, points, self.asked.threat_model, title)
        return Curve(points, risen, self.path / "result.json", picture, {e: run.finished for e, run in runs.items()})

    def _rises(self, runs: Mapping[float, Run]) -> Iterator[Rise]:
        for smaller, larger in pairwise(self.eps):
            for d in self.largest.defences:
                above = difference(runs[larger].left[d.name], runs[smaller].left[d.name])
                if above.value > 1e-9:
                    yield Rise(d.name, smaller, larger, above, above.low > 0 or d.draws == 1)


@dataclass(frozen=True)
class Run:
    """What one radius came to, and what its worst case leaves of each sample, (N,) in [0, 1], by defence."""

    finished: Finished
    left: dict[str, np.ndarray]


def _within(attack: Any, eps: float) -> Any:
    """The attack with another radius."""
    return dataclasses.replace(attack, eps=eps)


def left(folder: RunFolder, defence: Defence, samples: Samples, worst_only: str | None) -> np.ndarray:
    """What the worst case leaves of each sample, (N,) in [0, 1]."""
    stages, labels = [stage_name(a) for a in defence.stages()], samples.labels.cpu().numpy()
    if worst_only is None:
        return worst_mean([predictions(folder, defence, s, samples) == labels[:, None] for s in stages])
    answers = [worst_only_predictions(folder, defence, s, samples, worst_only) for s in stages]
    return np.min([CRITERIA[worst_only](p, labels) for p in answers], axis=0)


def prepare_curve(asked: Evaluation) -> PreparedCurve:
    """Look up and build all that the runs of a curve need; what several radii share is built once.

    Raises:
        ValueError: as :func:`~purify.evaluate.attacking.prepare`; an eps twice, none but 0, or a folder with a run.
    """
    eps = tuple(sorted(e for e in asked.radii if e != 0))  # 0 is the clean accuracy, which every curve has
    if not eps:
        raise ValueError(NO_ATTACK)
    check_unique([curve_folder(e) for e in eps], "entries of --eps", "name each radius once")
    largest = prepare(asked.replace(eps=eps[-1]))
    config = {**largest.config, "eps": list(eps)}
    path = asked.out or default_folder(f"{folder_name(asked)}-curve", config)
    if (path / "manifest.json").exists():
        raise ValueError(f"{path} holds a run at one eps; choose another --out for a curve.")
    found = PreparedCurve(asked, eps, largest, path)
    for e in eps:
        check_folder(path / curve_folder(e), found.at(e).config)
    return found


def measure(
    prepared: PreparedCurve,
    command: str,
    progress: bool = True,
    each: Callable[[Prepared, RunFolder, Finished], None] | None = None,
) -> Curve | None:
    """Attack and judge at every eps what is not in its folder yet, and put the runs together.

    ``each`` is told what a run came to when it is finished, before its folder is closed. None in all processes of
    torchrun but the first.
    """
    runs, worst_only = {}, prepared.asked.worst_only
    for eps in prepared.eps:
        one = prepared.at(eps)
        with one.open(command) as folder:
            one.attack(folder, progress)
            protocols = one.protocols(folder, progress)
            if not one.ranks.first:
                continue
            finished = one.finish(folder, progress, protocols)
            runs[eps] = Run(finished, {d.name: left(folder, d, one.samples, worst_only) for d in one.defences})
            if each is not None:
                each(one, folder, finished)
    return prepared.finish(runs) if runs else None


def table(points: Mapping[str, Sequence[Point]]) -> pd.DataFrame:
    """Accuracies in % with intervals: radii by defences."""
    rows = {name: {f"{p.eps:g}": str(p.accuracy).strip() for p in found} for name, found in points.items()}
    found = pd.DataFrame.from_dict(rows)
    found.index.name = "eps"
    return found


def draw(path: Path, points: Mapping[str, Sequence[Point]], norm: str, title: str) -> Path:
    """PNG of accuracy against eps, a line for each defence with its 95 % intervals."""
    figure, ax = panels(6.4, 4.2)
    for (name, found), colour, marker in zip(points.items(), cycle((BARE, *COLOURS)), cycle(MARKERS)):
        middle, bars = percents([p.accuracy for p in found])
        ax.errorbar([p.eps for p in found], middle, bars, color=colour, marker=marker, label=name, capsize=3, ms=5)
    unit = THREATS[norm].unit
    label = f"eps, {norm}{f', {unit}' if unit else ''}"
    ax.set(xlabel=label, ylabel="accuracy left, worst case, %", ylim=(0, 102), title=title)
    ax.title.set_fontsize(10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return save(figure, path)
