"""Plots of a leaderboard, as SVG that is legible on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from purify.attacks.threats import stated
from purify.certify.metrics import certified_accuracy
from purify.evaluate.metrics import Estimate
from purify.evaluate.pictures import BARE, COLOURS, MARKERS
from purify.leaderboard.certified import CertifiedRow
from purify.leaderboard.groups import threat
from purify.leaderboard.links import portable
from purify.leaderboard.rows import Row

INK, DARK_INK = BARE, "#9aa4af"  # no grey has contrast enough on white and on near-black
DARK = "@media (prefers-color-scheme: dark) {" + "".join(
    f'[style*="{what}: {INK}"] {{ {what}: {DARK_INK} !important }}' for what in ("fill", "stroke")
)
LINES = ["-", "--", "-.", ":"]


@dataclass(frozen=True)
class Horizontal:
    """What a plot shows from left to right.

    Attributes:
        file, label, title: the plot's name, its axis and what it shows.
        value: of a row; None where there is none.
        interval: the lengths to the left and right of it; without, equal values are drawn side by side.
    """

    file: str
    label: str
    title: str
    value: Callable[[Row], float | None]
    interval: Callable[[Row], tuple[float, float]] | None = None


def clean(row: Row) -> float | None:
    return 100 * row.clean["mean"].value


def level(row: Row) -> float | None:
    return None if row.t_star is None else row.t_star[0]


def calls(row: Row) -> float | None:
    return row.network_calls


def sides(found: Estimate) -> tuple[float, float]:
    """Lengths of an interval below and above its value, in %."""
    return 100 * (found.value - found.low), 100 * (found.high - found.value)


ABREAST = " (equal ones side by side)"
PLOTS = (
    Horizontal(
        "robust-clean",
        "clean accuracy, %",
        "Robust (worst case) against clean accuracy",
        clean,
        lambda row: sides(row.clean["mean"]),
    ),
    Horizontal(
        "accuracy-level",
        "mean t* on clean images" + ABREAST,
        "Robust accuracy against the noise level",
        level,
    ),
    Horizontal("cost", "score-network calls per answer" + ABREAST, "Robust accuracy against cost", calls),
)


def draw_plots(rows: Sequence[Row], folder: Path) -> list[dict[str, str]]:
    """Draw what there is data for, one point for each row; returns file and description of each plot.

    Each data set has its plots, and of several threat models each. Rows of reduced budgets are left out where there are
    others.
    """
    drawn = []
    for dataset, norm, eps in dict.fromkeys(map(threat, rows)):
        own = [r for r in rows if threat(r) == (dataset, norm, eps)]
        own = [r for r in own if not r.reduced] or own
        only = len({threat(r) for r in rows if r.dataset == dataset}) == 1
        name = dataset if only else f"{dataset}-{norm}-{eps:g}"
        about = dataset if only else f"{dataset}, {stated(norm, eps)}"
        for plot in PLOTS:
            shown = [r for r in own if plot.value(r) is not None]
            if shown:
                file, title = f"{name}-{plot.file}.svg", f"{plot.title}: {about}"
                _draw(folder / file, shown, plot, title)
                drawn.append({"file": file, "title": title, "dataset": dataset})
    return drawn


def series(row: Row, several: bool) -> str:
    """What a legend calls the row; ``several``: purifiers stand before more than one classifier."""
    called = f" ({row.called})" if row.called and row.bare else ""
    return f"{row.title}, {portable(row.classifier)}{called}" if several or row.bare else row.title


def abreast(values: Sequence[float]) -> list[float]:
    """Where points with these values are drawn: equal ones 1.5 % of the plot's width apart, centred on their value."""
    step = 0.015 * (max(values) - min(values) or abs(values[0]) or 1.0)
    placed = []
    for i, value in enumerate(values):
        rank = sum(math.isclose(value, other, abs_tol=1e-9) for other in values[:i])
        count = sum(math.isclose(value, other, abs_tol=1e-9) for other in values)
        placed.append(value + step * (rank - (count - 1) / 2))
    return placed


