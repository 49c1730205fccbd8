#!/usr/bin/env python
"""What is a noise level of each sample's own worth? Constant t* against SSNI, each under attacks that know it.

Both meet the same number of attacks: a worst case over more attacks is lower for that alone. SSNI: PGD+EOT through t*,
with t* held constant, lowering the score norm, and that with the loss at a lower level; constant t*: PGD+EOT twice, in
steps of unit L2 length, and APGD+EOT on the margin.
Every (noise level, seed) is a run of its own below --out; each seed has images of its own; the same command resumes.
Runs go through worker processes with one thread each, the fastest way on a CPU. At the end: a table, result.json and
a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from purify import Constant, DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, PGD, Attack, ConstantLevelPGD, LowLevelPGD, NormPGD
from purify.attacks.norms import unit
from purify.checks import check_count, choose
from purify.data import DATASETS, load_dataset
from purify.evaluate import Defence, RunFolder, Samples, evaluate
from purify.evaluate.budgets import BUDGETS, budget
from purify.evaluate.metrics import Estimate, difference, estimate, worst_mean
from purify.evaluate.pictures import BARE, COLOURS, panels, percents, save
from purify.evaluate.provenance import environment
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import write_json
from purify.evaluate.runner import CLEAN, predictions, stage_name
from purify.named import fingerprint
from purify.purification.levels import LEVELS, NoiseLevel

CONSTANTS = {
    "digits": (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    "fashion_mnist": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
}
# SSNI rules: where adversarial images reach the greatest level and t* no longer moves, and where they do not.
SSNI: dict[str, list[tuple[str, dict[str, float]]]] = {
    "digits": [
        ("ssni-l", {"t_star": 0.2}),
        ("ssni-l", {"t_star": 0.05, "t_max": 0.5}),
        ("ssni-n", {"t_star": 0.25, "tau": 1.0}),
        ("ssni-n", {"t_star": 0.25, "tau": 8.0}),
    ],
    "fashion_mnist": [
        ("ssni-l", {"t_star": 0.3}),
        ("ssni-l", {"t_star": 0.2, "t_max": 0.5}),
        ("ssni-n", {"t_star": 0.3, "tau": 1.0}),
        ("ssni-n", {"t_star": 0.3, "tau": 8.0}),
    ],
}


HELD = ConstantLevelPGD.name
USUAL = PGD.name


class SecondPGD(PGD):
    """PGD+EOT once more, under randomness of its own."""

    name = "pgd-eot-again"


class UnitPGD(NormPGD):
    """The norm attack where there is no norm: steps of unit L2 length from the clean image."""

    name = "pgd-eot-unit"
    needs = None
    label = name
    evaluator = PGD.evaluator

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        return unit(gradients[0])


@dataclass(frozen=True)
class Job:
    """One noise level under one seed."""

    dataset: str
    level: str
    parameters: tuple[tuple[str, float], ...]
    seed: int
    preset: str
    steps: int
    images: int
    norm_weight: float
    out: Path
    command: str

    @property
    def name(self) -> str:
        """The level with its parameters."""
        return f"{self.level}({', '.join(f'{k}={v:g}' for k, v in self.parameters)})"

    @property
    def varies(self) -> bool:
        return self.level != "constant"

    def rule(self) -> NoiseLevel:
        options = dict(self.parameters)
        if not self.varies:
            return Constant(**options)
        return LEVELS[self.level](calibration=zoo.calibration(self.dataset), **options)

    def attacks(self) -> list[Attack]:
        allowed, eps = budget(self.preset, self.dataset), DATASETS[self.dataset].eps["Linf"]
        options: dict[str, Any] = {"norm": "Linf", "eps": eps, "steps": allowed.steps, "eot": allowed.eot}
        options["max_rows"] = 128  # their step graphs fit in the engine's 1 GiB: nothing is recomputed
        if not self.varies:
            return [PGD(**options), SecondPGD(**options), UnitPGD(**options), APGD(**options)]
        lowering = [NormPGD(**options, norm_weight=self.norm_weight), LowLevelPGD(**options)]
        return [PGD(**options), ConstantLevelPGD(**options), *lowering]

    def samples(self) -> Samples:
        """The images of this seed, which no other seed has."""
        images, labels = load_dataset(self.dataset, "test")
        rows = torch.arange(self.seed * self.images, (self.seed + 1) * self.images)
        if rows[-1] >= len(images):
            raise ValueError(f"{self.dataset} has no {self.images} test images of its own for seed {self.seed}.")
        return Samples(images[rows], labels[rows], rows)

    def defence(self) -> Defence:
        classifier, model = zoo.classifier(f"{self.dataset}-standard"), zoo.score_model(self.dataset)
        defended = DefendedClassifier(classifier, diffpure(model, self.rule(), self.steps, "ddpm"))
        config = {**defended.config(), "classifier": fingerprint(classifier), "score_model": model.fingerprint()}
        return Defence(self.name, defended, self.attacks(), budget(self.preset, self.dataset).judge_draws, config)

    def folder(self) -> RunFolder:
        defence = self.defence()
        attacks = [a.budget() for a in defence.attacks]
        config = {"defence": defence.config, "draws": defence.draws, "attacks": attacks, "seed": self.seed}
        path = self.out / self.dataset / f"{self.preset}-{self.name}-seed{self.seed}".replace(" ", "")
        return RunFolder(path, config, environment(torch.device("cpu"), self.command, Ranks()))

    def __call__(self) -> None:
        with self.folder() as folder:
            evaluate(folder, [self.defence()], self.samples(), self.seed, batch_size=64, progress=False)


def run_job(job: Job) -> Job:
    """A job in a worker process."""
    torch.set_num_threads(1)
    job()
    return job


def map_jobs(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Jobs as they finish in worker processes."""
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(run_job, jobs)


