"""How much memory is free, and work on as many rows at once as fit into it."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from purify.checks import ran_out

T = TypeVar("T")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, with what torch keeps for reuse there."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Parts:
    """Work on rows, at most ``size`` at once: what does not fit into memory is halved, and so is all that follows.

    A sample's result does not depend on how many are worked on at once, up to rounding, so nothing else changes.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def of(self, rows: Tensor, work: Callable[[Tensor], T]) -> Iterator[tuple[Tensor, T]]:
        """Consecutive parts of ``rows`` with what ``work`` makes of each.

        Raises:
            RuntimeError: ``work`` raised it; a single row does not fit, or there was another reason.
        """
        start = 0
        while start < len(rows):
            part = rows[start : start + self.size]
            try:
                found = work(part)
            except RuntimeError as error:
                if len(part) == 1 or not ran_out(error):
                    raise
            else:
                yield part, found
                start += len(part)
                continue
            # Only here, where the error and the frames that it holds are gone, is their memory free.
            self._halve(part)

    def _halve(self, part: Tensor) -> None:
        self.size = len(part) // 2
        if part.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()
        warnings.warn(
            f"{len(part)} images at once do not fit into memory; going on with {self.size}. Results are the same; "
            f"--max-rows {self.size} saves the attempt.",
            stacklevel=4,
        )
