"""``purify distortion``: the smallest radius at which fresh purifications fail, for each image."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from purify.cli.attack import describe
from purify.cli.parsing import Parser, describe_parser, described
from purify.cli.shell import guarded, note_data, note_part, note_shard
from purify.evaluate.budgets import reduced
from purify.evaluate.description import MinimumDistortion
from purify.evaluate.distortion import PICTURE, Ready, prepare, table
from purify.evaluate.dryrun import dry_run, duration
from purify.evaluate.ranks import Ranks, leave

EXAMPLES = """examples:
  %(prog)s                                     the demo: digits, up to twice the usual radius
  %(prog)s --threat-model L2 --eps 3 --halvings 6 --budget standard
  %(prog)s --attacks transfer,pgd-eot,pgd-eot-targeted --rate 0.9
  %(prog)s --config runs/NAME/run.yaml         the same run again
"""


def parser(prog: str = "purify distortion") -> Parser:
    """All options of :class:`MinimumDistortion`, in groups."""
    text = "Bisect, image by image, the smallest radius at which fresh purifications fail; report median and curve."
    p = describe_parser(MinimumDistortion, prog, text, EXAMPLES)
    p.add_argument("--dry-run", action="store_true", help="check everything, estimate the time, and stop")
    return p


def run(args: Any, command: str) -> int:
    """Check everything, then search, confirm and report."""
    asked = described(MinimumDistortion, args)
    ready = prepare(asked)
    first = ready.ranks.first
    if first:
        note_data(asked, ready.request.data)
    if args.dry_run:
        if first:
            show_dry_run(ready)
        return 0
    with ready.open(command) as folder:
        if first:
            upper = f"{asked.threat_model} up to eps {ready.asked.upper:g}"
            print(f"{asked.dataset}, {upper}, {len(ready.samples)} samples; records in {folder.path}")
        ready.search(folder)
        if first and asked.part:
            note_shard(asked.part, folder)
        elif first:
            found = ready.finish(folder)
            show(ready)
            print(table(found, ready.radii).to_string())
            print(f"Wrote {folder.path / 'result.json'}, {folder.path / PICTURE}.")
    leave()
    return 0


def show(ready: Ready) -> None:
    """What the numbers of the table are."""
    asked = ready.asked
    tried = ", ".join(dict.fromkeys(describe(a) for d in ready.defences for a in d.attacks))
    finest = asked.upper / 2**asked.halvings
    print(
        f"\nLength in {asked.norm} of the smallest perturbation found with which at least {100 * asked.rate:g} % of "
        f"an image's purifications fail; tried: {tried}.\nUpper bounds: a stronger attack may need less. Radii are "
        f"multiples of {finest:.4g}; 'more' is more than {asked.upper:g}."
    )
    print("'fails again': on purifications that chose nothing.\n")
    e = ready.request.asked
    if reduced({"preset": e.budget, **asdict(ready.request.budget)}, ready.request.known):
        print("This is a REDUCED budget: more steps may find less. Use --budget standard before quoting any.\n")


def show_dry_run(ready: Ready) -> None:
    """Print what the search would take at most."""
    e = ready.request.asked
    costs = dry_run(ready.defences, ready.samples, e.batch_size, ready.request.max_rows)
    seconds = (ready.asked.levels - 1) * sum(cost.seconds for cost in costs.values())
    print(f"{e.dataset}, {len(ready.samples)} samples; files, models and shapes are in order.")
    print(f"At most about {duration(seconds)} in one process.")
    if e.part:
        own, samples = len(ready.own(Ranks())), len(ready.samples)
        note_part(e.part, own, samples, seconds * own / samples)


def main(argv: list[str] | None = None, prog: str = "purify distortion") -> int:
    """Search and report; returns the exit status."""
    return guarded(parser(prog), run, argv)
