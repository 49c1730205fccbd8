"""How much better or worse than one defence are others? Differences on the same images, with paired intervals.

Reads finished runs of run_autoattack.py; images that a run lacks are left out of its comparison. Attacks that both met
must have had the same budget. A defence marked ! failed a self-check or was attacked without the exact gradient.

With --transfer: whose adversarial images deceive whom? The strongest attack's images of every defence of the runs are
judged on all others; a table, transfer.json and transfer.png. The same command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from purify.attacks.threats import stated
from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.evaluate.metrics import difference, mean_correct, worst_mean
from purify.evaluate.runner import CLEAN
from purify.leaderboard import Row, read_run
from purify.leaderboard.groups import measurements
from purify.leaderboard.rows import load_json, load_records
from purify.leaderboard.transfer import transfer
from purify.options import PATH, TEXT


def parser(prog: str = "purify compare") -> Parser:
    """All options."""
    p = Parser(prog=prog, description=__doc__)
    p.add_argument("base", type=taking(PATH), metavar="BASE_DIR", help="the run with the defence to compare with")
    p.add_argument("runs", nargs="*", type=taking(PATH), metavar="RUN_DIR", help="folders of finished runs")
    p.add_argument("--defence", type=taking(TEXT), help="name of that defence (default: diffpure)")
    p.add_argument("--transfer", action="store_true", help="judge each defence's adversarial images on all others")
    p.add_argument("--out", type=taking(PATH), help="folder of --transfer (default: below runs/)")
    p.add_argument("--device", type=taking(TEXT), help="where --transfer judges (default: where the runs were made)")
    return p


def values(row: Row) -> pd.DataFrame:
    """Share of purifications that are right, clean and in the worst case, by sample id."""
    found = {stage: r for (name, stage), r in load_records(Path(row.run) / "records.jsonl").items() if name == row.name}
    labels = np.array([r["label"] for r in found[CLEAN]])
    predictions = [np.array([r["predictions"] for r in records]) for records in found.values()]
    clean = mean_correct(np.array([r["predictions"] for r in found[CLEAN]]), labels)
    worst = worst_mean([p == labels[:, None] for p in predictions])
    ids = pd.MultiIndex.from_arrays([[r["sample"] for r in found[CLEAN]], labels], names=["sample", "label"])
    return pd.DataFrame({"clean": clean, "worst case": worst}, index=ids)


def compare(base: Row, row: Row) -> dict[str, str]:
    """A line of the table: accuracies of ``row``, and how far they lie above those of ``base`` on common images."""
    theirs, own = values(base).align(values(row), join="inner", axis=0)
    if own.empty:
        raise ValueError(f"{row.run} and {base.run} have no image in common; attack the same ones.")
    above = {f"{name}, above": str(difference(own[name].to_numpy(), theirs[name].to_numpy())).strip() for name in own}
    accuracies = {name: f"{100 * own[name].mean():.1f}" for name in own}
    strongest = {"attacks": str(len(row.attacks)), "strongest": row.strongest}
    level = {"t* clean": "-" if row.t_star is None else f"{row.t_star[0]:.3f}"}
    name = {"defence": row.name + (" !" if row.marked else ""), "classifier": row.classifier}
    return {**name, **level, "images": str(len(own)), **strongest, **accuracies, **above}


def budgets(row: Row) -> dict[str, dict[str, Any]]:
    """The budget of each attack that the defence met."""
    (config,) = load_json(Path(row.run) / "manifest.json", "config")
    return {budget["attack"]: budget for budget in config["attacks"][row.name]}


def check_comparable(base: Row, row: Row) -> None:
    """Raise ValueError where differences would not be those of the defences."""
    if (row.dataset, row.threat_model, row.eps) != (base.dataset, base.threat_model, base.eps):
        raise ValueError(
            f"{row.run} ({row.dataset}, {stated(row.threat_model, row.eps)}) has another data set, threat model or "
            f"eps than {base.run} ({base.dataset}, {stated(base.threat_model, base.eps)})."
        )
    theirs, own = budgets(base), budgets(row)
    random = [name for name in theirs.keys() & own.keys() if theirs[name] != own[name]]
    if random and row.draws > 1:  # a model without randomness needs no EOT
        raise ValueError(f"{row.name} in {row.run} met another budget of {sorted(random)[0]} than {base.name} did.")


def run(args: argparse.Namespace, command: str) -> int:
    """Read the runs and print how far their defences lie above the one of the first, or how attacks transfer."""
    if args.transfer:
        return show_transfer(args, command)
    if not args.runs:
        raise ValueError(f"There is nothing to compare {args.base} with; give folders of other runs, or --transfer.")
    if args.out or args.device:
        raise ValueError("--out and --device are for --transfer; a comparison judges and writes nothing.")
    bases, name = {row.name: row for row in read_run(args.base)}, args.defence or "diffpure"
    if name not in bases:
        raise ValueError(f"{args.base} has no defence {name!r}; it has {', '.join(bases)}.")
    base = bases[name]
    lines = []
    for row, where in measurements(args.runs):
        check_comparable(base, row)
        lines.append({**compare(base, row), "run": where})
    print(f"Accuracies in %, and by how many points they lie above {base.name} ({base.classifier}), [95 % interval]")
    print(pd.DataFrame(lines).set_index("defence").to_string())
    return 0


def show_transfer(args: argparse.Namespace, command: str) -> int:
    """Judge, and print the matrix."""
    if args.defence:
        raise ValueError("--transfer is about every defence of the runs; leave --defence out.")
    matrix = transfer([args.base, *args.runs], args.out, args.device, command)
    row = matrix.parties[0].row
    print(f"{row.samples} images of {row.dataset}, {stated(row.threat_model, row.eps)}: mean accuracy of each column")
    print("in %, [95 % interval], on images made for each row by the attack that left least of it")
    print(matrix.table().to_string())
    print(f"Wrote {matrix.folder / 'transfer.json'} and {matrix.folder / 'transfer.png'}.")
    return 0


def main(argv: list[str] | None = None, prog: str = "purify compare") -> int:
    """Compare; returns the exit status."""
    return guarded(parser(prog), run, argv)
