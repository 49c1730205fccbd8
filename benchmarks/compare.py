#!/usr/bin/env python
"""How much better or worse than one defence are others? Differences on the same images, with paired intervals.

Reads finished runs of run_autoattack.py; images that a run lacks are left out of its comparison.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from purify.evaluate.metrics import bootstrap, mean_correct, worst_mean
from purify.evaluate.runner import CLEAN
from purify.leaderboard import Row, read_run
from purify.leaderboard.rows import load_records


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("base", type=Path, metavar="BASE_DIR", help="folder of the run with the defence to compare with")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of finished runs")
    p.add_argument("--defence", default="diffpure", help="name of that defence (default: %(default)s)")
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
    above = {f"{name}, above": str(bootstrap((own - theirs)[name].to_numpy())).strip() for name in own}
    accuracies = {name: f"{100 * own[name].mean():.1f}" for name in own}
    level = {"t* clean": "-" if row.t_star is None else f"{row.t_star[0]:.3f}"}
    return {"defence": row.name, "classifier": row.classifier, **level, "images": str(len(own)), **accuracies, **above}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        bases = {row.name: row for row in read_run(args.base)}
        if args.defence not in bases:
            raise ValueError(f"{args.base} has no defence {args.defence!r}; it has {', '.join(bases)}.")
        base = bases[args.defence]
        lines = []
        for row in (row for run in args.runs for row in read_run(run)):
            if (row.dataset, row.threat_model, row.eps) != (base.dataset, base.threat_model, base.eps):
                raise ValueError(f"{row.run} is about another data set or threat model than {base.run}.")
            lines.append(compare(base, row))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Accuracies in %, and by how many points they lie above {base.name} ({base.classifier}), [95 % interval]")
    print(pd.DataFrame(lines).set_index("defence").to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
