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
from purify.evaluate.provenance import default_folder, environment, fingerprint_of_samples
from purify.evaluate.ranks import join, leave
from purify.evaluate.records import RunFolder, check_folder
from purify.evaluate.runner import WORST_ONLY, Defence, Samples, evaluate, results, worst_only_results
from purify.evaluate.selfchecks import self_checks
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
    config = {
        "dataset": args.dataset,
        "data": fingerprint_of_samples(samples),
        "n_examples": len(samples),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "worst_only": args.worst_only,
        "defences": {d.name: {**d.config, "draws": d.draws} for d in defences},
        "attacks": {d.name: [a.budget() for a in d.attacks] for d in defences},
    }
    if args.dry_run:
        if args.out is not None:
            check_folder(args.out, config)
        return show_dry_run(defences, samples, args)
    name = f"{called(args)}-{args.purifier.replace(',', '+')}-{args.preset}"
    folder = RunFolder(args.out or default_folder(name, config), config, environment(device, command, ranks), ranks)
    if ranks.first:
        print(f"{args.dataset}, {args.threat_model} eps {eps:g}, {len(samples)} samples; records in {folder.path}")
    evaluate(folder, defences, samples, args.seed, args.batch_size, args.max_rows, worst_only=args.worst_only)
    if ranks.first:
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
    found = (
        worst_only_results(folder, defences, samples, criterion) if criterion else results(folder, defences, samples)
    )
    stated = {"preset": args.preset, **dataclasses.asdict(allowed)}
    purified = [d for d in defences if isinstance(d.model, DefendedClassifier)]
    context = {"budget": stated, "sessions": folder.sessions}
    if not report.is_complete(folder.path / "result.json"):  # the checks may take long, or fail
        report.write_result(folder.path / "result.json", found, defences, context)
    checks = [c for d in defences for c in self_checks(folder, d, samples, args.seed, criterion is None, args.max_rows)]
    context["self_checks"] = [dataclasses.asdict(check) for check in checks]
    report.write_result(folder.path / "result.json", found, defences, context)
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
    print(f"Wrote {', '.join(str(p) for p in (folder.path / 'result.json', *pictures) if p)}.")


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
