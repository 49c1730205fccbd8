"""``purify attack``, and ``benchmarks/run_autoattack.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purify.attacks import Attack
from purify.attacks.threats import stated
from purify.cli.parsing import Parser, describe_parser, described
from purify.cli.shell import guarded, note_data, note_part, note_shard
from purify.diffusion.precision import FLOAT32
from purify.evaluate import report
from purify.evaluate.attacking import Prepared, prepare
from purify.evaluate.budgets import reduced
from purify.evaluate.curve import Curve, measure, prepare_curve
from purify.evaluate.curve import table as curve_table
from purify.evaluate.description import Evaluation
from purify.evaluate.dryrun import Cost, duration
from purify.evaluate.dryrun import table as dry_run_table
from purify.evaluate.finish import Finished
from purify.evaluate.protocols import shown
from purify.evaluate.protocols.measure import Measured, planned, purified
from purify.evaluate.ranks import leave
from purify.evaluate.recipes import RECIPES
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples
from purify.purification.blackbox import BlackBox
from purify.purification.calls import calls
from purify.purification.defended import DefendedClassifier

EXAMPLES = """examples:
  %(prog)s                                     the demo: digits, reduced budget
  %(prog)s --budget standard                   the same with an attack worth quoting
  %(prog)s --data fashion_mnist --t-star 0.15 --budget standard
  %(prog)s --noise-level ssni-l,ssni-n --t-star 0.25 --set tau=2
  %(prog)s --purifier diffpure,gdmp,agdm --noise-level constant,ssni-n --set gdmp.scale=300
  %(prog)s --attacks pgd-eot,bpda-eot,autoattack-rand --threat-model L2 --eps 1
  %(prog)s --data cifar10 --model Standard --score-model score-sde-cifar10 --budget paper --device cuda
  %(prog)s --recipe lee-kim-cifar10-linf --score-model score-sde-cifar10 --device cuda
  %(prog)s --eps 0.05,0.1,0.2,0.3              accuracy against eps, with a plot
  %(prog)s --attacks pgd-eot@3,apgd-targeted   at class 3; at the likeliest wrong classes in turn
  %(prog)s --config runs/NAME/run.yaml         the same run again
"""


def parser(prog: str = "purify attack") -> Parser:
    """All options of :class:`Evaluation`, in groups."""
    p = describe_parser(
        Evaluation, prog, "Attack a purified classifier through exact gradients and report what holds.", EXAMPLES
    )
    known = ", ".join(RECIPES)
    p.add_argument("--recipe", metavar="NAME", help=f"a paper's evaluation; other options change parts of it: {known}")
    p.recipes = {name: recipe.options for name, recipe in RECIPES.items()}
    p.add_argument(
        "--check",
        action="store_true",
        help="check options, files, models and shapes, and stop; neither memory nor speed of this machine matters",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate time and memory, and stop before any attack"
    )
    return p


def main(argv: list[str] | None = None, prog: str = "purify attack") -> int:
    """Attack, judge and report; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: Any, command: str) -> int:
    """Check everything, then attack, judge and report."""
    asked = described(Evaluation, args)
    if asked.several:
        return run_curve(asked, args, command)
    prepared = prepare(asked)
    request = prepared.request
    if prepared.ranks.first:
        note_data(asked, request.data)
        if prepared.chosen:
            print(f"precision auto: {prepared.chosen}")
    if ends_before(args, prepared):
        return 0
    with prepared.open(command) as folder:
        if prepared.ranks.first:
            threat = stated(asked.threat_model, request.eps, " eps ")
            print(f"{asked.dataset}, {threat}, {len(prepared.samples)} samples; records in {folder.path}")
        new = prepared.attack(folder)
        if prepared.ranks.first and asked.part:
            note_shard(asked.part, folder)
        found = {} if asked.part else prepared.protocols(folder)
        if prepared.ranks.first and not asked.part:
            if not new:
                print("Nothing was left to attack; what follows is made from the records.")
            show(prepared, folder, prepared.finish(folder, protocols=found))
            show_published(args.recipe)
    leave()
    return 0


def run_curve(asked: Evaluation, args: Any, command: str) -> int:
    """The same at each of several eps, and what they come to together."""
    curve = prepare_curve(asked)
    ranks, eps = curve.largest.ranks, ", ".join(f"{e:g}" for e in curve.eps)
    if ranks.first:
        note_data(asked, curve.largest.request.data)
    if ends_before(args, curve.at(curve.eps[-1]), len(curve.eps)):
        return 0
    if ranks.first:
        samples = len(curve.largest.samples)
        print(f"{asked.dataset}, {asked.threat_model} eps {eps}, {samples} samples; a run for each in {curve.path}")
    if asked.part:
        for e in curve.eps:
            one = curve.at(e)
            with one.open(command) as folder:
                one.attack(folder)
        if ranks.first:
            print(f"Shard {asked.part} is finished at every eps; once all are: purify merge {curve.path}")
    else:
        found = measure(curve, command, each=show_radius)
        if found is not None:
            show_curve(found, asked)
            show_budget(curve.largest)
            show_published(args.recipe)
    leave()
    return 0


