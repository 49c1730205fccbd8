"""``purify attack``, and ``benchmarks/run_autoattack.py``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from purify.attacks import Attack
from purify.attacks.base import NORMS
from purify.checks import check_count, check_unique, choose
from purify.cli.build import build_attacks, build_defences, known, resolve_budget
from purify.cli.options import parser
from purify.cli.shell import called, guarded, load_samples, resolve
from purify.evaluate import report
from purify.evaluate.budgets import Budget, reduced
from purify.evaluate.dryrun import dry_run, duration
from purify.evaluate.dryrun import table as dry_run_table
from purify.evaluate.finish import finish, run_config
from purify.evaluate.provenance import default_folder, environment
from purify.evaluate.ranks import join, leave
from purify.evaluate.records import RunFolder, check_folder
from purify.evaluate.runner import WORST_ONLY, Defence, Samples, check_together, evaluate
from purify.machine import set_threads
from purify.named import check_device
from purify.purification.defended import DefendedClassifier


def main(argv: list[str] | None = None, prog: str = "purify attack") -> int:
    """Attack, judge and report; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: argparse.Namespace, command: str) -> int:
    """Check everything, then attack, judge and report."""
    set_threads(args.threads)
    ranks, device = join(check_device(args.device))
    dataset = resolve(args)
    allowed = resolve_budget(args)
    if args.worst_only is not None:
        choose(args.worst_only, dict.fromkeys(WORST_ONLY), "criterion of --worst-only")
    choose(args.threat_model, dict.fromkeys(NORMS), "threat model")
    if args.eps is None and args.threat_model not in dataset.eps:
        raise ValueError(f"There is no usual {args.threat_model} radius for {args.dataset}; pass --eps.")
    eps = dataset.eps[args.threat_model] if args.eps is None else args.eps
    if args.max_rows is None:
        args.max_rows = 2048 if device.type == "cuda" else 256  # what its caches like
    attacks = build_attacks(args, allowed, eps)
    check_count(args.batch_size, "batch size")
    check_count(args.max_rows, "max-rows")
    samples = load_samples(args, allowed.n_examples, device)
    defences = build_defences(args, allowed, attacks, device)
    check_unique([d.name for d in defences], "defences", "name each purifier and noise level once")
    config = run_config(defences, samples, args.dataset, args.seed, args.batch_size, args.worst_only)
    if args.dry_run:
        check_together(defences, samples, args.seed)
        if args.out is not None:
            check_folder(args.out, config)
        return show_dry_run(defences, samples, args)
    name = f"{called(args)}-{args.purifier.replace(',', '+')}-{args.preset}"
    folder = RunFolder(args.out or default_folder(name, config), config, environment(device, command, ranks), ranks)
    if ranks.first:
        print(f"{args.dataset}, {args.threat_model} eps {eps:g}, {len(samples)} samples; records in {folder.path}")
    new = evaluate(folder, defences, samples, args.seed, args.batch_size, args.max_rows, worst_only=args.worst_only)
    if ranks.first:
        if not new:
            print("Nothing was left to attack; what follows is made from the records.")
        show(folder, defences, samples, args, allowed)
    leave()
    return 0


def show_dry_run(defences: list[Defence], samples: Samples, args: argparse.Namespace) -> int:
    """Print what the run would take."""
    costs = dry_run(defences, samples, args.batch_size, args.max_rows)
    print(f"{args.dataset}, {len(samples)} samples; files, models and shapes are in order.\n")
    print(dry_run_table(costs).to_string())
    total = sum(cost.seconds for cost in costs.values())
    print(f"\nAbout {duration(total)} in one process, attacks and judges; self-checks come on top.")
    return 0


def show(
    folder: RunFolder,
    defences: list[Defence],
    samples: Samples,
    args: argparse.Namespace,
    allowed: Budget,
) -> None:
    """Print the tables, write result.json and a picture for each purifier."""
    criterion = args.worst_only
    stated = {"preset": args.preset, **dataclasses.asdict(allowed)}
    purified = [d for d in defences if isinstance(d.model, DefendedClassifier)]
    finished = finish(folder, defences, samples, stated, args.max_rows)
    found, checks = finished.results, finished.checks
    failed = [check for check in checks if not check.passed]
    print(f"\n{finished.verdict}")
    print(f"  self-checks: {f'{len(failed)} of {len(checks)} FAILED, see below' if failed else 'all passed'}")
    for sentence in report.same_levels(folder, defences, samples):
        print(f"  {sentence}")
    print(f"\nAccuracy in %, {CRITERIA_TEXTS[criterion or 'mean'].format(allowed.judge_draws)}, [95 % interval]")
    print(report.table(found, criterion or "mean").to_string())
    if criterion is None:
        show_more(folder, found, purified, samples)
    print("\nself-checks:")
    for check in checks:
        verdict = "ok    " if check.passed else "FAILED"
        value = "not asked" if check.value is None else f"{check.value:.3f}"
        print(f"{verdict} {check.defence}: {check.name}: {value} (limit {check.limit:g})")
        if not check.passed:
            print(f"       {check.meaning}")
    attacks = dict.fromkeys(describe(a) for d in purified for a in d.attacks)
    exact = all(getattr(d.model.purifier, "exact", False) for d in purified)
    gradient = f"{args.gradient} gradient, {'exact' if exact else 'APPROXIMATE: a stronger attack exists'}"
    print(f"\nBudget: {', '.join(attacks)} ({args.preset}); {gradient}.")
    if reduced(stated, known(args)):
        print(
            "This is a REDUCED budget: a stronger attack may bring these numbers lower. Use --budget standard or "
            "paper before quoting any."
        )
    pictures = [report.figure(folder, d, defences[0].model, samples) for d in purified]
    print(f"Wrote {', '.join(str(p) for p in (finished.file, *pictures) if p)}.")


CRITERIA_TEXTS = {
    "mean": "mean over {} fresh purifications per image",
    "any_of_r": "right in every one of {} fresh purifications",
    "majority": "right by majority of {} fresh purifications",
}


def show_more(folder: RunFolder, found: dict[str, dict[str, Any]], purified: list[Defence], samples: Samples) -> None:
    """The stricter criteria, and noise levels where they vary."""
    part = {d.name: found[d.name] for d in purified}
    for criterion, text in (("any_of_r", "right in every one of them"), ("majority", "right by majority")):
        print(f"\n{text}:\n{report.table(part, criterion).to_string()}")
    if any(d.model.level_varies for d in purified):
        print(f"\nmean t*:\n{report.level_table(folder, purified, samples).to_string()}")


def describe(attack: Attack) -> str:
    """An attack's name with its budget."""
    parts = attack.budget()
    restarts = f", {parts['restarts']} restarts" if parts.get("restarts", 1) > 1 else ""
    if "steps" not in parts and "queries" not in parts:
        return attack.label
    if "queries" in parts:
        return f"{attack.label} {parts['queries']} queries"
    return f"{attack.label} {parts['steps']} steps x EOT {parts['eot']}{restarts}"
