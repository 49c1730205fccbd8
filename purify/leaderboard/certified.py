"""What a leaderboard knows of a certified system: one row for each, read from the records of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from purify import zoo
from purify.evaluate.certification import CERTIFICATE, Summary, sum_up
from purify.fingerprint import weights_digest
from purify.leaderboard.rows import load_json, load_manifest, load_records, made_by

EXACT = ("dssn",)  # kinds of certifiers that draw nothing and cannot fail


@dataclass(frozen=True)
class CertifiedRow:
    """A certified system on a data set.

    Attributes:
        name: the system.
        classifier: the embedded classifier in it, or the first digits of another's fingerprint.
        dataset, norm: what was certified, and the norm of its radii.
        found: certified accuracy at the run's radii, ACR, abstentions, draws and the attacks inside the radius.
        network_calls: mean calls of the denoiser's network for an image; None without a denoiser.
        alpha: probability that a certificate is false; None where certificates are exact.
        budget: draws, images and the attack.
        samples, seed: how much was measured.
        command, run, git: the command that reproduces the run, its folder, the revision that ran.
    """

    name: str
    classifier: str
    dataset: str
    norm: str
    found: Summary
    network_calls: float | None
    alpha: float | None
    budget: str
    samples: int
    seed: int
    command: str
    run: str
    git: str | None


def read_certified(folder: str | Path) -> list[CertifiedRow]:
    """The rows of a finished run of ``run_certify.py``.

    Raises:
        ValueError: the folder holds no run, or one that is not finished, was damaged or made by a newer purify; names
            what is missing.
    """
    folder = Path(folder)
    config, sessions = load_manifest(folder)
    if "systems" not in config:
        raise ValueError(f"{folder} is a run of attacks (run_autoattack.py); give folders of run_certify.py.")
    (results,) = load_json(folder / "result.json", "results")
    records = load_records(folder / "records.jsonl")
    rows = []
    for name, system in config["systems"].items():
        draws, attack, exact = system["draws"], system["attack"], system["kind"] in EXACT
        found = _sum_up(folder, name, config["n_examples"], results.get(name, {}), records)
        drawn = f"all {found.draws:.0f} noise levels" if exact else stated(system)
        inside = f"PGD {attack['steps']} x EOT {attack['eot']} inside the radius"
        row = CertifiedRow(
            name=name,
            classifier=_called(system.get("classifier")),
            dataset=config["dataset"],
            norm=results[name]["norm"],
            found=found,
            network_calls=found.draws * _calls(system) if "score_model" in system else None,
            alpha=None if exact else draws["alpha"],
            budget=f"{drawn}; {config['n_examples']} images" + (f"; {inside}" if found.attacked else ""),
            samples=config["n_examples"],
            seed=config["seed"],
            command=made_by(sessions),
            run=str(folder),
            git=sessions[0]["git"],
        )
        rows.append(row)
    return rows


def _called(digest: str | None) -> str:
    """The name of a classifier: manifests of certificates have its fingerprint only."""
    return "unknown" if digest is None else _embedded().get(digest, digest[:12])


@cache
def _embedded() -> dict[str, str]:
    """The embedded classifiers by fingerprint."""
    return {weights_digest(zoo.classifier(name)): name for name in zoo.names("classifier")}


@cache
def _denoisers() -> dict[str, str]:
    """The embedded score models by fingerprint."""
    return {zoo.score_model(name).fingerprint(): name for name in zoo.names("score")}


def _calls(system: dict[str, Any]) -> int:
    """Calls of the denoiser's network for one draw."""
    return int(system.get("votes", 1)) * int(system.get("steps", 1))


def _sum_up(
    folder: Path, name: str, n: int, result: dict[str, Any], records: dict[tuple[str, str], list[dict[str, Any]]]
) -> Summary:
    """A system's records summed up; the run's own result must say the same."""
    certificates = records.get((name, CERTIFICATE), [])
    if len(certificates) != n:
        raise ValueError(f"{folder} is not finished: {name}, {CERTIFICATE}, lacks samples; run its command again.")
    attacks = [r for key, part in records.items() if key[0] == name and key[1] != CERTIFICATE for r in part]
    try:
        found = sum_up(certificates, attacks, result["radii"])
        same = (found.acr.value, found.attacked, found.refuted) == (
            result["acr"]["value"],
            result["attacked"],
            result["refuted"],
        )
    except (KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{folder}: the records of {name} are not those of result.json; run its command again.")
    return found


def stated(system: dict[str, Any]) -> str:
    """The draws of a manifest's system as text, with what one of them takes, the denoiser and its precision."""
    draws, early = system["draws"], ""
    stop = draws["stop"]
    if stop is not None and "looks" in stop:  # until 0.2
        early = f", stopped at radius {stop['radius']:g} in {stop['looks']} looks"
    elif stop is not None:
        early = f" at most, stopped once the radii {', '.join(f'{r:g}' for r in stop['radii'])} are settled"
    votes = f"{system['votes']} x " if "votes" in system else ""
    calls = f", each {votes}{system['steps']} network calls" if "steps" in system else ""
    rule = f" of {system['reverse']}" if "reverse" in system else ""
    precision = f", {system['precision']} denoiser" if "precision" in system else ""
    known = _denoisers().get(system["score_model"]) if "score_model" in system else None
    denoiser = "" if known is None else f", denoiser {known}"
    return f"n0 {draws['n0']:,}, n {draws['n']:,}{early}{calls}{rule}{precision}{denoiser}"
