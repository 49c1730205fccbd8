"""The command line of ``benchmarks/run_autoattack.py``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import purify
from purify import zoo
from purify.attacks import ATTACKS, PGD, Attack, AutoAttackRand, NormPGD, RandomNoise, Square, SurrogatePGD
from purify.attacks.base import NORMS
from purify.checkpoints import default_score_model
from purify.checks import check_count, choose
from purify.data import DATASETS, load_dataset
from purify.defended import AGGREGATES, DefendedClassifier
from purify.evaluate import report
from purify.evaluate.budgets import PRESETS, Budget, budget
from purify.evaluate.dryrun import dry_run, duration
from purify.evaluate.dryrun import table as dry_run_table
from purify.evaluate.models import check_device, fingerprint, load_calibration, load_classifier, load_score
from purify.evaluate.ranks import Ranks, join, leave, set_threads
from purify.evaluate.records import RunFolder, check_folder
from purify.evaluate.runner import WORST_ONLY, Defence, Samples, evaluate, results, worst_only_results
from purify.evaluate.selfchecks import self_checks
from purify.evaluate.usual import usual, usual_tau
from purify.gradients import ENGINES, Checkpoint, Full, Surrogate
from purify.levels import LEVELS, TAU_UNITS, Constant, NoiseLevel, SSNILinear, SSNISigmoid
from purify.plans import FixedDt
from purify.presets import PURIFIERS
from purify.purifier import DEFAULT_ENGINE
from purify.resize import needs_resize
from purify.reverse import REVERSE_RULES
from purify.score import ScoreModel

SHARED_OPTIONS = ("score_model", "t_star", "steps", "reverse", "gradient")  # these have options of their own

EXAMPLES = """examples:
  %(prog)s                                     the demo: digits, reduced budget
  %(prog)s --preset standard                   the same with an attack worth quoting
  %(prog)s --dataset fashion_mnist --t-star 0.15 --preset standard
  %(prog)s --noise-level ssni-l,ssni-n --t-star 0.25 --ssni-tau 2
  %(prog)s --purifier diffpure,gdmp,agdm --noise-level constant,ssni-n --set gdmp.scale=300
  %(prog)s --attacks pgd-eot,bpda-eot,autoattack-rand --threat-model L2 --eps 1
  %(prog)s --dataset cifar10 --model Standard --score-model score-sde-cifar10 --preset paper --device cuda
