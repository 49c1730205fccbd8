"""Which rows of a leaderboard measure one system, and in what order systems stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purify.leaderboard.rows import Row, read_run


def ranked(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows by systems, each system's measurement on most images first, of equally many the lowest worst case.

    Systems stand by data set and threat model, by the worst case that leads them from high to low, and after all
    others those measured with a reduced budget.
    """
    groups: list[list[Row]] = []
    for row in rows:
        own = [any(one_system(row, other) for other in group) for group in groups]
        joined = [other for group, o in zip(groups, own, strict=True) if o for other in group]
        groups = [[row, *joined], *(group for group, o in zip(groups, own, strict=True) if not o)]
    groups = [sorted(group, key=_first) for group in groups]
    return sorted(groups, key=lambda g: (g[0].reduced, *threat(g[0]), -lowest(g[0]), g[0].title, g[0].classifier))


def _first(row: Row) -> tuple[Any, ...]:
    """What the measurements of one system stand by."""
    return -len(row.images), lowest(row), -len(row.attacks), row.run, row.name


def one_system(row: Row, other: Row) -> bool:
    """Whether both measure the same system under the same threat, on images of which some are the same.

    A row of a reduced budget says nothing beside one of a full budget.
    """
    return (
        (threat(row), row.reduced) == (threat(other), other.reduced)
        and "classifier" in row.config  # its weights; without them nobody knows
        and system(row.config) == system(other.config)
        and not row.images.isdisjoint(other.images)
    )


def threat(row: Row) -> tuple[str, str, float]:
    """Data set, norm and radius."""
    return row.dataset, row.threat_model, row.eps


def lowest(row: Row) -> float:
    """What a row is ranked by."""
    return row.worst["mean"].value


def system(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a defence's row decides its answers, not how it is named, differentiated or judged."""
    part = without(config, "model", "draws", "exact", "model_surrogate", "precision")
    if "purifier" in part:
        part["purifier"] = without(part["purifier"], "gradient", "through_level")
        guidance = part["purifier"].get("guidance")
        part["purifier"]["guidance"] = without(guidance, "second_order") if guidance else None
    return part


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A copy without these entries."""
    return {key: value for key, value in config.items() if key not in keys}


def measurements(runs: Sequence[Path]) -> list[tuple[Row, str]]:
    """Every row of the runs with the names of the runs that have it; one that several runs repeat comes once."""
    found: list[tuple[Row, str]] = []
    for row in (row for run in runs for row in read_run(run)):
        where = Path(row.run).name
        same = next((i for i, (other, _) in enumerate(found) if row.repeats(other)), None)
        if same is None:
            found.append((row, where))
        else:
            found[same] = (found[same][0], f"{found[same][1]}, {where}")
    return found
