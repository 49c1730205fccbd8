"""The smallest radius at which fresh purifications fail, by bisection, image by image; each probe is a record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from purify.attacks.base import Attack
from purify.attacks.norms import BALLS
from purify.diffusion.noise import derive_seed
from purify.evaluate.progress import Progress, cost, weight
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import CLEAN, Defence, Samples, batches, judge

CONFIRM = "confirm"  # stage of the purifications that chose nothing
PROJECTED = "projected"  # what succeeded at a larger radius, brought into the smaller ball


def probe_name(level: int) -> str:
    """How records call a probe: 0 is the clean image, 1 the largest radius, then the halvings."""
    return f"probe {level}"


@dataclass(frozen=True)
class Bisection:
    """How the radius is looked for.

    Attributes:
        norm, upper: threat model and the largest radius that is tried.
        rate: share of an image's fresh purifications that must be wrong.
        halvings: of the interval from 0 to ``upper``: radii are multiples of upper / 2^halvings.
    """

    norm: str
    upper: float
    rate: float = 0.5
    halvings: int = 5

    @property
    def levels(self) -> int:
        """Probes of one image at most."""
        return self.halvings + 2

    def enough(self, wrong: Tensor, draws: int) -> Tensor:
        """Whether so many (N,) of ``draws`` answers are the share that must be wrong."""
        return wrong >= self.rate * draws - 1e-9


@dataclass(frozen=True)
class Interval:
    """What the first probes of an image came to.

    Attributes:
        probes: how many.
        low, high: the largest radius at which all attacks failed, and the smallest at which one succeeded; infinity if
            none did.
        found: the stage of the record that succeeded there.
    """

    probes: int = 0
    low: float = 0.0
    high: float = math.inf
    found: str | None = None

    def next(self, asked: Bisection) -> float | None:
        """The radius to try next; None when all is known."""
        if self.probes == 0:
            return 0.0
        if self.high == 0:  # wrong without any attack
            return None
        if self.probes == 1:
            return asked.upper
        if self.high == math.inf or self.probes == asked.levels:
            return None
        return (self.low + self.high) / 2


def replay(folder: RunFolder, defence: str, sample: int, most: int) -> Interval:
    """What the records of the first ``most`` probes of a sample say."""
    found = Interval()
    for level in range(most):
        key = (defence, probe_name(level), sample)
        if key not in folder:
            break
        record = folder.get(*key)
        ends = {"high": record["eps"], "found": record["attack"]} if record["broken"] else {"low": record["eps"]}
        found = replace(found, probes=level + 1, **ends)
    return found


@dataclass
class Tried:
    """What attempts at one radius came to, for N samples: of each the one with most wrong answers."""

    images: Tensor
    predictions: Tensor  # (N, R)
    wrong: Tensor  # (N,), of the predictions
    by: list[str]
    calls: Tensor  # (N,), of all attempts

    def take(self, rows: Tensor, images: Tensor, predictions: Tensor, labels: Tensor, by: str, calls: Tensor) -> None:
        """Another attempt at some of the samples."""
        wrong = (predictions != labels[rows, None]).sum(1)
        better = wrong > self.wrong[rows]
        at = rows[better.cpu()]
        self.images[at], self.predictions[at], self.wrong[at] = images[better], predictions[better], wrong[better]
        for i in at.tolist():
            self.by[i] = by
        self.calls[rows] += calls


@dataclass(frozen=True)
class Search:
    """The bisection on one defence, for the samples of this process.

    An attack at a smaller radius starts with what succeeded at the larger one, projected: if that still fails often
    enough, no attack is run. Otherwise the defence's attacks are, in turn, until one succeeds.
    """

    folder: RunFolder
    defence: Defence
    asked: Bisection
    seed: int
    batch_size: int
    max_rows: int

    @property
    def planned(self) -> float:
        """Network calls of one image in one probe, at most."""
        return self.judged + sum(weight(self.defence, a) for a in self.defence.attacks)

    @property
    def judged(self) -> float:
        """Network calls of one image's judges."""
        return self.defence.draws * cost(self.defence)

    @property
    def total(self) -> float:
        """Network calls of one image in all probes and the confirmation, at most."""
        return self.judged + (self.asked.levels - 1) * self.planned + self.judged

    def __call__(self, samples: Samples, bar: Progress) -> None:
        for level in range(self.asked.levels):
            bar.stage(f"{self.defence.name}, {probe_name(level)}")
            each = self.planned if level else self.judged
            radii = [self._radius(int(i), level) for i in samples.ids]
            bar.skip(each * sum(r is None for r in radii))
            for eps in sorted({r for r in radii if r is not None}):
                self._at(samples[torch.tensor([r == eps for r in radii])], eps, level, each, bar)
        bar.stage(f"{self.defence.name}, {CONFIRM}")
        self._confirm(samples, bar)

    def _radius(self, sample: int, level: int) -> float | None:
        """What a sample is tried at; None: it was settled before."""
        before = replay(self.folder, self.defence.name, sample, level)
        return before.next(self.asked) if before.probes == level else None

    def _at(self, samples: Samples, eps: float, level: int, each: float, bar: Progress) -> None:
        """Probe all of these samples at one radius: batches do not depend on what is stored already."""
        for rows in batches(samples.ids, self.batch_size):
            batch = samples[rows]
            wanted = [i for i, s in enumerate(batch.ids.tolist()) if self._key(s, level) not in self.folder]
            if not wanted:
                bar.skip(each * len(batch))
                continue
            start = time.perf_counter()
            with bar.work(self.defence, each * len(batch)):
                tried = self._try(batch, eps, level)
            seconds = (time.perf_counter() - start) / len(batch)
            for i in wanted:
                record = {**self._record(batch, tried, i, eps, level), "seconds": round(seconds, 4)}
                image = tried.images[i].cpu().numpy() if record["broken"] and level else None
                self.folder.append(record, image)

    def _key(self, sample: int, level: int) -> tuple[str, str, int]:
        return self.defence.name, probe_name(level), sample

    def _try(self, batch: Samples, eps: float, level: int) -> Tried:
        """The clean images at radius 0; else what there is, projected, and the attacks, until enough answers are
        wrong."""
        n, draws, labels = len(batch), self.defence.draws, batch.labels
        empty = torch.full((n, draws), -1, device=labels.device)
        tried = Tried(batch.images.clone(), empty, torch.full_like(labels, -1), [CLEAN] * n, torch.zeros(n).double())
        for by, rows, images, calls in self._attempts(batch, tried, eps, level):
            judged = judge(self.defence, images, batch.ids[rows], self.seed, self.max_rows).predictions
            tried.take(rows, images, judged, labels, by, calls + self.judged)
        return tried

    def _attempts(
        self, batch: Samples, tried: Tried, eps: float, level: int
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Names, rows of those that are still right, images and network calls of what is judged next."""
        rows = torch.arange(len(batch))
        none = torch.zeros(len(batch)).double()
        if level == 0:
            yield CLEAN, rows, batch.images, none
            return
        if level > 1:  # all of them failed at a larger radius
            images = self._found(batch, level)
            yield PROJECTED, rows, BALLS[self.asked.norm].project(images, batch.images, eps), none
        for attack in self._within(eps):
            rows = (~self.asked.enough(tried.wrong, self.defence.draws)).nonzero()[:, 0].cpu()
            if len(rows) == 0:
                return
            left, seed = batch[rows], derive_seed(self.seed, "attack")
            made = attack(self.defence.attacked, left.images, left.labels, sample_ids=left.ids, seed=seed)
            planned = torch.full((len(left),), weight(self.defence, attack) - self.judged).double()
            yield attack.label, rows, made.images, planned if made.calls is None else made.calls.cpu().double()

    def _found(self, batch: Samples, most: int) -> Tensor:
        """The images that succeeded at the smallest radius of the first ``most`` probes."""
        name = self.defence.name
        stages = [str(replay(self.folder, name, int(i), most).found) for i in batch.ids]
        images = [self.folder.image(name, stage, int(i)) for stage, i in zip(stages, batch.ids, strict=True)]
        return torch.stack([torch.from_numpy(image) for image in images]).to(batch.images)

    def _within(self, eps: float) -> Sequence[Attack]:
        return [replace(attack, eps=eps) for attack in self.defence.attacks]

    def _record(self, batch: Samples, tried: Tried, i: int, eps: float, level: int) -> dict[str, Any]:
        delta = tried.images[i : i + 1] - batch.images[i : i + 1]
        return {
            "defence": self.defence.name,
            "attack": probe_name(level),
            "sample": int(batch.ids[i]),
            "label": int(batch.labels[i]),
            "predictions": tried.predictions[i].tolist(),
            "eps": eps,
            "broken": bool(self.asked.enough(tried.wrong[i], self.defence.draws)),
            "by": tried.by[i],
            **{norm: float(ball.distance(delta)) for norm, ball in BALLS.items()},
            "calls": round(float(tried.calls[i])),
        }

    def _confirm(self, samples: Samples, bar: Progress) -> None:
        """Judge what was found on purifications that did not choose it."""
        name = self.defence.name
        found = [replay(self.folder, name, int(i), self.asked.levels).found for i in samples.ids]
        wanted = [f not in (None, probe_name(0)) and self.defence.draws > 1 for f in found]
        bar.skip(self.judged * (len(wanted) - sum(wanted)))
        samples = samples[torch.tensor(wanted, dtype=torch.bool)]
        for rows in batches(samples.ids, self.batch_size):
            batch = samples[rows]
            left = [i for i, s in enumerate(batch.ids.tolist()) if (name, CONFIRM, s) not in self.folder]
            if not left:
                bar.skip(self.judged * len(batch))
                continue
            images = self._found(batch, self.asked.levels)
            with bar.work(self.defence, self.judged * len(batch)):
                seed = derive_seed(self.seed, CONFIRM)
                answers = judge(self.defence, images, batch.ids, seed, self.max_rows).predictions
            for i in left:
                record = {
                    "defence": name,
                    "attack": CONFIRM,
                    "sample": int(batch.ids[i]),
                    "label": int(batch.labels[i]),
                }
                self.folder.append({**record, "predictions": answers[i].tolist(), "calls": round(self.judged)})
