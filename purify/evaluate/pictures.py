"""What all pictures of runs have in common: a canvas without a display, colours, pixels, and files that are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from purify.evaluate.metrics import Estimate
from purify.evaluate.records import writing

BARE = "#59636e"  # of what is not defended, and of text
COLOURS = ("#2f81f7", "#db6d28", "#2da44e", "#a371f7", "#bf4b8a", "#b08800")
MARKERS = "osD^v<>p"  # hollow ones differ, too


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes: one, or an array of them; ``options`` as matplotlib's ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Any, path: Path) -> Path:
    """The figure as PNG, or as SVG by the ending of ``path``: all of it or nothing."""
    from matplotlib import rc_context

    kind = path.suffix.removeprefix(".")
    with writing(path) as partial, rc_context({"svg.hashsalt": path.name}):  # the same plot is the same file
        figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return path


def show_image(ax: Any, image: Tensor) -> None:
    """Pixels (C, H, W) in [0, 1], without ticks; one channel is grey."""
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])


def percents(found: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Values in % (N,), and how far their intervals reach below and above, (2, N), as ``errorbar`` takes them."""
    middle = np.array([100 * e.value for e in found])
    ends = np.array([[100 * e.low, 100 * e.high] for e in found]).T
    return middle, np.abs(ends - middle)
