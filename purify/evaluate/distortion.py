"""Minimum distortion: from a description to the radii at which defences fail, their median and their curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from purify.evaluate.attacking import RECORD, assemble, begin, check_answers, folder_name, load_samples, open_folder
from purify.evaluate.bisection import CONFIRM, Bisection, Interval, Search, probe_name, replay
from purify.evaluate.build import Request, build_attacks
from purify.evaluate.description import MinimumDistortion
from purify.evaluate.metrics import LEVEL, Estimate, estimate, wilson
from purify.evaluate.pictures import BARE, COLOURS, panels, save
from purify.evaluate.progress import Progress
from purify.evaluate.provenance import environment, fingerprint_of_samples
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import SCHEMA, RunFolder, write_json
from purify.evaluate.runner import Defence, Samples, share_out

PICTURE = "distortion.png"
QUARTERS = 4  # radii of the table: multiples of a quarter of the largest


@dataclass(frozen=True)
class Median:
    """A median with its 95 % interval over images, from order statistics; infinity: larger than all that was tried."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_radius(self.value)} [{_radius(self.low)}, {_radius(self.high)}]"


@dataclass(frozen=True)
class Distortions:
    """What was found on a defence.

    Attributes:
        values: length of the smallest perturbation found for each image, (N,): 0 where it is wrong as it is, infinity
            where nothing within the largest radius was found.
        upper: that radius.
        calls: network calls for one image, mean.
        confirmed: share of wrong answers on purifications that chose nothing, of images that were found; None without
            randomness, or if none were.
    """

    values: np.ndarray
    upper: float
    calls: float
    confirmed: Estimate | None

    @property
    def median(self) -> Median:
        """Of all images, those that no attack broke and those that are wrong as they are among them."""
        return median(self.values)

    @property
    def unbroken(self) -> int:
        """Images that no attack broke within the largest radius."""
        return int(np.isinf(self.values).sum())

    def left(self, eps: float) -> Estimate:
        """Share of the images that need more than ``eps`` (at most the largest radius), with Wilson's interval."""
        return wilson(int((self.values > eps * (1 + 1e-9)).sum()), len(self.values))


