"""Radii of a finished run at another alpha, from the counts in its records: nothing is drawn, no network is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from purify.certify import ABSTAIN, DSSN, SSN, Anytime, Cascade, Certificate, Certifier, Draws, Smooth
from purify.evaluate.certification import CERTIFICATE, Summary, sum_up
from purify.evaluate.records import MERGED, parse

UNUSED = nn.Identity().eval()  # the classifier, which is not asked

KINDS: dict[str, Callable[[Mapping[str, Any]], Certifier]] = {
    "gaussian": lambda c: Smooth(UNUSED, c["sigma"]),
    "multiscale": lambda c: Cascade(tuple(Smooth(UNUSED, s["sigma"]) for s in c["scales"]), c["p0"], c["mode"]),
    "ssn": lambda c: SSN(UNUSED, c["lam"]),
    "dssn": lambda c: DSSN(UNUSED, c["lam"], c["offset_seed"]),
}


@dataclass(frozen=True)
class Recomputed:
    """A system at another alpha: its norm, the largest radius that its draws reach, and what its certificates are worth
    (attacks inside the radius were for the old radii, and are left out)."""

    norm: str
    reachable: float
    summary: Summary


def recompute(folder: Path, alpha: float, radii: Sequence[float] | None = None) -> dict[str, Recomputed]:
    """Every system of a run of ``purify certify``, by name, at ``alpha``; at the run's own radii unless told others.

    Raises:
        ValueError: no finished run, or one whose draws do not tell what would have been drawn at this alpha.
    """
    config, tables = _read(folder)
    lines = [parse(line) for line in (folder / MERGED).read_bytes().splitlines()]
    records = [r for r in lines if r is not None and r["attack"] == CERTIFICATE]
    found = {}
    for name, system in config["systems"].items():
        own = sorted((r for r in records if r["defence"] == name), key=lambda r: int(r["sample"]))
        if len(own) != config["n_examples"]:
            raise ValueError(f"{folder} is not finished: {name} lacks samples; run its command again.")
        certifier, draws = KINDS[system["kind"]](system), _draws(name, system["draws"], alpha)
        try:
            again = certifier.recompute(certificate(own, draws), draws)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"The records of {name} in {folder} were changed by hand; certify again.") from error
        changed = [
            {**r, "predictions": [int(c)], "radius": float(radius)}
            for r, c, radius in zip(own, again.classes, again.radii, strict=True)
        ]
        summary = sum_up(changed, [], tables[name]["radii"] if radii is None else radii)
        found[name] = Recomputed(certifier.norm, certifier.reachable(draws), summary)
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a finished run of certificates, and its results."""
    try:
        config = json.loads((folder / "manifest.json").read_text())["config"]
        results = json.loads((folder / "result.json").read_text())["results"]
        return config, {name: results[name] for name in config["systems"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no finished run of `purify certify`.") from error


def _draws(name: str, stored: Mapping[str, Any], alpha: float) -> Draws:
    """The draws of a manifest at another alpha."""
    stop = stored["stop"]
    if stop is not None and "radii" not in stop:
        raise ValueError(
            f"{name} stopped early by the rule of version 0.2, and its records do not hold the looks that it took; "
            "certify again, with --sampling anytime."
        )
    return Draws(stored["n0"], stored["n"], alpha, None if stop is None else Anytime(tuple(stop["radii"])))


def certificate(records: Sequence[Mapping[str, Any]], draws: Draws) -> Certificate:
    """The certificates that records describe.

    Records of 0.2 do not say which class was asked about where there was no answer: these stay without one.
    """
    selected = torch.tensor([r.get("selected", r["predictions"][0]) for r in records])
    counts = torch.tensor([r["counts"] for r in records]).masked_fill((selected == ABSTAIN)[:, None], 0)
    hits = None
    if draws.stop is not None and all("stage" not in r for r in records):
        taken, looks = [r["hits"] for r in records], len(draws.looks)
        hits = torch.from_numpy(np.array([h + [-1] * (looks - len(h)) for h in taken]))
    cascade = [r for r in records if "stage" in r]
    if any(r["stage"] and "passed" not in r for r in cascade):
        raise ValueError("its records are of version 0.2 and lack the counts of the scales passed; certify again.")
    return Certificate(
        torch.tensor([r["predictions"][0] for r in records]),
        torch.tensor([r["radius"] for r in records], dtype=torch.float64),
        counts,
        torch.tensor([r["draws"] for r in records]),
        selected.clamp_min(0),
        hits,
        torch.tensor([r["stage"] for r in cascade]) if cascade else None,
        [[(c, own) for c, own in r.get("passed", [])] for r in records] if cascade else None,
    )
