"""What a leaderboard knows of a defence: one row for each, read from the records of a finished run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from purify.attacks import AutoAttackRand, kind_of
from purify.evaluate.budgets import reduced
from purify.evaluate.metrics import Estimate, summarize, worst_case
from purify.evaluate.records import SCHEMA, curve_folders, parse
from purify.evaluate.runner import CLEAN
from purify.evaluate.selfchecks import INEXACT, at_limit, inexact_check

NOISE = "random-noise"
SHARD_OPTION = re.compile(r" --shard[ =]\S+")
RESULT = ("budget", "self_checks", "results")  # what is read of result.json


@dataclass(frozen=True)
class Row:
    """A defence on a data set under a threat model.

    Accuracies are shares with 95 % intervals, by criterion (``mean``, ``any_of_r``, ``majority``).

    Attributes:
        name: how the run calls the defence.
        classifier: name of the classifier in it.
        dataset, threat_model, eps: what was attacked, and how far.
        clean: on clean images.
        noise: under random noise of the attack's size; None if that was not run.
        attacks: under each attack.
        autoattack: under AutoAttack's ``rand`` with its published budget (100 x 20); None if that was not run.
        worst: if each image meets the attack that is worst for it.
        t_star: mean noise level on clean and on the images of the strongest attack; None without a purifier.
        network_calls: score-network calls per answer (NFE).
        budget: the attacks with their budgets, and how many images and purifications judged them.
        samples, draws, seed: how much was measured.
        images: id and label of each sample.
        reduced: whether the budget is too small to quote the numbers.
        failed_checks: self-checks that failed, each with what that means.
        exact: whether the attacks had the exact gradient.
        config: the defence as its manifest states it.
        command, run, git: the command that reproduces the run, its folder, the revisions that ran.
        called: what runs call the classifier by itself, if they say more than that it is undefended.
        protocols: numbers of other protocols, as result.json has them; see :mod:`purify.evaluate.protocols`.
    """

    name: str
    classifier: str
    dataset: str
    threat_model: str
    eps: float
    clean: dict[str, Estimate]
    noise: dict[str, Estimate] | None
    attacks: dict[str, dict[str, Estimate]]
    autoattack: dict[str, Estimate] | None
    worst: dict[str, Estimate]
    t_star: tuple[float, float] | None
    network_calls: float | None
    budget: str
    samples: int
    draws: int
    seed: int
    images: frozenset[tuple[int, int]]
    reduced: bool
    failed_checks: tuple[str, ...]
    exact: bool
    config: dict[str, Any]
    command: str
    run: str
    git: str | None
    called: str | None = None
    protocols: tuple[dict[str, Any], ...] = ()

    @property
    def bare(self) -> bool:
        """Whether there is no purifier."""
        return "purifier" not in self.config

    @property
    def title(self) -> str:
        """What the defence is: a classifier without purifier is the same however its run calls it."""
        return "no purifier" if self.bare else self.name

    @property
    def marked(self) -> bool:
        """Whether the measurement is not to be believed as it stands."""
        return bool(self.failed_checks) or not self.exact

    @property
    def strongest(self) -> str:
        """The attack with the lowest mean."""
        return min(self.attacks, key=lambda name: self.attacks[name]["mean"].value)

    def repeats(self, other: Row) -> bool:
        """Whether both are one measurement, as of the undefended classifier that several runs attack alike."""
        origin: dict[str, Any] = {"name": "", "command": "", "run": "", "git": None, "protocols": ()}
        return replace(self, **origin) == replace(other, **origin)


def read_run(folder: str | Path) -> list[Row]:
    """The rows of a finished run.

    Raises:
        ValueError: the folder holds no run, or one that is not finished, was damaged or made by a newer purify; names
            what is missing.
    """
    folder = Path(folder)
    config, sessions = load_manifest(folder)
    if "systems" in config:
        raise ValueError(f"{folder} is a run of certificates (run_certify.py); give folders of run_autoattack.py.")
    if "distortion" in config:
        raise ValueError(f"{folder} is a search for minimum distortions; give folders of `purify attack`.")
    result = dict(zip(RESULT, load_json(folder / "result.json", *RESULT), strict=True))
    result["protocols"] = json.loads((folder / "result.json").read_text()).get("protocols", {})
    if config.get("worst_only"):
        raise ValueError(
            f"{folder} was made with --worst-only; a leaderboard needs every attack on every sample: run its command "
            "without that option."
        )
    records = load_records(folder / "records.jsonl")
    rows = [_row(folder, name, config, sessions, result, records) for name in config["defences"]]
    for row in rows:
        stored = result["results"].get(row.name, {}).get("worst case", {})
        if any(abs(e.value - stored.get(c, {}).get("value", np.inf)) > 1e-9 for c, e in row.worst.items()):
            raise ValueError(f"{folder}: result.json and the records differ for {row.name}; run its command again.")
    return rows


def load_manifest(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Config and sessions of a run; ValueError if there is no run, or one of a newer schema than this purify reads."""
    check_schema(folder / "result.json")  # a newer purify may write other manifests, too
    radii = curve_folders(folder)
    if radii and not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds a curve over eps; name a run of it, as {radii[0]}.")
    config, sessions = load_json(folder / "manifest.json", "config", "sessions")
    return config, sessions