@dataclass
class Point:
    """A noise level's accuracies over the images of all seeds; ``values``: of each image, "clean" and "worst".

    ``flattered``: by how much the attack that holds t* constant lies above the worst case. A constant level is the
    control: there usual PGD lies above the worst of four for no reason but that they are four.
    """

    name: str
    varies: bool
    clean: Estimate
    attacks: dict[str, Estimate]
    worst: Estimate
    t_clean: float
    t_attacked: dict[str, float]
    seeds: int
    values: dict[str, np.ndarray]
    flattered: Estimate
    above_curve: Estimate | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "values"}
        return json.loads(json.dumps(fields, default=asdict))


def summarize(jobs: Sequence[Job]) -> Point:
    """All seeds of one noise level, with intervals over images."""
    collected: dict[str, list[np.ndarray]] = {}
    levels: dict[str, list[float]] = {}
    for job in jobs:
        folder, defence, samples = job.folder(), job.defence(), job.samples()
        labels, stages = samples.labels.numpy()[:, None], [stage_name(a) for a in defence.stages()]
        right = {stage: predictions(folder, defence, stage, samples) == labels for stage in stages}
        for stage, r in right.items():
            collected.setdefault(stage, []).append(r.mean(1))
            records = [folder.get(defence.name, stage, i) for i in samples.ids.tolist()]
            levels.setdefault(stage, []).append(float(np.mean([record["t_star"] for record in records])))
        collected.setdefault("worst", []).append(worst_mean(list(right.values())))
    values = {stage: np.concatenate(v) for stage, v in collected.items()}
    found = {stage: estimate(v) for stage, v in values.items()}
    return Point(
        name=jobs[0].name,
        varies=jobs[0].varies,
        clean=found.pop(CLEAN),
        worst=found.pop("worst"),
        attacks=found,
        t_clean=float(np.mean(levels[CLEAN])),
        t_attacked={attack: float(np.mean(t)) for attack, t in levels.items() if attack != CLEAN},
        seeds=len(jobs),
        values={"clean": values[CLEAN], "worst": values["worst"]},
        flattered=difference(values[HELD if HELD in values else USUAL], values["worst"]),
    )


def above_curve(point: Point, points: Sequence[Point]) -> Estimate | None:
    """Worst-case accuracy of ``point`` minus that of a constant t* of the same clean accuracy.

    The curve is linear between measured points. None beyond them, and where resampling leaves them in more than one
    case of a hundred. Interval: bootstrap over samples, paired.
    """
    constants = [p for p in points if not p.varies]

    def difference(rows: np.ndarray) -> float:
        means = sorted((p.values["clean"][rows].mean(), p.values["worst"][rows].mean()) for p in constants)
        x, y = zip(*means, strict=True)
        curve = np.interp(point.values["clean"][rows].mean(), x, y, left=np.nan, right=np.nan)
        return float(point.values["worst"][rows].mean() - curve)

    n = len(point.values["clean"])
    value = difference(np.arange(n))
    g = np.random.default_rng(0)
    resampled = [difference(g.integers(0, n, n)) for _ in range(2000)]
    if np.isnan(value) or np.isnan(resampled).mean() > 0.01:
        return None
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def table(points: Sequence[Point]) -> pd.DataFrame:
    """Percentages; ``above curve``: worst case minus that of a constant t* of the same clean accuracy."""
    rows = [
        {
            "noise level": p.name,
            "t* clean": f"{p.t_clean:.3f}",
            "t* attacked": f"{min(p.t_attacked.values()):.3f} to {max(p.t_attacked.values()):.3f}",
            "clean": str(p.clean),
            **{name: str(e) for name, e in p.attacks.items()},
            "worst case": str(p.worst),
            "constant t* above worst case": str(p.flattered),
            "above curve": str(p.above_curve) if p.above_curve else "off the curve" if p.varies else "",
        }
        for p in points
    ]
    return pd.DataFrame(rows).fillna("-").set_index("noise level")