def show_radius(prepared: Prepared, folder: RunFolder, finished: Finished) -> None:
    """What one eps of a curve came to, with the pictures that a run at it alone has."""
    print(f"\n{finished.verdict}")
    show_targeted(finished.results)
    show_protocols(finished.protocols)
    failed = [check for check in finished.checks if not check.passed]
    for check in failed:
        print(f"  FAILED {check.defence}: {check.name}: {check.meaning}")
    print(f"  self-checks: {f'{len(failed)} of {len(finished.checks)} FAILED' if failed else 'all passed'}; "
          f"wrote {', '.join(map(str, [finished.file, *draw_pictures(prepared, folder, finished)]))}")  # fmt: skip


def show_curve(found: Curve, asked: Evaluation) -> None:
    """The table of a curve, and where it is not monotone."""
    criterion = CRITERIA_TEXTS[asked.worst_only or "mean"].format("all")
    print(f"\nAccuracy in % in the worst case, {criterion}, [95 % interval]; eps 0: clean images")
    print(curve_table(found.points).to_string())
    for rise in found.rises:
        print(f"{'WARNING' if rise.certain else 'note'}: {rise}")
    print(f"Wrote {found.file}, {found.picture}.")


def ends_before(args: Any, prepared: Prepared, runs: int = 1) -> bool:
    """Whether a check or a dry run was asked for, which end before any attack; the first process shows it."""
    if prepared.ranks.first and args.dry_run:
        show_dry_run(prepared, runs)
    elif prepared.ranks.first and args.check:
        prepared.check_out()
        show_checked(prepared)
    return bool(args.dry_run or args.check)


def show_checked(prepared: Prepared) -> None:
    """Say what was looked at when it was prepared."""
    print(f"{prepared.request.asked.dataset}, {len(prepared.samples)} samples; files, models and shapes are in order.")
    for d in prepared.defences:
        if isinstance(d.model, DefendedClassifier) and d.model.purifier.resize:
            height, width = prepared.samples.images.shape[2:]
            shape = d.model.purifier.score_model.image_shape
            assert shape is not None
            print(f"{d.name}: images of {height}x{width} are resized to the score model's {shape[1]}x{shape[2]}.")


def show_dry_run(prepared: Prepared, runs: int = 1) -> None:
    """Print what it would take, and so many runs of its kind; of a shard, too, for which protocols wait."""
    costs = prepared.dry_run()
    asked = prepared.request.asked
    show_checked(prepared)
    for name, found in prepared.health().items():
        print(f"{name}: {found.sentence}" if found.passed else f"WARNING: {name}: {found.sentence}")
    print(f"\n{dry_run_table(costs).to_string()}")
    total = sum(cost.seconds for cost in costs.values())
    print(f"\nAbout {duration(total)} in one process, attacks and judges; self-checks come on top.")
    more = 0.0
    if prepared.protocol_names:
        more = protocol_seconds(prepared, costs)
        print(f"Protocols: about {duration(more)} more.")
    if runs > 1:
        print(f"That is for one eps; all {runs} take about {duration(runs * (total + more))}.")
    if asked.part:
        own, samples = len(prepared.own()), len(prepared.samples)
        note_part(asked.part, own, samples, runs * total * own / samples)


def protocol_seconds(prepared: Prepared, costs: Mapping[str, Cost]) -> float:
    """What the protocols will take, by the time of a forward pass of each defence."""
    total = 0.0
    for d in purified(prepared.defences):
        passes = planned(prepared.protocol_names, d, prepared.effort) / calls(d.model).forward
        total += passes * costs[d.name].forward * len(prepared.samples)
    return total


def show(prepared: Prepared, folder: RunFolder, finished: Finished) -> None:
    """Print the tables, and draw a picture for each purifier."""
    asked, samples, defences = prepared.request.asked, prepared.samples, prepared.defences
    criterion = asked.worst_only
    failed = sum(not check.passed for check in finished.checks)
    print(f"\n{finished.verdict}")
    print(f"  self-checks: {f'{failed} of {len(finished.checks)} FAILED, see below' if failed else 'all passed'}")
    for sentence in report.same_levels(folder, defences, samples):
        print(f"  {sentence}")
    draws = prepared.request.budget.judge_draws
    print(f"\nAccuracy in %, {CRITERIA_TEXTS[criterion or 'mean'].format(draws)}, [95 % interval]")
    print(report.table(finished.results, criterion or "mean").to_string())
    if criterion is None:
        show_more(folder, finished.results, purified(defences), samples)
    show_targeted(finished.results)
    show_protocols(finished.protocols)
    show_checks(finished)
    show_budget(prepared)
    print(f"Wrote {', '.join(map(str, [finished.file, *draw_pictures(prepared, folder, finished)]))}.")


