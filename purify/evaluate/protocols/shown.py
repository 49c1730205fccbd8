"""What protocols show: a table of what each number means, plain data for result.json, and a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from purify.evaluate.pictures import panels, percents, save
from purify.evaluate.protocols.averaged import WORDS, Point
from purify.evaluate.protocols.measure import Measured
from purify.evaluate.records import averages_picture

LINES = {"clean": ("clean images", "#59636e", ":"), "cheap": ("cheap gradient", "#2f81f7", "-")}
LINES["own"] = ("gradients of such answers", "#cf222e", "--")


def table(found: Mapping[str, Measured]) -> pd.DataFrame:
    """A row for each number: accuracy and clean control in %, with intervals, network calls, and what it assumes."""
    rows = {
        (name, line.protocol, line.number): {
            "accuracy": str(line.accuracy).strip(),
            "clean": str(line.clean).strip(),
            "calls": f"{line.calls:.0f}",
            "the attacker": line.assumes,
        }
        for name, measured in found.items()
        for line in measured.lines
    }
    index = pd.MultiIndex.from_tuples(rows, names=("defence", "protocol", "number"))
    return pd.DataFrame(list(rows.values()), index=index)


def costs(found: Mapping[str, Measured]) -> list[str]:
    """A sentence for each defence: what its protocols took."""
    return [
        f"{name}: the protocols took {m.calls:.0f} network calls per image beyond the run's {m.run_calls:.0f} "
        f"(together {1 + m.calls / m.run_calls:.2f} times the run)."
        for name, m in found.items()
    ]


def plain(found: Mapping[str, Measured]) -> dict[str, Any]:
    """As result.json has it."""
    return {
        name: {"calls": m.calls, "run_calls": m.run_calls, "lines": [asdict(line) for line in m.lines]}
        for name, m in found.items()
    }


def draw(folder: Path, name: str, points: Sequence[Point]) -> Path | None:
    """PNG of accuracy against purifications per answer, a panel for each way to combine them; None without points."""
    if not points:
        return None
    counts = sorted({p.k for p in points})
    fig, axes = panels(10, 3.4, 1, len(WORDS), sharey=True)
    for ax, (how, words) in zip(axes, WORDS.items(), strict=True):
        for who, (label, colour, style) in LINES.items():
            shown = [p for p in points if p.who == who and (p.how == how or p.k == 1)]
            if not shown:
                continue
            middle, bars = percents([p.accuracy for p in shown])
            ks = [p.k for p in shown]
            ax.errorbar(ks, middle, bars, fmt=f"o{style}", color=colour, capsize=3, label=label)
        ax.set(xscale="log", xlabel="purifications per answer", title=words, ylim=(0, 102))
        ax.set_xticks(counts, map(str, counts))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[-1].legend(fontsize=8)
    fig.suptitle(name)
    return save(fig, averages_picture(folder, name))