def paired(points: Sequence[Point]) -> pd.DataFrame:
    """By how many points each varying level lies above each constant one on the same images: clean, and worst case."""
    rows = {
        p.name: {
            c.name: ", ".join(str(difference(p.values[k], c.values[k])).strip() for k in ("clean", "worst"))
            for c in points
            if not c.varies
        }
        for p in points
        if p.varies
    }
    return pd.DataFrame(rows)


def plot(path: Path, points: Sequence[Point], title: str) -> None:
    """Worst-case against clean accuracy: the curve of constant t*, the SSNI points by each attack."""
    fig, ax = panels(7.5, 5.2)
    constants = [p for p in points if not p.varies]
    for p in constants:
        ax.annotate(f"{p.t_clean:g}", (100 * p.clean.value, 100 * p.worst.value), (5, 5), textcoords="offset points")
    errorbar(ax, constants, [p.worst for p in constants], label="constant t*", color=BARE, marker="o", ls="-")
    colours = cycle(COLOURS)
    for p in (p for p in points if p.varies):
        colour = next(colours)
        errorbar(ax, [p], [p.worst], label=f"{p.name}, worst case", color=colour, marker="s", ls="")
        held = p.attacks[HELD]
        errorbar(ax, [p], [held], label=f"{p.name}, t* held constant", color=colour, marker="s", ls="", mfc="white")
    ax.set_xlabel("clean accuracy, %")
    ax.set_ylabel("robust accuracy, %")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save(fig, path)


def errorbar(ax: Any, points: Sequence[Point], robust: Sequence[Estimate], **style: Any) -> None:
    """Points with 95 % intervals both ways."""
    x, across = percents([p.clean for p in points])
    y, upright = percents(list(robust))
    ax.errorbar(x, y, xerr=across, yerr=upright, capsize=2, lw=1, **style)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help=f"one of {', '.join(SSNI)} (default: digits)")
    text = f"attack budget: {', '.join(BUDGETS)} (default: standard)"
    p.add_argument("--budget", "--preset", dest="preset", default="standard", help=text)
    p.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    p.add_argument("--steps", type=int, default=10, help="reverse steps (default: %(default)s)")
    p.add_argument("--n-examples", type=int, default=128, help="test images of each seed (default: %(default)s)")
    p.add_argument("--norm-weight", type=float, default=0.3, help="weight of the norm attack (default: %(default)s)")
    p.add_argument("--workers", type=int, default=4, help="processes, one thread each (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/noise-levels"), help="folder (default: %(default)s)")
    return p


def parse_seeds(text: str) -> list[int]:
    """Different whole numbers of at least 0."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds takes different whole numbers of at least 0, separated by commas, got {text!r}.")
    return seeds


def build_jobs(args: argparse.Namespace) -> list[list[Job]]:
    """Jobs by noise level, one per seed."""
    choose(args.dataset, SSNI, "data set of this benchmark")
    choose(args.preset, BUDGETS, "budget")
    seeds = parse_seeds(args.seeds)
    levels: list[tuple[str, dict[str, float]]] = [("constant", {"t_star": t}) for t in CONSTANTS[args.dataset]]
    levels += SSNI[args.dataset]
    shared = {"preset": args.preset, "steps": args.steps, "images": args.n_examples, "norm_weight": args.norm_weight}
    shared |= {"out": args.out, "command": " ".join(sys.argv)}
    return [
        [Job(args.dataset, level, tuple(sorted(parameters.items())), seed, **shared) for seed in seeds]
        for level, parameters in levels
    ]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check_count(args.workers, "workers")
        check_count(args.n_examples, "n-examples")
        groups = build_jobs(args)
        args.out.mkdir(parents=True, exist_ok=True)
        for job in groups[0]:
            job.samples()  # there are enough
        for group in groups:
            group[0].defence()  # its parameters are in range
        # SSNI runs are the longest; they go first.
        jobs = sorted((job for group in groups for job in group), key=lambda j: (j.seed, not j.varies))
        for job in tqdm(map_jobs(jobs, args.workers), total=len(jobs), unit="run"):
            tqdm.write(f"finished {job.name}, seed {job.seed}")
        points = [summarize(group) for group in groups]
        for point in (p for p in points if p.varies):
            point.above_curve = above_curve(point, points)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = args.out / args.dataset
    print(f"{args.dataset}, seeds {args.seeds}, {args.n_examples} images each")
    print(table(points).to_string())
    print("\nAbove constant levels, paired by image: clean, worst case")
    print(paired(points).to_string())
    write_json(folder / "result.json", {"command": " ".join(sys.argv), "points": [p.plain() for p in points]})
    stated = budget(args.preset, args.dataset)
    title = f"{args.dataset}, L_inf {DATASETS[args.dataset].eps['Linf']:g}, PGD {stated.steps} x EOT {stated.eot}"
    plot(folder / "curve.png", points, f"{title}, {len(points[0].values['clean'])} images, seeds {args.seeds}")
    print(f"Wrote {folder / 'result.json'} and {folder / 'curve.png'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