def draw_pictures(prepared: Prepared, folder: RunFolder, finished: Finished) -> list[Path]:
    """Images of each purifier before and after, and the plots of protocols that have one."""
    bare = prepared.defences[0].model
    found = [report.figure(folder, d, bare, prepared.samples) for d in purified(prepared.defences)]
    found += [shown.draw(folder.path, name, measured.points) for name, measured in finished.protocols.items()]
    return [path for path in found if path]


CRITERIA_TEXTS = {
    "mean": "mean over {} fresh purifications per image",
    "any_of_r": "right in every one of {} fresh purifications",
    "majority": "right by majority of {} fresh purifications",
}


def show_more(folder: RunFolder, found: dict[str, dict[str, Any]], defences: list[Defence], samples: Samples) -> None:
    """The stricter criteria, and noise levels where they vary, of purified ``defences``."""
    part = {d.name: found[d.name] for d in defences}
    for criterion, text in (("any_of_r", "right in every one of them"), ("majority", "right by majority")):
        print(f"\n{text}:\n{report.table(part, criterion).to_string()}")
    if any(d.model.level_varies for d in defences):
        print(f"\nmean t*:\n{report.level_table(folder, defences, samples).to_string()}")


def show_targeted(found: Mapping[str, Mapping[str, Any]]) -> None:
    """How often attacks at one class got it."""
    rows = [(name, s, row["targeted"]) for name, stages in found.items() for s, row in stages.items()
            if "targeted" in row]  # fmt: skip
    if rows:
        print("\nAnswers that are the class aimed at, in %, of images of other classes, [95 % interval]")
        for name, stage, share in rows:
            print(f"{name}, {stage}: {str(share).strip()}")


def show_protocols(found: Mapping[str, Measured]) -> None:
    """What each number means, if protocols were asked for, and what they took."""
    if not found:
        return
    print("\nWhat the number means: accuracy and clean control in %, [95 % interval]; network calls per image")
    for name, lines in shown.table(found).groupby(level="defence", sort=False):
        print(f"\n{name}\n{lines.droplevel('defence').to_string()}")
    print("\n" + "\n".join(shown.costs(found)))


def show_published(recipe: str | None) -> None:
    """The numbers of the paper whose recipe this is."""
    if recipe is None:
        return
    chosen = RECIPES[recipe]
    print(f"\nPublished, not re-measured ({recipe}; not as published: {chosen.differs}):")
    for p in chosen.published:
        clean = "" if p.clean is None else f", {p.clean:.2f} clean"
        print(f"  {p.defence}, {p.classifier}: {p.robust:.2f}{clean}; {p.means} ({p.source})")


def show_checks(finished: Finished) -> None:
    """One line for each self-check, and what a failure means."""
    print("\nself-checks:")
    for check in finished.checks:
        verdict = "ok    " if check.passed else "FAILED"
        value = "not asked" if check.value is None else f"{check.value:.3f}"
        print(f"{verdict} {check.defence}: {check.name}: {value} (limit {check.limit:g})")
        if not check.passed:
            print(f"       {check.meaning}")


def show_budget(prepared: Prepared) -> None:
    """What the attacks were allowed, and whether that is enough to be quoted."""
    asked = prepared.request.asked
    attacks = dict.fromkeys(describe(a) for d in purified(prepared.defences) for a in d.attacks)
    if asked.model_gradient == "none":
        gradient = "no gradient"
    else:
        models = [d.model for d in prepared.defences if isinstance(d.model, DefendedClassifier)]
        exact = all(m.purifier.exact and not isinstance(m.classifier, BlackBox) for m in models)
        gradient = f"{asked.gradient} gradient, {'exact' if exact else 'APPROXIMATE: a stronger attack exists'}"
    half = "" if asked.precision == FLOAT32 else f", in {asked.precision}; judged in float32"
    print(f"\nBudget: {', '.join(attacks)} ({asked.budget}); {gradient}{half}.")
    if reduced(prepared.stated, prepared.request.known):
        print(
            "This is a REDUCED budget: a stronger attack may bring these numbers lower. Use --budget standard or "
            "paper before quoting any."
        )


def describe(attack: Attack) -> str:
    """An attack's name with its budget."""
    parts = attack.budget()
    restarts = f", {parts['restarts']} restarts" if parts.get("restarts", 1) > 1 else ""
    for unit in ("calls", "queries"):
        if unit in parts:
            return f"{attack.label} {parts[unit]} {unit}"
    if "steps" not in parts:
        return attack.label
    goal = parts.get("goal", "")
    turns = "" if goal in attack.label else f", {goal}"  # of attacks whose name says that there is one
    return f"{attack.label} {parts['steps']} steps x EOT {parts['eot']}{restarts}{turns}"
