"""From the options of ``benchmarks/run_autoattack.py`` to attacks and defences."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from purify import zoo
from purify.attacks import (
    ATTACKS,
    PGD,
    Attack,
    NormAutoAttackRand,
    NormPGD,
)
from purify.checkpoints import default_score_model
from purify.checks import check_count, choose
from purify.cli.shell import numbers
from purify.data import DATASETS
from purify.diffusion.score import ScoreModel
from purify.evaluate.budgets import Budget, budget
from purify.evaluate.runner import UNDEFENDED, Defence
from purify.named import fingerprint, load_calibration, load_classifier, load_score
from purify.presets import SHARED, find_preset
from purify.purification.defended import DefendedClassifier
from purify.purification.gradients import ENGINES, Checkpoint, Full, Surrogate
from purify.purification.levels import LEVELS
from purify.purification.plans import FixedDt
from purify.purification.purifier import DEFAULT_ENGINE
from purify.wrap import build_purifier


def known(args: argparse.Namespace) -> str:
    """The built-in data set that is attacked, or whose networks and settings one's own data gets; "" if none."""
    return args.dataset if args.dataset in DATASETS else args.data.like or ""


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
    chosen = dataclasses.replace(budget(args.preset, known(args)), **{k: v for k, v in asked.items() if v is not None})
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
    """One attack with those of the budget's numbers that it has; or one for each weight of an attack on the norm."""
    published = (allowed.autoattack_steps, allowed.autoattack_eot)
    steps, eot = (allowed.steps, allowed.eot) if issubclass(kind, PGD) else published
    told = {
        "steps": steps,
        "eot": eot,
        "restarts": args.restarts,
        "max_rows": args.max_rows,
        "queries": allowed.queries,
        "surrogate_steps": args.surrogate_steps,
    }
    known = {f.name for f in dataclasses.fields(kind)}
    options = {name: value for name, value in told.items() if name in known}
    if kind in (NormPGD, NormAutoAttackRand):
        weights = numbers(args.norm_weights, "norm-weights")
        return [kind(args.threat_model, eps, **options, norm_weight=w) for w in weights]
    return [kind(args.threat_model, eps, **options)]


