#!/usr/bin/env python3
"""Accuracy left against network calls per image: the adaptive attack, PGD+EOT, and several attacks together.

All rows of a purifier meet the same images and are judged on the same draws, so differences are paired. Calls are those
of ``Attack.network_calls``. Tuned on the first half of the test images; this quotes the second unless asked for
the first. With --strongest the other attacks are all of ``purify attack --attacks strongest`` at the ``standard``
budget. --constants changes a choice of the adaptive attack, to see what it is worth.

    python benchmarks/attack_budget.py --minutes 30       # resumes; rows that are done are not run again
    python benchmarks/attack_budget.py --strongest --rows strongest --minutes 60
    python benchmarks/attack_budget.py --half first --systems gns --calls 10000 --rows 10000 --constants ROUNDS=8

Each row is written as it ends, to OUT/rows; then OUT/attack_budget.json, .md and a plot for all that is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import NullFormatter

import purify
from purify.attacks import (
    APGD,
    PGD,
    Adaptive,
    Attack,
    ConstantLevelPGD,
    FirstOrderPGD,
    GuidePGD,
    LowLevelPGD,
    RandomNoise,
    SurrogatePGD,
)
from purify.attacks.adaptive import phases
from purify.checks import check_count, check_weight, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.diffusion.noise import derive_seed
from purify.evaluate.build import Request, build_attacks
from purify.evaluate.metrics import Estimate, difference, estimate, mean_correct, worst_mean
from purify.evaluate.pictures import panels, percents, save
from purify.evaluate.provenance import git_revision
from purify.evaluate.runner import Defence, judge
from purify.presets import PURIFIERS
from purify.purification.levels import LEVELS

SYSTEMS = ("diffpure", "agdm", "gdmp", "ssni-l", "gns")
# The best of `strongest`, each alone.
TOGETHER = (PGD, FirstOrderPGD, ConstantLevelPGD, LowLevelPGD, SurrogatePGD, APGD, GuidePGD)
HALVES = ("first", "second")
SHARES = (1 / 25, 1 / 10, 1 / 4, 1 / 2)  # of the calls of pgd-eot at steps x eot
SMALL = (1 / 25, 1 / 10)  # of the calls of all of `strongest`
# Constants of purify/attacks/adaptive/phases.py.
CHOICES = ("ROUNDS", "SHORT", "HELD", "LONG", "SHARE", "PROBE", "FALLEN", "TRY", "MOMENTUM")
CHOICES += ("CLIMB_SHORT", "CHOOSE_SHORT", "CLIMB_FULL", "CHOOSE_FULL")
NUMBERS = {int: "a whole number", float: "a number"}
WORST = "together"  # each image meets the worst for it, cross-fitted


@dataclass(frozen=True)
class Bench:
    """What all rows have in common."""

    dataset: str
    norm: str
    eps: float
    images: int
    steps: int
    eot: int
    draws: int
    seed: int
    out: Path
    strongest: bool = False
    calls: tuple[int, ...] = ()
    half: str = "second"
    constants: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        stated: tuple[Any, ...] = (self.dataset, self.norm, self.eps, self.images, self.steps, self.eot, self.draws)
        stated += (self.seed, *(() if self.half == "second" else (self.half,)))
        return hashlib.sha256(repr(stated).encode()).hexdigest()[:10]

    def samples(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first images of a half of the test set, labels and ids."""
        images, labels = load_dataset(self.dataset, "test")
        middle = len(images) // 2
        first, end = (0, middle) if self.half == "first" else (middle, len(images))
        ids = torch.arange(first, min(first + self.images, end))
        return images[ids], labels[ids], ids

    def model(self, system: str) -> Any:
        return purify.wrap(f"{self.dataset}-standard", dataset=self.dataset, purifier=system, threat_model=self.norm)

    def attacks(self, model: Any, together: bool) -> list[tuple[str, Attack]]:
        """Rows by name, the cheapest first."""
        options = {"norm": self.norm, "eps": self.eps, "max_rows": 256}
        pgd = PGD(steps=self.steps, eot=self.eot, **options)
        whole = pgd.network_calls(model)
        found: list[tuple[str, Attack]] = [
            (f"adaptive 1/{round(1 / s)}", Adaptive(calls=int(whole * s), **options)) for s in SHARES
        ]
        found += [(f"adaptive {n} calls", Adaptive(calls=n, **options)) for n in self.calls]
        half = PGD(steps=self.steps // 2, eot=max(1, self.eot // 2), **options)
        found += [(named(half), half), (named(pgd), pgd)]
        if together:
            kinds = [kind(steps=self.steps, eot=self.eot, **options) for kind in TOGETHER if kind is not PGD]
            others = [(named(a), a) for a in (self.union() if self.strongest else kinds) if a.applies_to(model)]
            found += [(name, attack) for name, attack in others if name not in dict(found)]
        if together and self.strongest:
            whole = sum(attack.network_calls(model) for name, attack in others)
            found += [(f"adaptive strongest/{round(1 / s)}", Adaptive(calls=int(whole * s), **options)) for s in SMALL]
        return [(" ".join([n, *self.constants]) if isinstance(a, Adaptive) else n, a) for n, a in found]

    def union(self) -> list[Attack]:
        """All of ``strongest`` at the ``standard`` budget, without the adaptive attack, and without mere noise."""
        asked = purify.Evaluation(
            dataset=self.dataset, threat_model=self.norm, attacks="strongest", budget="standard", max_rows=256
        )
        found = build_attacks(Request(asked, DATASETS[self.dataset], torch.device("cpu")))
        return [attack for attack in found if not isinstance(attack, (Adaptive, RandomNoise))]


def named(attack: Any) -> str:
    effort = f" {attack.steps} x {attack.eot}" if hasattr(attack, "steps") else f" {attack.queries}"
    return attack.label + effort


def measure(bench: Bench, system: str, name: str, attack: Attack, model: Any) -> dict[str, Any]:
    """One row: the judges' answers, calls and seconds."""
    x, y, ids = bench.samples()
    start = time.perf_counter()
    found = attack(model, x, y, sample_ids=ids, seed=derive_seed(bench.seed, "attack"))
    seconds = time.perf_counter() - start
    judged = judge(Defence(system, model, [], bench.draws, {}), found.images, ids, bench.seed, 256)
    planned = attack.network_calls(model)
    used = float(planned) if found.calls is None else found.calls.double().mean().item()
    right = (judged.predictions == y[:, None]).int().tolist()
    cost = {"planned": planned, "calls": used, "seconds": seconds}
    return {"system": system, "attack": name, **cost, "right": right, "git": git_revision()}


def run(bench: Bench, systems: list[str], minutes: float, together: bool, rows: list[str]) -> None:
    """Measure what is not there yet, as long as the time allows; a row that has begun is finished.

    ``rows``: see :func:`is_asked`.
    """
    end = time.monotonic() + 60 * minutes
    for system in systems:
        model = bench.model(system)
        found = bench.attacks(model, together)
        names = {name for name, _ in found}
        for name, attack in found:
            file = row_file(bench, system, name)
            if file.exists() or not is_asked(name, rows, names):
                continue
            if time.monotonic() > end:
                print(f"Time is up before {system}, {name}; the same command goes on from here.")
                return
            row = measure(bench, system, name, attack.fitted(model), model)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(row))
            partial.replace(file)  # whole or not at all
            left = 100 * np.mean(row["right"])
            print(f"{system:9} {name:28} {row['calls']:8.0f} calls  {left:5.1f} %  {row['seconds']:.0f} s", flush=True)