def draw_curves(rows: Sequence[CertifiedRow], folder: Path) -> list[dict[str, str]]:
    """Draw certified accuracy against radius for each data set and norm; returns file and description of each."""
    drawn = []
    for dataset, norm in dict.fromkeys((r.dataset, r.norm) for r in rows):
        shown = [r for r in rows if (r.dataset, r.norm) == (dataset, norm)]
        file, title = f"{dataset}-certified-{norm}.svg", f"Certified accuracy against radius: {dataset}, {norm}"
        _draw_curves(folder / file, shown, title)
        drawn.append({"file": file, "title": title, "dataset": dataset})
    return drawn


def _draw_curves(path: Path, rows: Sequence[CertifiedRow], title: str) -> None:
    fig, ax = _axes(f"{rows[0].norm} radius", "certified accuracy, %", title, len(rows))
    top = 1.05 * max(max(float(r.found.correct.max()) for r in rows), 1e-3)
    grid = np.linspace(0, top, 400)
    handles: dict[str, Line2D] = {}
    for i, row in enumerate(rows):
        shares = 100 * certified_accuracy(row.found.correct, grid)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i // len(COLOURS) % len(LINES)]}
        label = f"{row.name}, ACR {row.found.acr.value:.3f}"
        (handles[label],) = ax.step(grid, shares, where="post", **style)
    ax.set_xlim(0, top)
    ax.set_ylim(bottom=0)
    _save(fig, handles, path)


def _draw(path: Path, rows: Sequence[Row], plot: Horizontal, title: str) -> None:
    several = len({r.classifier for r in rows if not r.bare}) > 1
    labels = [series(r, several) for r in rows]
    names = list(dict.fromkeys(labels))
    fig, ax = _axes(plot.label, "robust accuracy, worst case, %", title, len(names))
    x = [value for r in rows if (value := plot.value(r)) is not None]
    x = x if plot.interval else abreast(x)
    handles: dict[str, Line2D] = {}
    for row, label, at in zip(rows, labels, x, strict=True):
        i = names.index(label)
        colour = COLOURS[i % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ms": 7}
        style |= {"mfc": "none"} if row.marked or row.reduced else {}
        bars: dict[str, Any] = {"yerr": np.array(sides(row.worst["mean"]))[:, None], "ecolor": to_rgba(colour, 0.6)}
        bars |= {"xerr": np.array(plot.interval(row))[:, None]} if plot.interval else {}
        drawn = ax.errorbar([at], [100 * row.worst["mean"].value], ls="", capsize=2, elinewidth=1, **bars, **style)
        handles.setdefault(label, drawn.lines[0])
    if any(r.marked or r.reduced for r in rows):
        hollow = "hollow: marked in the table"
        handles[hollow] = ax.plot([], [], ls="", marker="o", ms=7, mfc="none", color=INK)[0]
    ax.set_ylim(bottom=-0.03 * ax.get_ylim()[1])  # markers at 0 are seen whole
    _save(fig, handles, path)


def _axes(x: str, y: str, title: str, series: int) -> tuple[Figure, Axes]:
    """An empty plot without a background, with room for the names of ``series`` below it."""
    fig = Figure(figsize=(6.4, 3.9 + 0.09 * series), layout="constrained", facecolor="none")
    FigureCanvasSVG(fig)
    ax = fig.subplots()
    ax.set_facecolor("none")
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)
    ax.set_title(title, color=INK, fontsize=10)
    ax.tick_params(colors=INK)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.grid(alpha=0.25, color=INK)
    return fig, ax


def _save(fig: Figure, handles: Mapping[str, Line2D], path: Path) -> None:
    """Write the plot, with a legend of what is drawn by name."""
    style: dict[str, Any] = {"ncols": 2, "fontsize": 8, "labelcolor": INK, "facecolor": "none", "edgecolor": INK}
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", **style)
    drawn = StringIO()
    with rc_context({"svg.hashsalt": path.name}):  # the same plot is the same file
        fig.savefig(drawn, format="svg", metadata={"Date": None})
    path.write_text(drawn.getvalue().replace("</style>", f"{DARK}}}</style>", 1))