def level_options(name: str, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says of the noise level ``name``; ``given``: what --set says of it."""
    told = {"bias": args.ssni_bias, "t_max": args.ssni_t_max, "tau": args.ssni_tau, "tau_unit": args.tau_unit}
    own = choose(name, LEVELS, "noise level").parameters()
    found = {key: value for key, value in told.items() if value is not None and key in own}
    if "calibration" in own:
        found["calibration"] = load_calibration(args.calibration, args.score_model or known(args))
    return {**found, **given}


def build_pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Names of the purifiers of this run, each with a noise level.

    Raises:
        ValueError: unknown names, or a t* that none of the levels takes.
    """
    embedded = known(args) in zoo.calibrations() and args.score_model is None
    names = (args.noise_level or ("constant,ssni-l" if embedded else "constant")).split(",")
    pairs: list[tuple[str, str]] = []
    for purifier in map(str.strip, args.purifier.split(",")):
        level = find_preset(purifier)[1]
        pairs += [(purifier, n.strip()) for n in names] if level is None else [("diffpure", level)]
    taking = [name for _, name in pairs if "t_star" in choose(name, LEVELS, "noise level").parameters()]
    if args.t_star is not None and not taking:
        raise ValueError(f"{pairs[0][1]} has no t_star; leave --t-star out, see --set for its own parameters.")
    return pairs


def build_plan(args: argparse.Namespace) -> int | FixedDt | None:
    """Reverse steps as the command line says, if it does."""
    if args.steps is not None and args.dt is not None:
        raise ValueError("--steps and --dt exclude each other; give one.")
    return args.steps if args.dt is None else FixedDt(args.dt, batch=max(1, args.max_rows // 2))


def build_settings(args: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What --set says of each purifier and each noise level of this run, by their names; "": of every purifier."""
    names = sorted({name for pair in pairs for name in pair})
    found: dict[str, dict[str, Any]] = {name: {} for name in ["", *names]}
    for text in args.set:
        key, separator, value = text.partition("=")
        part, _, option = key.rpartition(".")
        if not separator or part not in found:
            raise ValueError(
                "--set takes NAME=VALUE, PURIFIER.NAME=VALUE or LEVEL.NAME=VALUE, with a purifier or noise level of "
                f"this run ({', '.join(names)}), got {text!r}."
            )
        found[part][option] = plain_value(value)
    return found


def purifier_options(name: str, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is ``given`` to this purifier, checked."""
    parameters = inspect.signature(find_preset(name)[0]).parameters.values()
    known = [p.name for p in parameters if p.name not in SHARED and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in given:
        if option in (*SHARED, "kind") or not (option in known or takes_any):
            raise ValueError(f"{name} has no parameter {option!r} for --set; known: {', '.join(known) or 'none'}.")
    return dict(given)


def plain_value(text: str) -> Any:
    """A number, list, true or false as JSON or Python write them; anything else is the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def build_purified(
    purifier: str,
    name: str,
    bare: nn.Module,
    score_model: ScoreModel,
    args: argparse.Namespace,
    allowed: Budget,
    attacks: list[Attack],
    given: Mapping[str, Mapping[str, Any]],
) -> Defence:
    """The classifier behind ``purifier`` with the noise level ``name``; ``given``: see :func:`build_settings`."""
    own = purifier_options(purifier, args, {**given[""], **given[purifier]})
    shared = {"t_star": args.t_star, "steps": build_plan(args), "reverse": args.reverse}
    options = {key: value for key, value in shared.items() if value is not None} | own
    built = build_purifier(
        purifier, score_model, known(args), args.threat_model, name, level_options(name, args, given[name]),
        gradient=gradient_config(args), shape=args.data.shape if hasattr(args, "data") else None, **options,
    )  # fmt: skip
    device = next(score_model.parameters()).device
    model = DefendedClassifier(bare, built, args.purifications, args.aggregate).to(device)
    applicable = [a for a in attacks if a.applies_to(model)]
    title = f"{purifier} {name}" if built.level.varies else purifier
    if not applicable:
        raise ValueError(f"None of the attacks {args.attacks} says anything about {title}; add pgd-eot.")
    weights = {**described(model_name(args), bare), "score_model": score_model.fingerprint()}
    config = {**model.config(), **weights, "exact": built.exact}
    return Defence(title, model, applicable, allowed.judge_draws, config)


def model_name(args: argparse.Namespace) -> str:
    """The classifier's name: of the command line, or usual on the data set."""
    standard = f"{known(args)}-standard"
    if args.model is None and args.dataset not in DATASETS:
        raise ValueError("Data of your own needs a classifier; pass --model, as file.py:function for one of your own.")
    return args.model or (standard if standard in zoo.names("classifier") else "Standard")


def described(name: str, classifier: nn.Module) -> dict[str, str]:
    """A classifier by name and weights, as manifests have it."""
    return {"model": name, "classifier": fingerprint(classifier)}


def build_defences(
    args: argparse.Namespace, allowed: Budget, attacks: list[Attack], device: torch.device
) -> list[Defence]:
    """Undefended, purified, and the adversarially trained baseline where there is one."""
    pairs = build_pairs(args)
    given = build_settings(args, pairs)
    bare = load_classifier(model_name(args), known(args), args.threat_model).to(device)
    score_model = load_score(args.score_model or default_score_model(known(args)), known(args)).to(device)
    purified = [build_purified(p, n, bare, score_model, args, allowed, attacks, given) for p, n in pairs]
    once = [a.on_deterministic() for a in attacks if a.applies_to(bare)]
    if not any(isinstance(a, PGD) for a in once):
        once.append(PGD(attacks[0].norm, attacks[0].eps, steps=allowed.steps, eot=1))
    defences = [Defence(UNDEFENDED, bare, once, 1, described(model_name(args), bare)), *purified]
    baseline = f"{known(args)}-at"
    if baseline in zoo.names("classifier") and args.model is None:
        trained = zoo.classifier(baseline).to(device)
        defences.append(Defence("adversarial training", trained, once, 1, described(baseline, trained)))
    return defences


def gradient_config(args: argparse.Namespace) -> dict[str, Any]:
    """The gradient engine named on the command line, with its parameters."""
    engine = choose(args.gradient, ENGINES, "gradient engine")
    config: dict[str, Any] = {"kind": args.gradient}
    if args.memory_budget is not None and engine not in (Full, Checkpoint, Surrogate):
        raise ValueError(f"--memory-budget is for --gradient full, checkpoint or surrogate, not {args.gradient}.")
    if engine is Surrogate:
        config["steps"] = args.surrogate_steps
    if args.memory_budget is not None:
        config["memory_budget"] = args.memory_budget
    elif engine is Checkpoint:
        config["memory_budget"] = DEFAULT_ENGINE.memory_budget
    return config