def is_asked(name: str, rows: list[str], names: set[str]) -> bool:
    """Whether a row is one of these, or has a part in its name that is no whole name; none asked for: all are."""
    return not rows or any(part == name if part in names else part in name for part in rows)


def row_file(bench: Bench, system: str, name: str) -> Path:
    return bench.out / "rows" / bench.key / f"{system}-{name.replace('/', '_').replace(' ', '-')}.json"


def load(bench: Bench, system: str, together: bool) -> dict[str, dict[str, Any]]:
    """Rows of a system by name, with all but the adaptive ones together."""
    rows = {}
    for name, _ in bench.attacks(bench.model(system), together):
        file = row_file(bench, system, name)
        if file.exists():
            rows[name] = json.loads(file.read_text())
    others = [r for n, r in rows.items() if "adaptive" not in n]
    if together and len(others) > 2:
        right = [np.array(r["right"], dtype=float) for r in others]
        spent = sum(r["calls"] for r in others)
        rows[WORST] = {"system": system, "attack": WORST, "calls": spent, "planned": spent, "worst": worst_mean(right)}
    return rows


def values(row: dict[str, Any]) -> np.ndarray:
    """Share right of each image."""
    if "worst" in row:
        return np.asarray(row["worst"])
    right = np.array(row["right"])
    return mean_correct(right, np.ones(len(right)))


