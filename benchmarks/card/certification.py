"""Denoised smoothing beside its bare networks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gradient_fidelity import peak_bytes, ratio, seconds

from card.bench import BFLOAT16, FLOAT32, GIB, Bench, Row, word
from purify.certify import Draws, denoised_smoothing

SIGMA = 0.25


def certification(bench: Bench) -> list[Row]:
    """Noisy images per second of denoised smoothing, and of nothing but its networks on as many rows."""
    return [certified(bench, variant, rows) for rows in bench.size.rows for variant in (FLOAT32, BFLOAT16)]


def certified(bench: Bench, variant: str, rows: int) -> Row:
    """Two batches of ``rows`` noisy images: one that chooses the classes and one that bounds them."""
    smooth = denoised_smoothing(bench.classifier, bench.models[variant], SIGMA, rows)
    images = bench.x[:4]
    draws = Draws(rows // len(images), rows // len(images), alpha=0.4)  # at which few draws certify, too
    noisy = images.repeat(rows // len(images), 1, 1, 1)
    noisy = noisy + SIGMA * torch.randn_like(noisy)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(2):
            smooth.classifier(noisy)

    works: dict[str, Callable[[], Any]] = {"ours": lambda: smooth.certify(images, draws), "bare": bare}
    row: Row = {"network": variant, "rows at once": rows}
    try:
        peak = peak_bytes(works["ours"], bench.device)
        taken = seconds(works, bench.size.repeats, bench.device)
    except (RuntimeError, ValueError) as failure:
        return {**row, "error": word(failure)}
    finally:
        bench.free()
    speed = {name: 2 * rows / statistics.median(t) for name, t in taken.items()}
    row |= {"noisy images per second": speed["ours"], "bare networks": speed["bare"], "peak GiB": peak / GIB}
    return {**row, "time to bare": ratio(taken["ours"], taken["bare"])}
