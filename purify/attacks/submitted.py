"""What an attacker who submits every iterate has seen by the end: how often the model was wrong on the way."""

from __future__ import annotations

import torch
from torch import Tensor

SIGNED = ("margin", "dlr")  # losses that are positive exactly where an answer is wrong


class Submitted:
    """Answers to the iterates of N samples, and how many of them were wrong.

    The draws behind a gradient are new at each iterate: for that iterate they are purifications that nobody has seen.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.asked = torch.zeros(n, dtype=torch.int64, device=device)
        self.wrong = torch.zeros_like(self.asked)

    def add(self, losses: Tensor) -> None:
        """Signed losses (N, R) of R answers each; a tie counts as right."""
        self.asked += losses.shape[1]
        self.wrong += (losses > 0).sum(1)

    def include(self, rows: Tensor, other: Submitted) -> None:
        """Add what was answered to the samples at these ``rows``."""
        self.asked[rows] += other.asked
        self.wrong[rows] += other.wrong
