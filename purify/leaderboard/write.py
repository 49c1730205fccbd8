"""A leaderboard's files: leaderboard.json, leaderboard.md, plots and index.html."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from purify.evaluate.metrics import Estimate
from purify.evaluate.records import write_json
from purify.leaderboard.plots import draw_plots
from purify.leaderboard.rows import Row


def write_leaderboard(rows: Sequence[Row], folder: str | Path) -> None:
    """Write all files into ``folder``, the strongest defence of each data set first.

    Raises:
        ValueError: no rows, or the folder cannot be written.
    """
    if not rows:
        raise ValueError("There is nothing to rank; give the folders of finished runs.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = sorted(rows, key=lambda r: (r.dataset, r.threat_model, r.eps, -r.worst["mean"].value, r.name))
        write_json(folder / "leaderboard.json", [entry(row, folder) for row in rows])
        plots = draw_plots(rows, folder)
        environment = Environment(
            loader=PackageLoader("purify.leaderboard"), autoescape=select_autoescape(), trim_blocks=True
        )
        entries = [entry(row, folder) for row in rows]
        for template, name in (("page.html", "index.html"), ("table.md", "leaderboard.md")):
            text = environment.get_template(template).render(rows=entries, plots=plots)
            (folder / name).write_text(text)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error


def entry(row: Row, folder: Path) -> dict[str, Any]:
    """A row as plain data: the fields of RobustBench's model_info (accuracies in %), and ours."""
    manifest = os.path.relpath(Path(row.run) / "manifest.json", folder)
    return {
        "name": row.name,
        "dataset": row.dataset,
        "threat_model": row.threat_model,
        "eps": f"{row.eps:g}",
        "clean_acc": f"{100 * row.clean['mean'].value:.1f}",
        "autoattack_acc": percent(row.attacks.get("autoattack-rand")),
        "external": None,
        "unreliable": bool(row.failed_checks) or not row.exact,
        "robust_acc": f"{100 * row.worst['mean'].value:.1f}",
        "strongest_attack": row.strongest,
        "clean": texts(row.clean),
        "noise": None if row.noise is None else texts(row.noise),
        "worst": texts(row.worst),
        "attacks": {name: texts(found) for name, found in row.attacks.items()},
        "estimates": {"clean": plain(row.clean), "worst": plain(row.worst)},
        "t_star": row.t_star,
        "network_calls": row.network_calls,
        "budget": row.budget,
        "samples": row.samples,
        "draws": row.draws,
        "seed": row.seed,
        "failed_checks": list(row.failed_checks),
        "exact_gradient": row.exact,
        "command": f"python benchmarks/run_autoattack.py {row.command}".rstrip(),
        "manifest": manifest,
        "git": row.git,
    }


def percent(found: dict[str, Estimate] | None) -> str | None:
    """Mean accuracy in %."""
    return None if found is None else f"{100 * found['mean'].value:.1f}"


def texts(found: dict[str, Estimate]) -> dict[str, str]:
    """Percentages with intervals."""
    return {criterion: str(estimate).strip() for criterion, estimate in found.items()}


def plain(found: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    """Estimates as plain data."""
    return {criterion: asdict(estimate) for criterion, estimate in found.items()}
