"""What purifiers are set to on the embedded data unless told otherwise; DiffPure's levels stand with the data sets."""

from __future__ import annotations

from typing import Any

# By (purifier, data set); where a pair is missing, the purifier's own defaults hold, those of its paper.
USUAL: dict[tuple[str, str], dict[str, Any]] = {
    ("gdmp", "digits"): {"t_star": 0.1, "scale": 1500.0},
    ("gdmp", "fashion_mnist"): {"t_star": 0.1, "scale": 2000.0},
    ("agdm", "digits"): {"t_star": 0.2, "scale": 100.0, "auxiliary": "digits-guide"},
    ("agdm", "fashion_mnist"): {"t_star": 0.2, "scale": 200.0, "auxiliary": "fashion_mnist-guide"},
    ("gns", "digits"): {"t_star": 0.18},
    ("gns", "fashion_mnist"): {"t_star": 0.2},
}


def usual(purifier: str, dataset: str) -> dict[str, Any]:
    """Parameters of the purifier on the data set; ``t_star`` among them where it is not DiffPure's."""
    return USUAL.get((purifier, dataset), {})


def usual_tau(dataset: str) -> tuple[float, str]:
    """Temperature of SSNI-N and its unit: one standard deviation, or on CIFAR-10 the paper's (inferred)."""
    return (20.0, "norm") if dataset == "cifar10" else (1.0, "std")
