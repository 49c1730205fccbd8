"""A leaderboard's files: leaderboard.json, certified.json, leaderboard.md, plots and index.html."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from purify.attacks.threats import stated
from purify.evaluate.metrics import Estimate
from purify.evaluate.recipes import RECIPES
from purify.evaluate.records import write_json
from purify.evaluate.runner import UNDEFENDED
from purify.leaderboard.certified import CertifiedRow, read_certified
from purify.leaderboard.groups import ranked
from purify.leaderboard.links import command, files, pictures, portable, relative
from purify.leaderboard.plots import draw_curves, draw_plots
from purify.leaderboard.rows import Row, load_manifest, read_run


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Row], list[CertifiedRow]]:
    """The rows of finished runs: of ``run_autoattack.py``, and of ``run_certify.py``.

    A measurement that several runs repeat is one row, of the first of them.

    Raises:
        ValueError: a folder holds no run, or one that is not finished, was damaged or made by a newer purify.
    """
    found: list[Row] = []
    certified: list[CertifiedRow] = []
    for folder in map(Path, folders):
        config, _ = load_manifest(folder)
        if "systems" in config:
            certified += read_certified(folder)
        else:
            found += read_run(folder)
    called = {row.config.get("classifier"): row.name for row in found if row.bare and row.name != UNDEFENDED}
    rows: list[Row] = []
    for row in (replace(row, called=called.get(row.config.get("classifier"))) for row in found):
        if not any(row.repeats(other) for other in rows):
            rows.append(row)
    return rows, certified


def write_leaderboard(rows: Sequence[Row], folder: str | Path, certified: Sequence[CertifiedRow] = ()) -> None:
    """Write all files into ``folder``, the strongest defence of each data set first, those of reduced budgets last.

    Numbers of papers stand apart, in ``published.json`` and in a list of their own.

    A system that several runs measured is ranked by the one on most images, of equally many by the lowest worst case;
    the other measurements follow it.
    ``leaderboard.json`` lists attacked defences; certified systems have a file of their own, ``certified.json``, so
    that all entries of a file have the same fields.

    Raises:
        ValueError: no rows, or the folder cannot be written.
    """
    if not rows and not certified:
        raise ValueError("There is nothing to rank; give the folders of finished runs.")
    folder = Path(folder)
    groups = ranked(rows)
    certified = sorted(certified, key=lambda r: (r.dataset, r.norm, -r.found.acr.value, r.name))
    content: dict[str, list[Any]] = {
        "groups": [[entry(row, folder, group[0]) for row in group] for group in groups],
        "certified": [certified_entry(row, folder) for row in certified],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content["rows"] = [row for group in content["groups"] for row in group]
        write_json(folder / "leaderboard.json", content["rows"])
        write_json(folder / "certified.json", content["certified"])
        content["published"] = published()
        write_json(folder / "published.json", content["published"])
        content["plots"], content["curves"] = draw_plots([g[0] for g in groups], folder), draw_curves(certified, folder)
        environment = Environment(
            loader=PackageLoader("purify.leaderboard"), autoescape=select_autoescape(), trim_blocks=True
        )
        environment.filters["radius"] = radius
        for template, name in (("page.html", "index.html"), ("table.md", "leaderboard.md")):
            (folder / name).write_text(environment.get_template(template).render(content))
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error


def entry(row: Row, folder: Path, leader: Row) -> dict[str, Any]:
    """A row as plain data: the fields of RobustBench's model_info (accuracies in %), and ours.

    ``leader``: the row that stands for the same system; unless it is this one, its manifest is named.
    """
    return {
        "name": row.title,
        "classifier": portable(row.classifier),
        "classifier_called": row.called,
        "dataset": row.dataset,
        "threat_model": row.threat_model,
        "eps": f"{row.eps:g}",
        "threat": stated(row.threat_model, row.eps),
        "clean_acc": f"{100 * row.clean['mean'].value:.1f}",
        "autoattack_acc": percent(row.autoattack),
        "external": None,
        "unreliable": row.marked,
        "reduced": row.reduced,
        "stronger": None if row is leader else manifest(leader, folder),
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
        "protocols": [protocol_entry(line) for line in row.protocols],
        **origin(row, folder),
    }


def protocol_entry(line: Mapping[str, Any]) -> dict[str, Any]:
    """A number of a protocol: accuracies as text, and as shares below ``estimates``."""
    found = {name: Estimate(**line[name]) for name in ("accuracy", "clean")}
    said = {name: line[name] for name in ("protocol", "number", "assumes", "calls")}
    return {**said, **texts(found), "estimates": plain(found)}


def published() -> list[dict[str, Any]]:
    """The numbers of papers, with their recipes and sources: references, which nobody measured here."""
    return [{"recipe": name, **asdict(found)} for name, recipe in RECIPES.items() for found in recipe.published]


def certified_entry(row: CertifiedRow, folder: Path) -> dict[str, Any]:
    """A certified system as plain data: percentages at its radii as text, and as shares below ``estimates``."""
    found = row.found
    certified = dict(zip(map(radius, found.radii), found.certified, strict=True))
    return {
        "kind": "certified",
        "name": row.name,
        "classifier": row.classifier,
        "dataset": row.dataset,
        "norm": row.norm,
        "threat": f"{row.norm} radius",
        "radii": found.radii,
        "certified": texts(certified),
        "acr": f"{found.acr.value:.3f} [{found.acr.low:.3f}, {found.acr.high:.3f}]",
        "abstained": str(found.abstained).strip(),
        "estimates": {
            "certified": plain(certified),
            **plain({"acr": found.acr, "abstained": found.abstained}),
        },
        "draws": found.draws,
        "network_calls": row.network_calls,
        "alpha": row.alpha,
        "attacked": found.attacked,
        "refuted": found.refuted,
        "budget": row.budget,
        "samples": row.samples,
        "seed": row.seed,
        **origin(row, folder),
    }


def radius(value: float) -> str:
    """A radius as entries and pages name it."""
    return f"{value:g}"


def manifest(row: Row | CertifiedRow, folder: Path) -> str:
    """Where a row's manifest is, seen from ``folder``."""
    return relative(Path(row.run) / "manifest.json", folder)


def origin(row: Row | CertifiedRow, folder: Path) -> dict[str, Any]:
    """How a row was made, and the files of its run that are there."""
    return {
        "command": command(row),
        "manifest": manifest(row, folder),
        "files": files(row, folder),
        "pictures": pictures(row, folder),
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
