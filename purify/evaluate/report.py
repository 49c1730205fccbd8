"""What a run shows: a table, result.json and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from purify.answers import ask
from purify.attacks.noise import RandomNoise
from purify.evaluate.pictures import panels, save, show_image
from purify.evaluate.records import SCHEMA, RunFolder, samples_picture, write_json
from purify.evaluate.runner import CLEAN, Defence, Samples, stage_name
from purify.purification.defended import DefendedClassifier

RIGHT, WRONG = "#1a7f37", "#cf222e"


def table(results: dict[str, dict[str, Any]], criterion: str = "mean") -> pd.DataFrame:
    """Percentages with intervals: defences by stages, or the other way round if there are many stages.

    ``-`` where a stage was not run.
    """
    stages = [s for s in dict.fromkeys(s for row in results.values() for s in row) if s != "worst case"]
    rows = {
        name: {s: str(row[s][criterion]) if s in row else "-" for s in [*stages, "worst case"]}
        for name, row in results.items()
    }
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.T if len(stages) > 5 else found


def write_result(
    path: Path, results: dict[str, dict[str, Any]], defences: Sequence[Defence], context: dict[str, Any]
) -> None:
    """result.json: the accuracies with intervals, the budget of every attack, and ``context``."""
    body = {
        name: {stage: {k: asdict(e) for k, e in row.items()} for stage, row in stages.items()}
        for name, stages in results.items()
    }
    budgets = {d.name: {stage_name(a): a.budget() for a in d.attacks} for d in defences}
    write_json(path, {"schema": SCHEMA, **context, "budgets": budgets, "results": body})


def verdict(
    results: dict[str, dict[str, Any]], defences: Sequence[Defence], threat: str, data: str, criterion: str = "mean"
) -> str:
    """What a run found, in a line for each defence: the worst case with its interval, and the clean accuracy.

    Of a purified defence it also says if no attack had its gradient: the classifier beside it always meets PGD.
    """
    lines = []
    for d in defences:
        worst, clean = results[d.name]["worst case"][criterion], results[d.name][CLEAN][criterion]
        interval = f"[{100 * worst.low:.1f}, {100 * worst.high:.1f}]"
        share, clean = f"{100 * worst.value:.1f} %", f"{100 * clean.value:.1f} % clean"
        purified = isinstance(d.model, DefendedClassifier)
        blind = all(a.black_box if purified else not a.takes_gradient for a in d.attacks)
        warning = "; no gradient attack was run on it" if blind else ""
        lines.append(f"  {d.name}: {share} {interval} in the worst case, {clean}{warning}")
    return "\n".join([f"{threat}, {data}:", *lines])


def same_levels(folder: RunFolder, defences: Sequence[Defence], samples: Samples) -> list[str]:
    """A sentence for each purified defence whose images all got one noise level under some attack."""
    found = []
    for d in defences:
        if not (isinstance(d.model, DefendedClassifier) and d.model.level_varies):
            continue
        levels = {s: _levels(folder, d, s, samples) for s in map(stage_name, d.attacks)}
        alike = [stage for stage, found_levels in levels.items() if len(found_levels) == 1]
        if alike:
            level = levels[alike[0]].pop()
            where = ", ".join(alike)
            found.append(f"{d.name}: every image got t* = {level:g} under {where}, as with that level alone.")
    return found


def _levels(folder: RunFolder, defence: Defence, stage: str, samples: Samples) -> set[float]:
    """Noise levels of a stage, to three digits."""
    keys = [(defence.name, stage, int(i)) for i in samples.ids]
    return {round(folder.get(*key)["t_star"], 3) for key in keys if key in folder}


def is_complete(path: Path) -> bool:
    """Whether this is a result.json with its self-checks."""
    try:
        return "self_checks" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def level_table(folder: RunFolder, defences: Sequence[Defence], samples: Samples) -> pd.DataFrame:
    """Mean noise level per defence and stage, as the judges saw it."""
    rows = {}
    for d in defences:
        stages = [stage_name(a) for a in d.stages()]
        levels = {
            s: np.mean([folder.get(d.name, s, int(i)).get("t_star", np.nan) for i in samples.ids]) for s in stages
        }
        rows[d.name] = {s: f"{v:.3f}" for s, v in levels.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("-")


@torch.no_grad()
def figure(folder: RunFolder, defence: Defence, undefended: nn.Module, samples: Samples) -> Path | None:
    """PNG of up to eight samples: original, perturbation, adversarial and purified, each with its prediction.

    Samples that are broken come first in the order of the data, mixed with held ones, so that both are seen.
    The attack is the one that left least; only samples that met it are shown. Returns the path, samples-DEFENCE.png in
    the run's folder, or None if there are no such samples.
    """
    assert isinstance(defence.model, DefendedClassifier)
    path = samples_picture(folder.path, defence.name)
    attack = _strongest(folder, defence, samples)
    if attack is None:
        return None
    samples = samples[torch.tensor([(defence.name, attack, int(i)) in folder for i in samples.ids])]
    chosen = _both_kinds(folder, defence, attack, samples, 8)
    shown = samples[chosen]
    adversarial = torch.stack([torch.from_numpy(folder.image(defence.name, attack, int(i))) for i in shown.ids])
    adversarial = adversarial.to(shown.images)
    purified = defence.model.purifier(adversarial, sample_ids=shown.ids)
    records = [folder.get(defence.name, attack, int(i)) for i in shown.ids]
    votes = [_vote(r["predictions"]) for r in records]
    share = [np.mean(np.array(r["predictions"]) == r["label"]) for r in records]
    bare, first = (ask(undefended, x).argmax(1).tolist() for x in (adversarial, shown.images))
    scale = (adversarial - shown.images).abs().max().clamp_min(1e-12)
    rows: list[tuple[str, Tensor, list[tuple[str, bool | None]]]] = [
        ("original\nundefended says", shown.images, _said(first, shown.labels)),
        (f"perturbation\nx {0.5 / float(scale):.2g}", 0.5 + 0.5 * (adversarial - shown.images) / scale, []),
        ("adversarial\nundefended says", adversarial, _said(bare, shown.labels)),
        (
            "purified once\nmajority of all says",
            purified,
            [
                (f"{v}  ({100 * s:.0f}% right)", v == str(int(y)))
                for v, s, y in zip(votes, share, shown.labels, strict=True)
            ],
        ),
    ]
    _draw(path, rows, f"{defence.name} under {attack}", shown.labels)
    return path


def _strongest(folder: RunFolder, defence: Defence, samples: Samples) -> str | None:
    """The attack that left the smallest share of answers right, among the samples that met it; None: none was met.

    Random noise counts only where there is nothing else.
    """
    left: dict[str, float] = {}
    attacks = [a for a in defence.attacks if not isinstance(a, RandomNoise)] or defence.attacks
    for name in map(stage_name, attacks):
        met = [(defence.name, name, int(i)) for i in samples.ids]
        records = [folder.get(*key) for key in met if key in folder]
        if records:
            left[name] = float(np.mean([np.mean(np.array(r["predictions"]) == r["label"]) for r in records]))
    return min(left, key=lambda name: left[name]) if left else None


def _vote(predictions: list[int]) -> str:
    """The commonest answer, or those that share the first place."""
    counts = np.bincount(predictions)
    return " or ".join(map(str, np.flatnonzero(counts == counts.max())))


def _both_kinds(folder: RunFolder, defence: Defence, attack: str, samples: Samples, count: int) -> Tensor:
    """Rows of held and broken samples, alternating as far as they go."""
    records = [folder.get(defence.name, attack, int(i)) for i in samples.ids]
    share = np.array([np.mean(np.array(r["predictions"]) == r["label"]) for r in records])
    held, broken = np.flatnonzero(share >= 0.5), np.flatnonzero(share < 0.5)
    half = count // 2
    n_held = min(len(held), max(half, count - len(broken)))
    rows = np.sort(np.concatenate([held[:n_held], broken[: count - n_held]]))
    return torch.from_numpy(rows)


def _said(predictions: list[int], labels: Tensor) -> list[tuple[str, bool | None]]:
    return [(str(p), p == int(y)) for p, y in zip(predictions, labels, strict=True)]


def _draw(
    path: Path, rows: list[tuple[str, Tensor, list[tuple[str, bool | None]]]], title: str, labels: Tensor
) -> None:
    n = len(labels)
    fig, axes = panels(1.35 * n + 1.6, 1.65 * len(rows) + 0.7, len(rows), n, squeeze=False)
    for (name, images, captions), line in zip(rows, axes, strict=True):
        for i, ax in enumerate(line):
            show_image(ax, images[i])
            if captions:
                text, right = captions[i]
                ax.set_xlabel(text, color=RIGHT if right else WRONG, fontsize=9, weight="bold")
        line[0].set_ylabel(name, fontsize=9)
    for ax, y in zip(axes[0], labels.tolist(), strict=True):
        ax.set_title(f"label {y}", fontsize=9)
    fig.suptitle(f"{title}; green: right, red: wrong", fontsize=11)
    save(fig, path)


__all__ = ["CLEAN", "figure", "table", "write_result"]