def median(values: np.ndarray) -> Median:
    """Of values (N,) that may be infinite: with 95 % confidence between two of them, whatever their distribution."""
    ordered = np.sort(values)
    n = len(ordered)
    k = int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5))
    low, high = (0.0, math.inf) if k == 0 else (float(ordered[k - 1]), float(ordered[n - k]))
    middle = ordered[(n - 1) // 2], ordered[n // 2]
    return Median(float(np.mean(middle)), low, high)


def _radius(value: float) -> str:
    return "more" if math.isinf(value) else f"{value:.4g}"


@dataclass(frozen=True)
class Ready:
    """A search of which everything is built and checked, and nothing attacked yet.

    Attributes:
        request: the description with what was looked up for it.
        asked: what is bisected.
        defences: undefended, purified, adversarially trained, with the attacks that are tried.
        samples: the images.
        ranks: this process among those of the run.
    """

    request: Request[MinimumDistortion]
    asked: Bisection
    defences: list[Defence]
    samples: Samples
    ranks: Ranks

    @property
    def config(self) -> dict[str, Any]:
        """What decides the results."""
        e = self.request.asked
        budgets = {d.name: [a.budget() for a in d.attacks] for d in self.defences}
        tried = {name: [{k: v for k, v in b.items() if k != "eps"} for b in found] for name, found in budgets.items()}
        return {
            "dataset": e.dataset,
            "data": fingerprint_of_samples(self.samples),
            "n_examples": len(self.samples),
            "seed": e.seed,
            "batch_size": e.batch_size,
            "distortion": asdict(self.asked),
            "defences": {d.name: d.described() for d in self.defences},
            "tried": tried,
            **e.code(),
        }

    def open(self, command: str) -> RunFolder:
        """The run's folder, which says that ``command`` made it; raises as :func:`open_folder`."""
        image = 4 * self.samples.images[0].numel() + 128 + RECORD
        needed = image * len(self.samples) * len(self.defences) * self.asked.levels
        session = environment(self.request.device, command, self.ranks)
        e = self.request.asked
        return open_folder(e, f"{folder_name(e)}-distortion", self.config, session, self.ranks, needed)

    def own(self, ranks: Ranks) -> Samples:
        """What one of ``ranks`` searches of the shard that was asked for, or of all; warns of shards without any."""
        return share_out(self.samples, self.request.asked.batch_size, ranks, self.request.asked.part)

    def search(self, folder: RunFolder, progress: bool = True) -> int:
        """Probe and confirm what the folder does not hold; returns how many records were added."""
        own = self.own(self.ranks)
        searches = self.searches(folder)
        before = len(folder)
        with Progress(len(own) * sum(s.total for s in searches), progress and self.ranks.first) as bar:
            for search in searches:
                search(own, bar)
        new = len(folder) - before
        folder.merge()
        return new

    def searches(self, folder: RunFolder) -> list[Search]:
        """The bisection on each defence."""
        e, rows = self.request.asked, self.request.max_rows
        return [Search(folder, d, self.asked, e.seed, e.batch_size, rows) for d in self.defences]

    def finish(self, folder: RunFolder) -> dict[str, Distortions]:
        """What the records of a complete folder come to, by defence; writes result.json and the plot."""
        found = {d.name: self._found(folder, d) for d in self.defences}
        body = {name: plain(f) for name, f in found.items()}
        context = {"schema": SCHEMA, "config": folder.config, "sessions": folder.sessions}
        write_json(folder.path / "result.json", {**context, "distortion": body})
        draw(folder.path / PICTURE, found, self.asked, f"{self.request.asked.title}, {len(self.samples)} images")
        return found

    @property
    def radii(self) -> list[float]:
        """Radii of the table."""
        return [self.asked.upper * q / QUARTERS for q in range(QUARTERS + 1)]

    def _found(self, folder: RunFolder, defence: Defence) -> Distortions:
        ids = self.samples.ids.tolist()
        ends = [self._end(folder, defence, i) for i in ids]
        records = [
            [folder.get(*key) for key in ((defence.name, probe_name(level), i) for level in range(end.probes))]
            for i, end in zip(ids, ends, strict=True)
        ]
        values = [self._length(folder, defence, i, end) for i, end in zip(ids, ends, strict=True)]
        again = [folder.get(defence.name, CONFIRM, i) for i in ids if (defence.name, CONFIRM, i) in folder]
        wrong = np.array([np.mean(np.array(r["predictions"]) != r["label"]) for r in again])
        calls = (sum(r["calls"] for probes in records for r in probes) + sum(r["calls"] for r in again)) / len(ids)
        return Distortions(np.array(values), self.asked.upper, calls, estimate(wrong) if again else None)

    def _length(self, folder: RunFolder, defence: Defence, sample: int, end: Interval) -> float:
        """Of the smallest perturbation that was found; rounding leaves it no longer than the radius it was found in."""
        if end.found is None:
            return math.inf
        return min(folder.get(defence.name, end.found, sample)[self.asked.norm], end.high)

    def _end(self, folder: RunFolder, defence: Defence, sample: int) -> Interval:
        """What is known of a sample in the end.

        Raises:
            ValueError: its search has not ended.
        """
        found = replay(folder, defence.name, sample, self.asked.levels)
        if found.next(self.asked) is not None:
            raise ValueError(f"{folder.path} is not finished: {defence.name}, sample {sample}; run its command again.")
        return found


def prepare(asked: MinimumDistortion) -> Ready:
    """Look up and build all that a search names.

    Raises:
        ValueError: unknown names, missing files, or parts that do not fit together.
    """
    data, ranks, device = begin(asked)
    if asked.eps is None and asked.threat_model in data.eps:
        usual = 2 * data.eps[asked.threat_model]
        asked = asked.replace(eps=min(usual, 1.0) if asked.threat_model == "Linf" else usual)
    request = Request(asked, data, device)
    attacks = build_attacks(request)
    grouped = next((a.label for a in attacks if a.group_size), None)
    if grouped:
        advice = "name other --attacks"
        raise ValueError(f"{grouped} attacks fixed groups of images, which need different radii here; {advice}.")
    samples = load_samples(asked, data, request.budget.n_examples, device)
    defences = assemble(request, attacks, samples)
    check_answers(defences, samples)
    bisection = Bisection(asked.threat_model, request.eps, asked.rate, asked.halvings)
    return Ready(request, bisection, defences, samples, ranks)


def plain(found: Distortions) -> dict[str, Any]:
    """As result.json has it; None for infinity."""
    finite = {name: None if math.isinf(v) else v for name, v in asdict(found.median).items()}
    confirmed = None if found.confirmed is None else asdict(found.confirmed)
    values = [None if math.isinf(v) else float(v) for v in found.values]
    return {
        "median": finite,
        "unbroken": found.unbroken,
        "calls": found.calls,
        "confirmed": confirmed,
        "values": values,
    }


def table(found: Mapping[str, Distortions], radii: Sequence[float]) -> pd.DataFrame:
    """Medians, what stays unbroken, and the share of images left at these radii, by defence."""
    rows = {
        name: {
            "median": str(f.median),
            "not broken": f"{f.unbroken} of {len(f.values)}",
            **{f"left at {e:.4g}, %": str(f.left(e)).strip() for e in radii},
            "fails again, %": "-" if f.confirmed is None else str(f.confirmed).strip(),
            "calls": f"{f.calls:.0f}",
        }
        for name, f in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").T


def draw(path: Path, found: Mapping[str, Distortions], asked: Bisection, title: str) -> Path:
    """PNG of the share of images that need more than eps, a step line for each defence, with its median."""
    figure, ax = panels(6.4, 4.2)
    grid = np.linspace(0, asked.upper, 400)
    for (name, f), colour in zip(found.items(), cycle((BARE, *COLOURS))):
        shares = 100 * (f.values[None] > grid[:, None]).mean(1)
        label = f"{name}, median {_radius(f.median.value)}"
        ax.step(grid, shares, where="post", color=colour, label=label)
    ax.set(xlabel=f"eps, {asked.norm}", ylabel="images that need more, %", ylim=(0, 102), xlim=(0, asked.upper))
    ax.set_title(f"{title}, failing rate {asked.rate:g}", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return save(figure, path)
