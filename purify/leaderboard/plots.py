"""Plots of a leaderboard, as SVG that is legible on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from purify.leaderboard.rows import Row

INK = "#808890"  # contrast on white and on near-black
COLOURS = ["#2f81f7", "#db6d28", "#2da44e", "#a371f7", "#bf4b8a", "#b08800"]
MARKERS = "osD^vP*X"


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


def _draw(path: Path, rows: Sequence[Row], where: Callable[[Row], Any], label: str, title: str) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="none")
    FigureCanvasSVG(fig)
    ax = fig.subplots()
    ax.set_facecolor("none")
    names = list(dict.fromkeys(r.name for r in rows))
    for i, name in enumerate(names):
        chosen = [r for r in rows if r.name == name]
        worst = [r.worst["mean"] for r in chosen]
        y = [100 * e.value for e in worst]
        sides = [[100 * (e.value - e.low) for e in worst], [100 * (e.high - e.value) for e in worst]]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.errorbar([where(r) for r in chosen], y, yerr=sides, label=name, ls="", capsize=2, **style)
    ax.set_xlabel(label, color=INK)
    ax.set_ylabel("robust accuracy, worst case, %", color=INK)
    ax.set_title(title, color=INK, fontsize=10)
    ax.tick_params(colors=INK)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.grid(alpha=0.25, color=INK)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, labelcolor=INK, facecolor="none", edgecolor=INK)
    fig.savefig(path, format="svg", metadata={"Date": None})
