"""The largest batch that fits."""

from __future__ import annotations

import time

from gradient_fidelity import engine_gradient, peak_bytes

from card.bench import BFLOAT16, ENGINES, FLOAT32, GIB, Bench, Row, word
from purify.checks import ran_out
from purify.diffusion.reverse import EulerMaruyama


def largest_batch(bench: Bench) -> list[Row]:
    """The largest batch, doubled from the first, whose gradient fits; ``checkpoint`` in few steps, which hardly matter
    to its memory."""
    few = max(bench.size.steps // 5, 1)
    engines = (("full", bench.size.steps), ("checkpoint", few))
    return [fitting(bench, variant, *engine) for engine in engines for variant in (FLOAT32, BFLOAT16)]


def fitting(bench: Bench, variant: str, engine: str, steps: int) -> Row:
    batch, fits, peak, end = bench.size.first, 0, 0, "the limit of this script"
    while batch <= bench.size.largest:
        work = engine_gradient(bench.setting(variant, batch, steps), ENGINES[engine], EulerMaruyama())
        start = time.perf_counter()
        try:
            peak, fits = peak_bytes(work, bench.device), batch
        except (RuntimeError, ValueError) as failure:
            end = f"{batch} do not fit" if ran_out(failure) else word(failure)
            break
        finally:
            bench.free()
        if 2 * (time.perf_counter() - start) > bench.size.patience:
            end = "time"
            break
        batch *= 2
    row = {"gradient": engine, "network": variant, "steps": steps, "largest batch": fits, "peak GiB": peak / GIB}
    return {**row, "ended by": end}
