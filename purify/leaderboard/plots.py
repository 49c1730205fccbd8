"""Plots of a leaderboard, as SVG that is legible on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from purify.certify.metrics import certified_accuracy
from purify.leaderboard.certified import CertifiedRow
from purify.leaderboard.rows import Row

INK = "#808890"  # contrast on white and on near-black
COLOURS = ["#2f81f7", "#db6d28", "#2da44e", "#a371f7", "#bf4b8a", "#b08800"]
MARKERS = "osD^vP*X"
LINES = ["-", "--", "-.", ":"]


def draw_plots(rows: Sequence[Row], folder: Path) -> list[dict[str, str]]:
    """Draw what there is data for; returns file and description of each."""
    plots: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
        ("robust-clean", "clean accuracy, %", "Robust (worst case) against clean accuracy", clean),
        ("accuracy-level", "mean t* on clean images", "Robust accuracy against the noise level", level),
        ("cost", "score-network calls per answer", "Robust accuracy against cost", calls),
    ]
    drawn = []
    for dataset in dict.fromkeys(r.dataset for r in rows):
        for name, label, title, where in plots:
            shown = [r for r in rows if r.dataset == dataset and where(r) is not None]
            if shown:
                file = f"{dataset}-{name}.svg"
                _draw(folder / file, shown, where, label, f"{title}: {dataset}")
                drawn.append({"file": file, "title": f"{title}: {dataset}"})
    return drawn


def clean(row: Row) -> float | None:
    return 100 * row.clean["mean"].value


def level(row: Row) -> float | None:
    return None if row.t_star is None else row.t_star[0]


def calls(row: Row) -> float | None:
    return row.network_calls


def series(row: Row, several: bool) -> str:
    """What a legend calls the row; ``several``: purifiers stand before more than one classifier."""
    return f"{row.name}, {row.classifier}" if several else row.name


def draw_curves(rows: Sequence[CertifiedRow], folder: Path) -> list[dict[str, str]]:
    """Draw certified accuracy against radius for each data set and norm; returns file and description of each."""
    drawn = []
    for dataset, norm in dict.fromkeys((r.dataset, r.norm) for r in rows):
        shown = [r for r in rows if (r.dataset, r.norm) == (dataset, norm)]
        file, title = f"{dataset}-certified-{norm}.svg", f"Certified accuracy against radius: {dataset}, {norm}"
        _draw_curves(folder / file, shown, title)
        drawn.append({"file": file, "title": title})
    return drawn


def _draw_curves(path: Path, rows: Sequence[CertifiedRow], title: str) -> None:
    fig, ax = _axes(f"{rows[0].norm} radius", "certified accuracy, %", title, len(rows))
    top = 1.05 * max(max(float(r.found.correct.max()) for r in rows), 1e-3)
    grid = np.linspace(0, top, 400)
    for i, row in enumerate(rows):
        shares = 100 * certified_accuracy(row.found.correct, grid)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i // len(COLOURS) % len(LINES)]}
        ax.step(grid, shares, where="post", label=f"{row.name}, ACR {row.found.acr.value:.3f}", **style)
    ax.set_xlim(0, top)
    _save(fig, ax, path)


def _draw(path: Path, rows: Sequence[Row], where: Callable[[Row], Any], label: str, title: str) -> None:
    several = len({r.classifier for r in rows if r.network_calls is not None}) > 1
    names = list(dict.fromkeys(series(r, several) for r in rows))
    fig, ax = _axes(label, "robust accuracy, worst case, %", title, len(names))
    for i, name in enumerate(names):
        chosen = [r for r in rows if series(r, several) == name]
        worst = [r.worst["mean"] for r in chosen]
        y = [100 * e.value for e in worst]
        sides = [[100 * (e.value - e.low) for e in worst], [100 * (e.high - e.value) for e in worst]]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.errorbar([where(r) for r in chosen], y, yerr=sides, label=name, ls="", capsize=2, **style)
    _save(fig, ax, path)


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


def _save(fig: Figure, ax: Axes, path: Path) -> None:
    ax.set_ylim(bottom=0)
    fig.legend(loc="outside lower center", ncols=2, fontsize=8, labelcolor=INK, facecolor="none", edgecolor=INK)
    fig.savefig(path, format="svg", metadata={"Date": None})
