"""The machine that work runs on: its threads, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from purify.checks import check_count


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call on ``device``; on a GPU its own kernels, all of them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; torchrun would set one if nobody says otherwise."""
    if threads is not None:
        check_count(threads, "threads")
        torch.set_num_threads(threads)