def check_schema(path: Path) -> None:
    """Raise ValueError if a result.json says that it is newer than this purify; one without a schema is old."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # who reads it says what is wrong with it
    schema = content.get("schema", 1) if isinstance(content, dict) else 1
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{path} has schema {schema}, and this purify reads schemas up to {SCHEMA}: update purify.")


def load_json(path: Path, *keys: str) -> list[Any]:
    """The values of ``keys`` in a file of a run's folder; ValueError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        return [content[key] for key in keys]
    except OSError as error:
        raise ValueError(f"{path.parent} is not the folder of a finished run ({path.name} is missing).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not of this version; run its command again.") from error


def load_records(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records by defence and attack, in the order of their samples."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        record = parse(line)
        if record is None:
            raise ValueError(f"{path}, line {number}, is damaged; remove that line and run the command again.")
        found.setdefault((record["defence"], record["attack"]), []).append(record)
    return {key: sorted(records, key=lambda r: r["sample"]) for key, records in found.items()}


def _row(
    folder: Path,
    name: str,
    config: dict[str, Any],
    sessions: list[dict[str, Any]],
    result: dict[str, Any],
    records: dict[tuple[str, str], list[dict[str, Any]]],
) -> Row:
    defence, budgets, n = config["defences"][name], config["attacks"][name], config["n_examples"]
    stages = [CLEAN, *(b["attack"] for b in budgets)]
    samples = [(r["sample"], r["label"]) for r in records.get((name, CLEAN), [])]
    for stage in stages:
        found = [(r["sample"], r["label"]) for r in records.get((name, stage), [])]
        if len(found) < n:
            raise ValueError(f"{folder} is not finished: {name}, {stage}, lacks samples; run its command again.")
        if found != samples or len(set(samples)) != n:
            raise ValueError(f"{folder}: the records of {name}, {stage}, are not those of its {n} samples.")
    if all(stage in (CLEAN, NOISE) for stage in stages):
        raise ValueError(f"{folder}: {name} met no attack, there is nothing to rank; add pgd-eot to its --attacks.")
    labels = np.array([r["label"] for r in records[name, CLEAN]])
    predictions = {s: np.array([r["predictions"] for r in records[name, s]]) for s in stages}
    accuracies = {stage: summarize(p, labels) for stage, p in predictions.items()}
    attacks = {stage: value for stage, value in accuracies.items() if stage not in (CLEAN, NOISE)}
    strongest = min(attacks, key=lambda a: attacks[a]["mean"].value)
    draws = predictions[CLEAN].shape[1]
    half = f"; attacks in {defence['precision']}" if "precision" in defence else ""
    return Row(
        name=name,
        classifier=defence.get("model", "unknown"),  # manifests of old did not name it
        dataset=config["dataset"],
        threat_model=budgets[0]["norm"],
        eps=budgets[0]["eps"],
        clean=accuracies[CLEAN],
        noise=accuracies.get(NOISE),
        attacks=attacks,
        autoattack=attacks.get(AutoAttackRand.name) if _published(budgets, draws) else None,
        worst=worst_case(list(predictions.values()), labels),
        t_star=_levels(records[name, CLEAN], records[name, strongest]),
        network_calls=_mean(records[name, CLEAN], "network_calls"),
        budget=f"{'; '.join(_stated(b) for b in budgets)}; {n} images judged by {draws} "
        f"purification{'s' * (draws != 1)}{half}",
        samples=n,
        draws=draws,
        seed=config["seed"],
        images=frozenset(samples),
        reduced=reduced(result["budget"], config["dataset"]),
        failed_checks=_failed(name, result["self_checks"], attacks, defence.get("exact", True)),
        exact=defence.get("exact", True),  # there is no gradient to miss without a purifier
        config=defence | ({"code": config["code"]} if "code" in config else {}),
        command=made_by(sessions),
        run=str(folder),
        git=", ".join(dict.fromkeys(str(session["git"]) for session in sessions if session["git"])) or None,
        protocols=tuple(result["protocols"].get(name, {}).get("lines", ())),
    )


def made_by(sessions: list[dict[str, Any]]) -> str:
    """The command that makes a run, and all of it where what ran first was a shard."""
    return SHARD_OPTION.sub("", sessions[0]["command"])


def _failed(
    name: str, stored: list[dict[str, Any]], attacks: Mapping[str, dict[str, Estimate]], exact: bool
) -> tuple[str, ...]:
    """The self-checks that failed: the run's own, and the one of inexact gradients, which old runs did not ask."""
    known = [(kind_of(label), accuracy["mean"].value) for label, accuracy in attacks.items()]
    found = inexact_check(name, [(kind, left) for kind, left in known if kind is not None], exact)
    own = [check for check in stored if check["defence"] == name and check["name"] != INEXACT]
    failed = [check for check in [*own, *map(asdict, found)] if not _passed(check)]
    return tuple(f"{check['name']}: {check['meaning']}" for check in failed)


def _passed(check: dict[str, Any]) -> bool:
    """Whether a stored check passed; old runs failed at the limit by rounding."""
    return check["passed"] or (check["value"] is not None and at_limit(check["value"], check["limit"]))


def _stated(budget: dict[str, Any]) -> str:
    """An attack with its budget."""
    if "calls" in budget:
        return f"{budget['attack']} {budget['calls']} calls"
    if "steps" in budget:
        restarts = f" x {budget['restarts']} restarts" if budget.get("restarts", 1) > 1 else ""
        return f"{budget['attack']} {budget['steps']} x EOT {budget['eot']}{restarts}"
    return budget["attack"] + (f" {budget['queries']} queries" if "queries" in budget else "")


def _published(budgets: list[dict[str, Any]], draws: int) -> bool:
    """Whether AutoAttack's ``rand`` ran with its own budget; a model without randomness needs a single draw."""
    found = next((b for b in budgets if b["attack"] == AutoAttackRand.name), {"steps": 0})
    whole = AutoAttackRand("Linf", 0.0)
    return found["steps"] >= whole.steps and (draws == 1 or found["eot"] >= whole.eot)


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in records if key in r]
    return float(np.mean(values)) if values else None


def _levels(clean: list[dict[str, Any]], attacked: list[dict[str, Any]]) -> tuple[float, float] | None:
    before, after = _mean(clean, "t_star"), _mean(attacked, "t_star")
    return None if before is None or after is None else (before, after)
