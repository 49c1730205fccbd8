"""Budgets of attacks and of certificates by name: what `--budget` means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from purify.checks import choose


@dataclass(frozen=True)
class Budget:
    """Steps and EOT draws of the gradient attacks and of AutoAttack, queries of black-box attacks, samples attacked,
    purifications that judge each image, network calls of the adaptive attack."""

    steps: int
    eot: int
    n_examples: int
    judge_draws: int
    autoattack_steps: int
    autoattack_eot: int
    queries: int
    calls: int


BUDGETS: dict[str, Budget] = {
    # The demo: enough to see the picture, too little to publish.
    "quick": Budget(20, 4, 128, 10, 10, 4, 100, 3000),
    # What a 4-core CPU finishes in about 20 minutes on the embedded data.
    "standard": Budget(40, 10, 256, 20, 20, 10, 500, 10_000),
    # For a GPU: Lee & Kim 2023 and AutoAttack's rand.
    "paper": Budget(200, 20, 512, 20, 100, 20, 5000, 100_000),
}

# Data sets whose networks are dearer on a CPU.
DEARER: dict[tuple[str, str], dict[str, int]] = {
    ("quick", "fashion_mnist"): {"steps": 10, "n_examples": 64},
    ("standard", "fashion_mnist"): {"steps": 20, "eot": 8, "n_examples": 128},
}


# n0, n, samples, attacked samples of certificates.
DRAWS: dict[str, tuple[int, int, int, int]] = {
    "quick": (50, 500, 32, 4),  # the demo, too little to publish
    "standard": (100, 10_000, 200, 16),
    "paper": (100, 100_000, 500, 50),
}


def budget(name: str, dataset: str) -> Budget:
    """The budget of this name on a data set."""
    return replace(choose(name, BUDGETS, "budget"), **DEARER.get((name, dataset), {}))


def reduced(stated: Mapping[str, Any], dataset: str) -> bool:
    """Whether a run's budget (preset, steps, eot) is too small to quote its numbers: below ``standard`` on the data
    set."""
    least = budget("standard", dataset)
    return stated["preset"] == "quick" or stated["steps"] < least.steps or stated["eot"] < least.eot
