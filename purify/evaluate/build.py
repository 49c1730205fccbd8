"""From a description of an evaluation to attacks and defences."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from purify import zoo
from purify.attacks import ATTACKS, PGD, Adaptive, Attack, NormAutoAttackRand, NormPGD, Square, find_attack, split_goal
from purify.attacks.threats import NORMS
from purify.checkpoints import default_score_model
from purify.data import DATASETS, Dataset
from purify.diffusion.classes import Predicted
from purify.diffusion.precision import FLOAT32
from purify.diffusion.score import ScoreModel
from purify.evaluate.budgets import Budget, budget
from purify.evaluate.description import Attacking
from purify.evaluate.precision import AUTO
from purify.evaluate.runner import UNDEFENDED, Defence
from purify.named import fingerprint, load_calibration, load_classifier, load_score
from purify.plugin import is_in_file
from purify.presets import SHARED, find_preset
from purify.purification.blackbox import BlackBox, BPDAClassifier
from purify.purification.defended import DefendedClassifier
from purify.purification.gradients import ENGINES, Checkpoint, Full, Surrogate
from purify.purification.levels import find_level
from purify.purification.plans import FixedDt
from purify.purification.purifier import DEFAULT_ENGINE
from purify.wrap import build_purifier

A = TypeVar("A", bound=Attacking)


@dataclass(frozen=True)
class Request(Generic[A]):
    """A description with what was looked up for it.

    Attributes:
        asked: the description.
        data: its data set.
        device: where everything runs.
    """

    asked: A
    data: Dataset
    device: torch.device

    @property
    def known(self) -> str:
        """See :meth:`~purify.evaluate.described.Description.known`."""
        return self.asked.known(self.data)

    @property
    def budget(self) -> Budget:
        """The named budget on the data set, with the user's changes."""
        e = self.asked
        asked = {
            "steps": e.attack_steps,
            "autoattack_steps": e.attack_steps,
            "eot": e.eot,
            "autoattack_eot": e.eot,
            "n_examples": e.n_examples,
            "judge_draws": e.judge_draws,
            "calls": e.calls,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        return dataclasses.replace(budget(e.budget, self.known), **changes)

    @property
    def eps(self) -> float:
        """The radius.

        Raises:
            ValueError: it is not given, and the data set has none that is usual; or there are several.
        """
        e = self.asked
        if e.eps is None and e.threat_model not in self.data.eps:
            raise ValueError(f"There is no usual {e.threat_model} radius for {e.dataset}; pass --eps.")
        if len(e.radii) > 1:
            raise ValueError("Several eps make a curve and no run; call its .curve(), or name one of them.")
        return self.data.eps[e.threat_model] if e.eps is None else e.radii[0]

    @property
    def listed(self) -> str:
        """Under which threat model RobustBench is asked for classifiers; beyond l_p those for L_inf."""
        return self.asked.threat_model if self.asked.threat_model in NORMS else "Linf"

    @property
    def max_rows(self) -> int:
        """Images times draws in the model at once."""
        return self.asked.rows(self.device)


def build_attacks(request: Request) -> list[Attack]:
    """The attacks by name; ``strongest`` stands for all of the threat model.

    Without a gradient those that need none, and square.

    Raises:
        ValueError: unknown name, or an attack that is not one in the threat model.
    """
    threat = request.asked.threat_model
    fitting = [name for name, kind in ATTACKS.items() if threat in kind.threats]
    names = fitting if request.asked.attack_names == ("strongest",) else request.asked.attack_names
    found = [attack for name in names for attack in build_named(name, request)]
    if request.asked.model_gradient != "none":
        return found
    found = [a for a in found if not a.takes_gradient]
    alone = threat not in Square.threats or any(isinstance(a, Square) for a in found)
    return found if alone else [*found, *build_attack(Square, request)]


def build_named(name: str, request: Request) -> list[Attack]:
    """The attacks of a name, or of ``NAME@GOAL``: at one class, or at the likeliest wrong ones.

    Raises:
        ValueError: unknown name, or a goal for an attack that takes none.
    """
    start, goal = split_goal(name)
    found = build_attack(find_attack(start), request)
    if goal is None:
        return found
    aimed = [dataclasses.replace(a, goal=goal) for a in found if isinstance(a, PGD)]
    if not aimed:
        raise ValueError(f"{start} is not aimed at classes; PGD attacks are, as pgd-eot@{goal}.")
    return list(aimed)


def build_attack(kind: type[Attack], request: Request) -> list[Attack]:
    """One attack with those of the budget's numbers that it has; or one for each weight of an attack on the norm."""
    e, allowed = request.asked, request.budget
    published = (allowed.autoattack_steps, allowed.autoattack_eot)
    steps, eot = (allowed.steps, allowed.eot) if issubclass(kind, PGD) else published
    numbers = {
        "steps": steps,
        "eot": eot,
        "restarts": e.restarts,
        "max_rows": request.max_rows,
        "queries": allowed.queries,
        "calls": allowed.calls,
        "surrogate_steps": e.surrogate_steps,
    }
    own = {f.name for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {name: value for name, value in numbers.items() if name in own}
    if kind in (NormPGD, NormAutoAttackRand):
        return [kind(e.threat_model, request.eps, **options, norm_weight=w) for w in e.norm_weights]
    return [kind(e.threat_model, request.eps, **options)]


def level_options(name: str, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the noise level ``name``; ``given``: what the settings say of it."""
    needs = "calibration" in find_level(name).parameters()
    source = request.asked.score_model or request.known
    found = {"calibration": load_calibration(request.asked.calibration, source)} if needs else {}
    return {**found, **given}


def build_pairs(request: Request) -> list[tuple[str, str]]:
    """Names of the purifiers of this run, each with a noise level.

    Raises:
        ValueError: unknown names, or a t* that none of the levels takes.
    """
    e = request.asked
    embedded = request.known in zoo.calibrations() and e.score_model is None
    names = e.noise_level or (("constant", "ssni-l") if embedded else ("constant",))
    pairs: list[tuple[str, str]] = []
    for purifier in e.purifier:
        level = find_preset(purifier)[1]
        own = names if e.noise_level or not is_in_file(purifier) else names[:1]  # it may have a level of its own
        pairs += [(purifier, name) for name in own] if level is None else [("diffpure", level)]
    taking = [name for _, name in pairs if "t_star" in find_level(name).parameters()]
    if e.t_star is not None and not taking:
        raise ValueError(f"{pairs[0][1]} has no t_star; leave --t-star out, see --set for its own parameters.")
    return pairs


def build_steps(request: Request) -> int | FixedDt | None:
    """Reverse steps as the description says, if it does."""
    e = request.asked
    return e.steps if e.dt is None else FixedDt(e.dt, batch=max(1, request.max_rows // 2))


def build_settings(settings: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What the settings say of each purifier and each noise level of this run, by their names.

    A setting without a part goes to every part that has it.

    Raises:
        ValueError: a part that is not in this run, or a parameter that it does not have.
    """
    parts = {name: purifier_parameters(name) for name, _ in pairs}
    parts |= {name: find_level(name).parameters() - {"t_star"} for _, name in pairs}
    found: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for key, value in settings.items():
        part, _, name = key.rpartition(".")
        if part and part not in parts:
            raise ValueError(
                "--set takes NAME=VALUE, PURIFIER.NAME=VALUE or LEVEL.NAME=VALUE, with a purifier or noise level of "
                f"this run ({', '.join(parts)}), got {key!r}."
            )
        asked = [part] if part else list(parts)
        taking = [p for p in asked if parts[p] is None or name in (parts[p] or ())]
        if not taking or name in (*SHARED, "kind"):
            known = "; ".join(f"{p}: {', '.join(sorted(parts[p] or ())) or 'none'}" for p in asked)
            who = f"{part} has no" if part else f"None of {', '.join(asked)} has a"
            raise ValueError(f"{who} parameter {name!r} for --set; known: {known}.")
        for p in taking:
            found[p][name] = value
    return found


def purifier_parameters(name: str) -> set[str] | None:
    """A purifier's own parameters; None: it takes any."""
    parameters = inspect.signature(find_preset(name)[0]).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters} - set(SHARED)


def build_purified(
    purifier: str,
    name: str,
    bare: nn.Module,
    score_model: ScoreModel,
    request: Request,
    attacks: Sequence[Attack],
    given: Mapping[str, Mapping[str, Any]],
) -> Defence:
    """The classifier behind ``purifier`` with the noise level ``name``; ``given``: see :func:`build_settings`."""
    e = request.asked
    shared: dict[str, Any] = {"t_star": e.t_star, "steps": build_steps(request), "reverse": e.reverse}
    options = {key: value for key, value in shared.items() if value is not None} | dict(given[purifier])
    built = build_purifier(
        purifier, score_model, request.known, request.listed, name, level_options(name, request, given[name]),
        gradient=gradient_config(e), shape=request.data.shape, **options,
    )  # fmt: skip
    model = DefendedClassifier(bare, built, e.purifications, e.aggregate).to(request.device)
    title = " ".join(Path(n).name for n in ((purifier, name) if built.level.varies else (purifier,)))
    applicable = [a.fitted(model, title) for a in attacks if a.applies_to(model)]
    if not applicable:
        raise ValueError(f"None of the attacks {', '.join(e.attack_names)} says anything about {title}; add pgd-eot.")
    weights = {**described(model_name(request), bare), "score_model": built.score_model.fingerprint()}
    config = {**model.config(), **weights, "exact": built.exact, **gradient_facts(bare)}
    precision = FLOAT32 if e.precision == AUTO else e.precision  # which is chosen once all are built
    return Defence(title, model, applicable, request.budget.judge_draws, config, precision)


def model_name(request: Request) -> str:
    """The classifier's name: as given, or usual on the data set."""
    e, standard = request.asked, f"{request.known}-standard"
    if e.model is None and e.dataset not in DATASETS:
        raise ValueError("Data of your own needs a classifier; pass --model, as file.py:function for one of your own.")
    return e.model or (standard if standard in zoo.names("classifier") else "Standard")


def described(name: str, classifier: nn.Module) -> dict[str, str]:
    """A classifier by name and weights, as manifests have it."""
    own = classifier.classifier if isinstance(classifier, BlackBox) else classifier
    return {"model": name, "classifier": fingerprint(own)}


def with_model_gradient(classifier: nn.Module, name: str, request: Request) -> nn.Module:
    """The classifier with the backward pass that the description asks for.

    Raises:
        ValueError: there is no surrogate to take it from.
    """
    e, standard = request.asked, f"{request.known}-standard"
    if e.model_gradient == "exact":
        return classifier
    if e.model_gradient == "none":
        return BlackBox(classifier)
    usual = standard if standard in zoo.names("classifier") and name != standard else None
    surrogate = e.model_surrogate or usual
    if surrogate is None:
        raise ValueError(f"--model-gradient bpda takes the backward pass of another network than {name}; name it with "
                         "--model-surrogate.")  # fmt: skip
    return BPDAClassifier(classifier, load_classifier(surrogate, request.known, request.listed))


def gradient_facts(classifier: nn.Module) -> dict[str, Any]:
    """What manifests say of a classifier whose gradient is not its own; nothing of others."""
    if not isinstance(classifier, BlackBox):
        return {}
    surrogate = fingerprint(classifier.surrogate) if isinstance(classifier, BPDAClassifier) else None
    return {"exact": False, "model_surrogate": surrogate}


def build_defences(request: Request, attacks: Sequence[Attack]) -> list[Defence]:
    """Undefended, purified, and the adversarially trained baseline where there is one."""
    e, known, name = request.asked, request.known, model_name(request)
    pairs = build_pairs(request)
    given = build_settings(e.settings, pairs)
    bare = with_model_gradient(load_classifier(name, known, request.listed), name, request).to(request.device)
    classes = Predicted(bare) if e.score_classes == "predicted" else e.score_classes
    score_model = load_score(e.score_model or default_score_model(known), known, classes).to(request.device)
    purified = [build_purified(p, n, bare, score_model, request, attacks, given) for p, n in pairs]
    once = [a.on_deterministic().fitted(bare, UNDEFENDED) for a in attacks if a.applies_to(bare)]
    if e.model_gradient != "none" and not any(isinstance(a, PGD | Adaptive) for a in once):
        kind = next(k for k in ATTACKS.values() if issubclass(k, PGD) and e.threat_model in k.threats)
        once.append(kind(e.threat_model, request.eps, steps=request.budget.steps, eot=1))
    defences = [Defence(UNDEFENDED, bare, once, 1, {**described(name, bare), **gradient_facts(bare)}), *purified]
    baseline = f"{known}-at"
    if baseline in zoo.names("classifier") and e.model is None:
        trained = zoo.classifier(baseline).to(request.device)
        defences.append(Defence("adversarial training", trained, once, 1, described(baseline, trained)))
    return defences


def gradient_config(e: Attacking) -> dict[str, Any]:
    """The gradient engine with its parameters."""
    engine = ENGINES[e.gradient]
    config: dict[str, Any] = {"kind": e.gradient}
    if e.memory_budget is not None and engine not in (Full, Checkpoint, Surrogate):
        raise ValueError(f"--memory-budget is for --gradient full, checkpoint or surrogate, not {e.gradient}.")
    if engine is Surrogate:
        config["steps"] = e.surrogate_steps
    if e.memory_budget is not None:
        config["memory_budget"] = e.memory_budget
    elif engine is Checkpoint:
        config["memory_budget"] = DEFAULT_ENGINE.memory_budget
    return config