"""


def parser() -> argparse.ArgumentParser:
    """All options, in groups."""
    p = argparse.ArgumentParser(
        prog="benchmarks/run_autoattack.py",
        description="Attack a purified classifier through exact gradients and report what holds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    g = p.add_argument_group("what is attacked")
    g.add_argument("--dataset", default="digits", help=f"one of {', '.join(DATASETS)} (default: digits)")
    g.add_argument("--data-dir", type=Path, help="folder with the data set's files")
    g.add_argument(
        "--model",
        help="zoo name, RobustBench name, or file.py:function (default: DATASET-standard, or RobustBench's Standard)",
    )
    g.add_argument("--n-examples", type=int, help="test images to attack")
    g = p.add_argument_group("defence")
    g.add_argument(
        "--purifier",
        default="diffpure",
        help=f"comma-separated: {', '.join(PURIFIERS)}; ssni-l and ssni-n are diffpure at that noise level "
        "(default: diffpure)",
    )
    g.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[PURIFIER.]NAME=VALUE",
        help="a parameter of the purifier, e.g. scale=300, or gdmp.rounds=2 where there are several; may be repeated",
    )
    g.add_argument("--score-model", help="name or path, as for load_score_model (default: the data set's)")
    g.add_argument("--t-star", type=float, help="noise level in (0, 1] (default: the data set's usual one)")
    g.add_argument(
        "--noise-level",
        help=f"comma-separated: {', '.join(LEVELS)} (default: constant, on embedded data also ssni-l)",
    )
    g.add_argument("--calibration", type=Path, help="JSON of `purify calibrate` for SSNI (default: the embedded one)")
    g.add_argument("--ssni-bias", type=float, default=0.0, help="b, added to the level (default: 0)")
    g.add_argument("--ssni-t-max", type=float, help="greatest level (default: t* + b)")
    g.add_argument("--ssni-tau", type=float, help="temperature of ssni-n (default: 1 std; on CIFAR-10 20 norm)")
    g.add_argument("--tau-unit", help=f"unit of tau: {', '.join(TAU_UNITS)} (default: that of tau's default)")
    g.add_argument("--steps", type=int, help="reverse steps (default: 10 on embedded data, otherwise --dt 1e-3)")
    g.add_argument(
        "--dt",
        type=float,
        help="step length: t* then decides how many steps run, instead of --steps; half of --max-rows at a time",
    )
    g.add_argument(
        "--reverse",
        help=f"one of {', '.join(REVERSE_RULES)} (default: ddpm; for diffpure on other than embedded data sde)",
    )
    g.add_argument("--purifications", type=int, default=1, help="purifications per answer (default: 1)")
    g.add_argument("--aggregate", default="logits", help=f"how they are combined: {', '.join(AGGREGATES)}")
    g = p.add_argument_group("threat and attack")
    g.add_argument("--threat-model", default="Linf", help=f"one of {', '.join(NORMS)} (default: Linf)")
    g.add_argument("--eps", type=float, help="radius (default: the data set's usual one)")
    g.add_argument(
        "--attacks",
        default="random-noise,pgd-eot,pgd-eot-constant-t,pgd-eot-norm,pgd-eot-guide",
        help=f"comma-separated: {', '.join(ATTACKS)}; or strongest: all (default: %(default)s; each where it applies)",
    )
    g.add_argument(
        "--norm-weights", default="0.3", help="comma-separated weights of pgd-eot-norm (default: %(default)s)"
    )
    g.add_argument(
        "--gradient", default="checkpoint", help=f"one of {', '.join(ENGINES)} (default: checkpoint, which is exact)"
    )
    g.add_argument(
        "--memory-budget", type=int, help="bytes of step graphs that full or checkpoint may keep (checkpoint: 1 GiB)"
    )
    g.add_argument("--surrogate-steps", type=int, default=5, help="steps of surrogate gradients (default: 5)")
    g = p.add_argument_group("budget (a preset, or its parts)")
    g.add_argument("--preset", default="quick", help=f"one of {', '.join(PRESETS)} (default: quick)")
    g.add_argument("--attack-steps", type=int, help="gradient steps of every attack")
    g.add_argument("--eot", type=int, help="draws per gradient of every attack")
    g.add_argument("--restarts", type=int, default=1, help="random restarts of PGD (default: 1)")
    g.add_argument("--judge-draws", type=int, help="fresh purifications that judge each image")
    g.add_argument(
        "--worst-only",
        metavar="CRITERION",
        help=f"report the worst case under one of {', '.join(WORST_ONLY)} only: broken samples meet no further attack",
    )
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="keys all randomness (default: 0)")
    g.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    g.add_argument("--batch-size", type=int, default=64, help="samples attacked at once (default: 64)")
    g.add_argument("--max-rows", type=int, help="images times draws in the model at once (default: CPU 256, GPU 2048)")
    g.add_argument("--threads", type=int, help="CPU threads for torch")
    g.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate time and memory, and stop before any attack"
    )
    g.add_argument("--out", type=Path, help="folder of the run; the same command resumes (default: below runs/)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status. Bad input is one line on stderr and status 2."""
    args = parser().parse_args(argv)
    try:
        return run(args, shlex.join(sys.argv[1:] if argv is None else argv))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk, the same command resumes", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, command: str) -> int:
    """Check everything, then attack, judge and report."""
    set_threads(args.threads)
    ranks, device = join(check_device(args.device))
    dataset = choose(args.dataset, DATASETS, "data set")
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
    name = f"{args.dataset}-{args.purifier.replace(',', '+')}-{args.preset}"
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
    checks = [check for d in purified for check in self_checks(folder, d, samples, args.seed, criterion is None)]
    stored = [dataclasses.asdict(check) for check in checks]
    context = {"budget": stated, "self_checks": stored, "sessions": folder.sessions}
    report.write_result(folder.path / "result.json", found, defences, context)
    print(f"\nAccuracy in %, {CRITERIA_TEXTS[criterion or 'mean'].format(allowed.judge_draws)}, [95 % interval]")
    print(report.table(found, criterion or "mean").to_string())
    if criterion is None:
        show_more(folder, found, purified, samples)
    print("\nself-checks:")
    for check in checks:
        verdict = "ok    " if check.passed else "FAILED"
        print(f"{verdict} {check.defence}: {check.name}: {check.value:.3f} (limit {check.limit:g})")
        if not check.passed:
            print(f"       {check.meaning}")
    attacks = dict.fromkeys(describe(a) for d in purified for a in d.attacks)
    exact = all(getattr(d.model.purifier, "exact", False) for d in purified)
    gradient = f"{args.gradient} gradient, {'exact' if exact else 'APPROXIMATE: a stronger attack exists'}"
    print(f"\nBudget: {', '.join(attacks)} ({args.preset}); {gradient}.")
    if args.preset == "quick":
        print(
            "This is a REDUCED budget: a stronger attack may bring these numbers lower. Use --preset standard or "
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


def resolve_budget(args: argparse.Namespace) -> Budget:
    """The preset for the data set, with the user's changes."""
    asked = {
        "steps": args.attack_steps,
        "autoattack_steps": args.attack_steps,
        "eot": args.eot,
        "autoattack_eot": args.eot,
        "n_examples": args.n_examples,
        "judge_draws": args.judge_draws,
    }
    chosen = dataclasses.replace(budget(args.preset, args.dataset), **{k: v for k, v in asked.items() if v is not None})
    check_count(chosen.n_examples, "n-examples")
    check_count(chosen.judge_draws, "judge draws")
    return chosen


def build_attacks(args: argparse.Namespace, allowed: Budget, eps: float) -> list[Attack]:
    """The attacks named on the command line; ``strongest`` stands for all."""
    names = ",".join(ATTACKS) if args.attacks.strip() == "strongest" else args.attacks
    return [
        attack
        for name in names.split(",")
        for attack in build_attack(choose(name.strip(), ATTACKS, "attack"), args, allowed, eps)
    ]


def build_attack(kind: type[Attack], args: argparse.Namespace, allowed: Budget, eps: float) -> list[Attack]:
    """One attack, or one for each weight of the norm attack."""
    if kind is RandomNoise:
        return [kind(args.threat_model, eps)]
    if issubclass(kind, Square):
        return [kind(args.threat_model, eps, queries=allowed.queries)]
    if issubclass(kind, AutoAttackRand):
        return [kind(args.threat_model, eps, steps=allowed.autoattack_steps, eot=allowed.autoattack_eot)]
    assert issubclass(kind, PGD)
    options = {"steps": allowed.steps, "eot": allowed.eot, "restarts": args.restarts, "max_rows": args.max_rows}
    if issubclass(kind, SurrogatePGD):
        options["surrogate_steps"] = args.surrogate_steps
    if issubclass(kind, NormPGD):
        weights = numbers(args.norm_weights, "norm-weights")
        return [kind(args.threat_model, eps, **options, norm_weight=w) for w in weights]
    return [kind(args.threat_model, eps, **options)]


def numbers(text: str, what: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{what} takes numbers separated by commas, got {text!r}.") from error


def build_level(name: str, t_star: float, args: argparse.Namespace) -> NoiseLevel:
    """The noise level of this name with the parameters of the command line."""
    kind = choose(name, LEVELS, "noise level")
    if kind is Constant:
        return Constant(t_star)
    calibration = load_calibration(args.calibration, args.score_model or args.dataset)
    if issubclass(kind, SSNISigmoid):
        tau, unit = usual_tau(args.dataset)
        tau, unit = (tau if args.ssni_tau is None else args.ssni_tau), args.tau_unit or unit
        return kind(t_star, calibration, args.ssni_bias, t_max=args.ssni_t_max, tau=tau, tau_unit=unit)
    assert issubclass(kind, SSNILinear)
    return kind(t_star, calibration, args.ssni_bias, t_max=args.ssni_t_max)


def build_plan(args: argparse.Namespace, published: bool) -> int | FixedDt:
    """Reverse steps as the command line says; without, few on embedded data and DiffPure's dt elsewhere."""
    if args.steps is not None and args.dt is not None:
        raise ValueError("--steps and --dt exclude each other; give one.")
    if args.dt is None and (args.steps is not None or not published):
        return 10 if args.steps is None else args.steps
    return FixedDt(1e-3 if args.dt is None else args.dt, batch=max(1, args.max_rows // 2))


def purifier_options(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What --set says of this purifier, on top of what is usual on the data set."""
    preset = choose(name, PURIFIERS, "purifier")
    known = [p for p in inspect.signature(preset).parameters if p not in SHARED_OPTIONS]
    options = dict(usual(name, args.dataset))
    for text in args.set:
        key, separator, value = text.partition("=")
        purifier, _, option = key.rpartition(".")
        if not separator or (purifier and purifier not in args.purifier.split(",")):
            raise ValueError(
                f"--set takes NAME=VALUE or PURIFIER.NAME=VALUE, with a purifier of this run, got {text!r}."
            )
        if purifier not in ("", name):
            continue
        unknown = option not in known and "options" not in known
        if unknown or option in SHARED_OPTIONS or option == "kind":
            raise ValueError(f"{name} has no parameter {option!r} for --set; known: {', '.join(known) or 'none'}.")
        options[option] = plain_value(value)
    return options


def plain_value(text: str) -> Any:
    """A number, list, true or false as JSON or Python write them; anything else is the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def usual_level(purifier: str, options: dict[str, Any], args: argparse.Namespace) -> float:
    """t*: of the command line, usual on the data set, or the purifier's own; taken out of ``options``."""
    usual = options.pop("t_star", None)
    if args.t_star is not None:
        return args.t_star
    if usual is not None:
        return usual
    if purifier == "diffpure":
        return DATASETS[args.dataset].t_star
    return inspect.signature(PURIFIERS[purifier]).parameters["t_star"].default


def build_purified(
    purifier: str,
    name: str,
    bare: nn.Module,
    score_model: ScoreModel,
    args: argparse.Namespace,
    allowed: Budget,
    attacks: list[Attack],
) -> Defence:
    """The classifier behind ``purifier`` with the noise level ``name``."""
    options = purifier_options(purifier, args)
    level = build_level(name, usual_level(purifier, options, args), args)
    published = args.dataset not in zoo.calibrations()
    reverse = args.reverse or ("sde" if published and purifier == "diffpure" else "ddpm")
    plan = build_plan(args, published)
    built = PURIFIERS[purifier](score_model, level, plan, reverse, gradient_config(args), **options)
    if needs_resize(DATASETS[args.dataset].shape, score_model.image_shape):
        built = built.with_resize()
    device = next(score_model.parameters()).device
    model = DefendedClassifier(bare, built, args.purifications, args.aggregate).to(device)
    applicable = [a for a in attacks if a.applies_to(model)]
    title = f"{purifier} {name}" if level.varies else purifier
    if not applicable:
        raise ValueError(f"None of the attacks {args.attacks} says anything about {title}; add pgd-eot.")
    networks = {"classifier": fingerprint(bare), "score_model": score_model.fingerprint()}
    config = {**model.config(), **networks, "exact": built.exact}
    return Defence(title, model, applicable, allowed.judge_draws, config)


def build_defences(
    args: argparse.Namespace, allowed: Budget, attacks: list[Attack], device: torch.device
) -> list[Defence]:
    """Undefended, purified, and the adversarially trained baseline where there is one."""
    standard = f"{args.dataset}-standard"
    default = standard if standard in zoo.names("classifier") else "Standard"
    bare = load_classifier(args.model or default, args.dataset, args.threat_model).to(device)
    score_model = load_score(args.score_model or default_score_model(args.dataset)).to(device)
    embedded = args.dataset in zoo.calibrations() and args.score_model is None
    names = (args.noise_level or ("constant,ssni-l" if embedded else "constant")).split(",")
    pairs = [
        (purifier, level)
        for p in map(str.strip, args.purifier.split(","))
        for purifier, level in ([("diffpure", p)] if p in LEVELS else [(p, n.strip()) for n in names])
    ]
    purified = [build_purified(p, n, bare, score_model, args, allowed, attacks) for p, n in pairs]
    once = [a.on_deterministic() for a in attacks if a.applies_to(bare)]
    if not any(isinstance(a, PGD) for a in once):
        once.append(PGD(attacks[0].norm, attacks[0].eps, steps=allowed.steps, eot=1))
    defences = [Defence("undefended", bare, once, 1, {"classifier": fingerprint(bare)}), *purified]
    baseline = f"{args.dataset}-at"
    if baseline in zoo.names("classifier") and args.model is None:
        trained = zoo.classifier(baseline).to(device)
        defences.append(Defence("adversarial training", trained, once, 1, {"classifier": fingerprint(trained)}))
    return defences


def gradient_config(args: argparse.Namespace) -> dict[str, Any]:
    """The gradient engine named on the command line, with its parameters."""
    engine = choose(args.gradient, ENGINES, "gradient engine")
    config: dict[str, Any] = {"kind": args.gradient}
    if args.memory_budget is not None and engine not in (Full, Checkpoint):
        raise ValueError(f"--memory-budget is for --gradient full or checkpoint, not {args.gradient}.")
    if engine is Surrogate:
        config["steps"] = args.surrogate_steps
    elif args.memory_budget is not None:
        config["memory_budget"] = args.memory_budget
    elif engine is Checkpoint:
        config["memory_budget"] = DEFAULT_ENGINE.memory_budget
    return config


def fingerprint_of_samples(samples: Samples) -> str:
    """sha256 over images and labels."""
    digest = hashlib.sha256(samples.images.cpu().numpy().tobytes())
    digest.update(samples.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_samples(args: argparse.Namespace, n: int, device: torch.device) -> Samples:
    """The first ``n`` test images with their positions as ids."""
    images, labels = load_dataset(args.dataset, "test", args.data_dir)
    if n > len(images):
        raise ValueError(f"{args.dataset} has {len(images)} test images; --n-examples {n} is too many.")
    return Samples(images[:n].to(device), labels[:n].to(device), torch.arange(n))


def default_folder(name: str, config: dict[str, Any]) -> Path:
    """A folder below runs/ that only this configuration has."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{name}-{digest}"


def environment(device: torch.device, command: str, ranks: Ranks) -> dict[str, Any]:
    """Versions, revision, device and command, for the manifest."""
    names = ["torch", "torchvision", "numpy", "scipy", "scikit-learn", "torchdiffeq", "diffusers", "torchattacks"]
    names += ["statsmodels", "robustbench", "pyautoattack", "autoattack"]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "purify": purify.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world,
    }


def git_revision() -> str | None:
    """Revision of the checkout that runs, with ``+`` if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")