def report(bench: Bench, systems: list[str], together: bool) -> None:
    """JSON, Markdown and a plot of every row that is there."""
    summary, lines, curves = [], [], {}
    for system in systems:
        rows = load(bench, system, together)
        if not rows:
            continue
        pgd = next((r for n, r in rows.items() if n == f"pgd-eot {bench.steps} x {bench.eot}"), None)
        worst = rows.get(WORST)
        lines += [
            f"### {system}",
            "",
            "| attack | calls per image | accuracy left | minus pgd-eot, paired | minus together, paired |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, row in rows.items():
            left = estimate(values(row))
            against = [None if o is None or o is row else difference(values(row), values(o)) for o in (pgd, worst)]
            lines.append(f"| {name} | {row['calls']:.0f} | {left} | " + " | ".join(map(text, against)) + " |")
            summary.append({
                "system": system, "attack": name, "calls": row["calls"], "planned": row["planned"],
                "seconds": row.get("seconds"), "left": plain(left), "minus pgd-eot": plain(against[0]),
                "minus together": plain(against[1]),
            })  # fmt: skip
        lines.append("")
        curves[system] = rows
    say_versions(curves)
    stated = {k: str(v) for k, v in vars(bench).items() if k != "out"}
    bench.out.mkdir(parents=True, exist_ok=True)
    (bench.out / "attack_budget.json").write_text(json.dumps({"bench": stated, "rows": summary}, indent=1))
    (bench.out / "attack_budget.md").write_text("\n".join(lines))
    draw(curves, bench.out / "attack_budget.png", f"{bench.dataset}, {bench.norm} {bench.eps:g}, {bench.images} images")
    print("\n".join(lines))


def say_versions(systems: dict[str, dict[str, Any]]) -> None:
    """Say so if the rows come from more than one version of the attacks."""
    measured = [row for rows in systems.values() for row in rows.values() if "right" in row]
    versions = sorted({str(row.get("git")) for row in measured})
    if len(versions) > 1:
        print(f"The rows come from several versions of the code ({', '.join(versions)}); another --out has all of one.")


def text(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def plain(found: Estimate | None) -> list[float] | None:
    return None if found is None else [found.value, found.low, found.high]


def draw(curves: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """A panel for each purifier."""
    if not curves:
        return
    fig, axes = panels(3.4 * len(curves), 3.2, columns=len(curves), squeeze=False)
    for ax, (system, rows) in zip(axes[0], curves.items(), strict=True):
        for kind, mark in (("adaptive", "o-"), ("pgd-eot ", "s-"), ("", "x")):
            names = [n for n in rows if (n.startswith(kind) if kind else not n.startswith(("adaptive", "pgd-eot ")))]
            names.sort(key=lambda n: rows[n]["calls"])
            if names:
                middle, bars = percents([estimate(values(rows[n])) for n in names])
                spent = [rows[n]["calls"] for n in names]
                ax.errorbar(spent, middle, bars, fmt=mark, capsize=2, label=kind.strip() or "others, and together")
        ax.set(xscale="log", xlabel="network calls per image", title=system, ylim=(0, None))
        ax.xaxis.set_minor_formatter(NullFormatter())  # of a short axis they overlap
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy left, %")
    axes[0, -1].legend(fontsize=7)
    fig.suptitle(title, fontsize=9)
    save(fig, path)


def above_zero(value: float) -> float:
    """The number, if it is one above 0."""
    if not 0 < value < math.inf:
        raise ValueError
    return value


def constants(asked: str) -> tuple[str, ...]:
    """Choices of the adaptive attack, set to what was asked for."""
    found = tuple(part for part in asked.split(",") if part)
    for part in found:
        name, _, given = part.partition("=")
        if name not in CHOICES:
            raise ValueError(f"--constants: {part} sets none of {', '.join(CHOICES)}.")
        kind = type(getattr(phases, name))
        try:
            setattr(phases, name, above_zero(kind(given)))
        except ValueError:
            raise ValueError(
                f"--constants: {name} must be {NUMBERS[kind]} above 0, got {given or 'nothing'}."
            ) from None
    return found


def counts(asked: str) -> tuple[int, ...]:
    """Network calls of more rows.

    Raises:
        ValueError: one of them is no whole number above 0.
    """
    parts = [part for part in asked.split(",") if part]
    for part in parts:
        check_count(int(part) if part.isdecimal() else part, "--calls")
    return tuple(map(int, parts))


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that means nothing, or a folder that cannot be written to."""
    for name in ("images", "steps", "eot", "judge_draws", "threads"):
        check_count(getattr(args, name), f"--{name.replace('_', '-')}")
    check_count(args.seed, "--seed", 0)
    check_weight(args.minutes, "--minutes")
    check_writable(args.out / "attack_budget.json")


def check_rows(bench: Bench, systems: list[str], together: bool, rows: list[str]) -> None:
    """Raise ValueError if no row is named like one of ``rows``."""
    names = {name: None for system in systems for name, _ in bench.attacks(bench.model(system), together)}
    if not any(is_asked(name, rows, set(names)) for name in names):
        raise ValueError(f"--rows {','.join(rows)} names none of the rows: {', '.join(names)}.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="purifiers or noise levels, separated by commas")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--threat-model", default="Linf")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=40, help="of pgd-eot and the others")
    parser.add_argument("--eot", type=int, default=10, help="of pgd-eot and the others")
    parser.add_argument("--judge-draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="no row begins later")
    parser.add_argument("--alone", action="store_true", help="without the attacks beside adaptive and pgd-eot")
    parser.add_argument("--strongest", action="store_true", help="beside all of `strongest`, not the best of it")
    parser.add_argument("--calls", default="", help="more rows of adaptive, at so many calls, separated by commas")
    parser.add_argument("--half", default="second", choices=HALVES, help="of the test images")
    parser.add_argument("--constants", default="", help="of purify.attacks.adaptive.phases: ROUNDS=1,SHORT=4")
    parser.add_argument("--rows", default="", help="parts of names, separated by commas: no other rows are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/attack-budget"))
    args = parser.parse_args(argv)
    systems = args.systems.split(",")
    try:
        data = choose(args.dataset, DATASETS, "data set")
        eps = choose(args.threat_model, data.eps, "threat model")
        for system in systems:
            choose(system, PURIFIERS | LEVELS, "system")
        changed, rows = constants(args.constants), [part for part in args.rows.split(",") if part]
        check_numbers(args)
        bench = Bench(
            args.dataset, args.threat_model, eps, args.images, args.steps, args.eot, args.judge_draws, args.seed,
            args.out, args.strongest, counts(args.calls), args.half, changed,
        )  # fmt: skip
        check_rows(bench, systems, not args.alone, rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    run(bench, systems, args.minutes, not args.alone, rows)
    report(bench, systems, not args.alone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
