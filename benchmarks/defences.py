#!/usr/bin/env python3
"""Clean against worst-case accuracy of every purifier and training-side defence, under the adaptive attack.

    python benchmarks/defences.py --out docs/defences --images 16 --calls 1500
    python benchmarks/defences.py --out docs/defences --only "diffpure;addt"    # processes may share a folder

Beside it stands what the attack published with a defence would have reported: PGD on the model that it attacks, with
the images judged behind the defence itself. A system's numbers go into a file of its own, so that the command goes on
where it stopped; the table and the plot hold all that are there, with the adversarially trained classifier as a line.
Few images and few calls tell what falls, not which of two is better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from judging import Judge, read, shown
from released_attacks import RELEASED
from torch import nn

from purify import PURIFIERS, DefendedClassifier, zoo
from purify.attacks import PGD, Adaptive
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.evaluate.metrics import Estimate
from purify.evaluate.pictures import panels, percents, save
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.wrap import build_purifier

BASELINE = "adversarial training"


@dataclass(frozen=True)
class System:
    """A classifier, alone or behind a purifier.

    Attributes:
        purifier: name of a preset; None: the classifier alone.
        model, score_model: what follows the data set in the names of embedded networks.
        options: of the preset.
    """

    purifier: str | None = "diffpure"
    model: str = "standard"
    score_model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def networks(self, dataset: str) -> tuple[str, str]:
        """Names of its classifier and its score model."""
        return f"{dataset}-{self.model}", "-".join(filter(None, (dataset, self.score_model)))

    def build(self, dataset: str) -> nn.Module:
        model, score_model = self.networks(dataset)
        if self.purifier is None:
            return zoo.classifier(model)
        purifier = build_purifier(self.purifier, score_model, dataset, **self.options)
        return DefendedClassifier(zoo.classifier(model), purifier)


ONE, TWO = ({"reverse": rule, "steps": n} for rule, n in (("one-shot", 1), ("consistency", 2)))
SYSTEMS: dict[str, System] = {
    BASELINE: System(None, "at"),
    "no purifier": System(None),
    "diffusion classifier": System(None, "classes"),
    "diffusion classifier + likelihood": System("likelihood", "classes"),
    **{name: System(name) for name in PURIFIERS},
    "adbm": System(score_model="adbm"),
    "addt": System(score_model="addt"),
    "flow, 2 steps": System(score_model="flow", options={"reverse": "ddim", "steps": 2}),
    "consistency, 1 step": System(score_model="consistency", options=ONE),
    "consistency, 2 steps": System(score_model="consistency", options=TWO),
    "purified classifier": System(model="purified"),
    "purified-at classifier, 1 step": System(model="purified-at", options={**ONE, "t_star": 0.03}),
    "diffpure + adversarial training": System(model="at"),
}


# What was published attacks these as they are (inferred: ADBM's and ADDT's programs were not read for it).
EXACT = "exact gradient", lambda purifier: purifier
PUBLISHED = {
    **RELEASED,
    "adbm": EXACT,
    "addt": EXACT,
    "diffusion classifier": EXACT,
    "diffusion classifier + likelihood": RELEASED["likelihood"],
}


def available(dataset: str) -> dict[str, System]:
    """The systems whose networks are embedded for the data set."""
    names = set(zoo.names())
    return {name: system for name, system in SYSTEMS.items() if names.issuperset(system.networks(dataset))}


def measure(system: System, judge: Judge, calls: int) -> dict[str, Any]:
    """Accuracy clean and under the adaptive attack."""
    model = system.build(judge.dataset)
    attack = Adaptive("Linf", DATASETS[judge.dataset].eps["Linf"], calls=calls).fitted(model)
    found = judge.attacked(attack, model)
    clean, worst = vars(judge.accuracy(model)), vars(judge.accuracy(model, found))
    return {**vars(judge), "calls": calls, "clean": clean, "worst": worst}


def published(name: str, system: System, judge: Judge, steps: int = 20, eot: int = 4) -> dict[str, Any]:
    """Accuracy that the attack published with the system would have reported, with PGD of so many steps and draws."""
    what, weaken = PUBLISHED[name]
    target = model = system.build(judge.dataset)
    if isinstance(model, DefendedClassifier):
        target = DefendedClassifier(model.classifier, weaken(model.purifier))
    found = judge.attacked(PGD("Linf", DATASETS[judge.dataset].eps["Linf"], steps=steps, eot=eot), target)
    return {"attack": what, "steps": steps, "eot": eot, **vars(judge.accuracy(model, found))}


def rows_of(folder: Path, dataset: str) -> dict[str, dict[str, Any]]:
    """What is there of a data set, by system, the most robust first."""
    found = {name: folder / filename(dataset, name) for name in SYSTEMS}
    rows = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    return dict(sorted(rows.items(), key=lambda item: -least(item[1]).value))


def least(row: Mapping[str, Any]) -> Estimate:
    """The lower of the accuracies under the adaptive and the published attack."""
    return min((read(row[name]) for name in ("worst", "published") if name in row), key=lambda found: found.value)


def filename(dataset: str, name: str) -> str:
    """Where a system's numbers are."""
    return f"{dataset}-{name.replace(' ', '-').replace(',', '').replace('+', 'and')}.json"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, with what each lacks of the adversarially trained classifier on the same images, at its least."""
    base = rows.get(BASELINE)
    lines = [
        "| system | clean | `adaptive` | below adversarial training | published attack | reports | images, calls |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        same = base is not None and all(base[key] == row[key] for key in ("images", "first"))
        behind = f"{100 * (least(base).value - least(row).value):.1f}" if base is not None and same else ""
        accuracies = " | ".join(shown(row[key]) for key in ("clean", "worst"))
        own = row.get("published")
        report = " | " if own is None else f"{own['attack']} | {shown(own)}"
        lines.append(f"| {name} | {accuracies} | {behind} | {report} | {row['images']}, {row['calls']:,} |")
    return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Worst case over clean accuracy, each with its interval; the adversarially trained classifier as a line."""
    fig, ax = panels(8, 5)
    for k, (name, row) in enumerate(rows.items()):
        y = least(row)
        if name == BASELINE:
            ax.axhline(100 * y.value, color="k", linestyle="--", linewidth=1, label=name)
            ax.axhspan(100 * y.low, 100 * y.high, color="k", alpha=0.08, linewidth=0)
            continue
        middle, bars = percents([y])
        mark = "osD^v<>pP*X"[k % 11]  # eleven marks in ten colours: no pair twice
        ax.errorbar(100 * row["clean"]["value"], middle, bars, fmt=mark, ms=5, lw=0.8, capsize=2, label=name)
    ax.set(xlabel="clean accuracy, %", ylabel="worst-case accuracy, %", ylim=(-2, 100))
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(fig, path)


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--only", help="which systems, separated by semicolons (default: all)")
    p.add_argument("--first", type=int, default=0, help="the first test image (default: 0)")
    p.add_argument("--images", type=int, default=16, help="test images (default: 16)")
    p.add_argument("--calls", type=int, default=1500, help="network calls per image (default: 1500)")
    p.add_argument("--draws", type=int, default=10, help="purifications that judge each image (default: 10)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--out", type=Path, required=True, help="folder of the numbers, the table and the plot")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        choose(args.dataset, dict.fromkeys(("digits", "fashion_mnist")), "data set")
        known = available(args.dataset)
        wanted = list(known) if args.only is None else args.only.split(";")
        systems = {name.strip(): choose(name.strip(), known, "system") for name in wanted}
        for what in ("images", "calls", "draws", "threads"):
            check_count(getattr(args, what), f"--{what}")
        held = len(load_dataset(args.dataset, "test")[0])
        if not 0 <= args.first <= held - args.images:
            raise ValueError(f"--first {args.first} and --images {args.images} ask beyond the {held} test images.")
        check_writable(args.out / "table.md")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(args.dataset, args.images, args.first, args.draws)
    paths = {name: args.out / filename(args.dataset, name) for name in systems}
    for name, path in paths.items():
        if not path.is_file():
            row = measure(systems[name], judge, args.calls)
            write_json(path, {"system": name, **row})
            print(f"{name}: clean {shown(row['clean'])}, worst case {shown(row['worst'])}", flush=True)
    for name in [name for name in PUBLISHED if name in paths]:
        row = json.loads(paths[name].read_text())
        if "published" not in row:
            row["published"] = published(name, systems[name], Judge(*(row[f.name] for f in fields(Judge))))
            write_json(paths[name], row)
            print(f"{name}: its published attack would report {shown(row['published'])}", flush=True)
    rows = rows_of(args.out, args.dataset)
    (args.out / f"{args.dataset}.md").write_text(table(rows))
    plot(rows, args.out / f"{args.dataset}.svg")
    print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
