"""Put the shards of a run together, or runs of one configuration: records of one process, bit for bit.

The parts stay as they are. What is lacking, because a part was stopped, is named: run that part again and merge again,
or leave the rest to the command that ends the whole run.

examples:
  purify merge runs/NAME
  purify merge runs/A runs/B --out runs/C
"""

from __future__ import annotations

import argparse

from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.evaluate.merge import Merged, end_curve, merge
from purify.evaluate.records import curve_folders
from purify.options import PATH


def parser(prog: str = "purify merge") -> Parser:
    """All options."""
    summary, examples = (__doc__ or "").split("examples:")
    p = Parser(prog=prog, description=summary, epilog="examples:" + examples)
    p.add_argument(
        "runs", nargs="+", type=taking(PATH), metavar="RUN_DIR", help="folder with shards, or folders of runs"
    )
    p.add_argument("--out", type=taking(PATH), help="folder of the whole run (default: the only RUN_DIR)")
    return p


def run(args: argparse.Namespace, command: str) -> int:
    """Merge, and say what is left to do; of a curve every radius."""
    parts = curve_folders(args.runs[0]) if len(args.runs) == 1 and args.out is None else []
    for runs in [[part] for part in parts] or [args.runs]:
        show(merge(runs, args.out))
    if parts:
        print(f"The curve {end_curve(parts)}")
    return 0


def show(found: Merged) -> None:
    """What a run has now, and what it lacks."""
    print(f"{found.folder} holds {found.records} records, {found.new} of them new.")
    if found.lacking:
        print(f"It lacks {found.lacking}: run them and merge again, or leave the rest to one process:")
    print(f"Tables, self-checks and result.json: {found.command}")


def main(argv: list[str] | None = None, prog: str = "purify merge") -> int:
    """Merge folders of runs; returns the exit status."""
    return guarded(parser(prog), run, argv)
