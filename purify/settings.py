"""What a purifier is set to on a data set unless told otherwise: one table, for Python and the command line alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from purify.diffusion.reverse import DDIM, ReverseRule
from purify.purification.plans import FixedDt, Held, Plan


@dataclass(frozen=True)
class Setting:
    """Settings of a purifier on a data set.

    Attributes:
        t_star: noise level in (0, 1]; the base level of a rule that varies it.
        steps: reverse steps, or their plan.
        reverse: the reverse rule, by name where its parameters are the usual ones.
        source: where the numbers come from.
        own: the purifier's other parameters.
    """

    t_star: float
    steps: int | Plan
    reverse: str | ReverseRule
    source: str
    own: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """As arguments of the preset."""
        return {"t_star": self.t_star, "steps": self.steps, "reverse": self.reverse, **self.own}


THOUSANDTHS = FixedDt(1e-3)
TUNED = "tuned on the embedded networks; docs/leaderboard"
TRIED = "tuned on digits 40 to 135 of the test images; its page in docs"
GRID = "benchmarks/defence_settings.py, test images 5000 to 5015; docs/defences"
NIE = "Nie et al. 2022"
WANG = "Wang et al. 2022"
LIN = "Lin et al. 2024; t* of DiffPure"
LEE = "Lee & Kim 2023"
PEI = "program of Pei et al. 2025"
ZHANG = "program of Zhang et al. 2024"
PEI_25 = "program of Pei et al. 2025 (heterogeneous noise)"
CHEN = "program of Chen et al. 2024"
HILL = "Hill et al. 2021"
SONG = "program of Song et al. 2024"
STOCHASTIC = DDIM(1.0)
ALL_STEPS = {"t_min": 0.0, "t_max": 1.0}

SETTINGS: dict[tuple[str, str], Setting] = {
    ("diffpure", "digits"): Setting(0.18, 10, "ddpm", TUNED),
    ("diffpure", "fashion_mnist"): Setting(0.2, 10, "ddpm", TUNED),
    ("diffpure", "cifar10"): Setting(0.1, THOUSANDTHS, "sde", NIE),
    ("diffpure", "cifar100"): Setting(0.1, THOUSANDTHS, "sde", f"{NIE}, CIFAR-10"),
    ("diffpure", "imagenet"): Setting(0.15, THOUSANDTHS, "sde", NIE),
    ("gdmp", "digits"): Setting(0.1, 10, "ddpm", TUNED, {"scale": 1500.0}),
    ("gdmp", "fashion_mnist"): Setting(0.1, 10, "ddpm", TUNED, {"scale": 2000.0}),
    ("gdmp", ""): Setting(0.036, THOUSANDTHS, "ddpm", f"{WANG}, CIFAR-10"),
    ("agdm", "digits"): Setting(0.2, 10, "ddpm", TUNED, {"scale": 100.0, "auxiliary": "digits-guide"}),
    ("agdm", "fashion_mnist"): Setting(0.2, 10, "ddpm", TUNED, {"scale": 200.0, "auxiliary": "fashion_mnist-guide"}),
    ("agdm", ""): Setting(0.1, THOUSANDTHS, "ddpm", f"{LIN}, CIFAR-10"),
    ("gns", "digits"): Setting(0.18, 10, "ddpm", TUNED),
    ("gns", "fashion_mnist"): Setting(0.2, 10, "ddpm", TUNED),
    ("gns", ""): Setting(0.125, THOUSANDTHS, "ddpm", f"{LEE}, CIFAR-10"),
    ("freqpure", "digits"): Setting(0.2, 10, "ddpm", TRIED, {"amplitude_radius": 1.0, "phase_radius": 1.0}),
    ("freqpure", "fashion_mnist"): Setting(0.2, 10, "ddpm", GRID, {"amplitude_radius": 1.0, "phase_radius": 1.0}),
    ("freqpure", ""): Setting(1.0, 100, STOCHASTIC, f"{PEI}, CIFAR-10"),
    ("diffap", "digits"): Setting(0.2, 5, "random", TRIED, {"scale": 4.0}),
    ("diffap", "fashion_mnist"): Setting(0.2, 5, "random", GRID, {"scale": 15.0}),
    ("diffap", ""): Setting(1.0, 5, "random", f"{ZHANG}, CIFAR-10"),
    ("mimicdiffusion", "digits"): Setting(0.2, 10, STOCHASTIC, TRIED, {"scale": 1.0, **ALL_STEPS}),
    ("mimicdiffusion", "fashion_mnist"): Setting(0.2, 10, STOCHASTIC, GRID, {"scale": 4.0, **ALL_STEPS}),
    ("mimicdiffusion", ""): Setting(1.0, 100, STOCHASTIC, f"{SONG}, CIFAR-10"),
    ("heterogeneous", "digits"): Setting(0.25, 10, "ddim", TRIED, {"threshold": 0.6, "auxiliary": "digits-standard"}),
    ("heterogeneous", "fashion_mnist"): Setting(
        0.25, 10, "ddim", GRID, {"threshold": 0.5, "auxiliary": "fashion_mnist-standard"}
    ),
    ("heterogeneous", ""): Setting(0.2, 100, "ddim", f"{PEI_25}, CIFAR-10"),
    ("likelihood", "digits"): Setting(0.145, Held(10, spread=0.185), "likelihood", TRIED),
    ("likelihood", "fashion_mnist"): Setting(0.145, Held(10, spread=0.185), "likelihood", GRID),
    ("likelihood", ""): Setting(0.145, Held(5, spread=0.185), "likelihood", f"{CHEN}, CIFAR-10"),
    ("langevin", "digits"): Setting(0.05, 20, "langevin", TRIED, {"step": 0.1}),
    ("langevin", "fashion_mnist"): Setting(0.05, 20, "langevin", GRID, {"step": 0.15}),
    ("langevin", ""): Setting(0.01, 1500, "langevin", f"{HILL}, CIFAR-10; t* ours"),
    ("", ""): Setting(0.1, THOUSANDTHS, "sde", f"{NIE}, CIFAR-10"),
}


def setting(purifier: str, dataset: str) -> Setting:
    """The settings of the purifier on the data set.

    Where the pair is not in the table: those of its paper on CIFAR-10, for a purifier without a paper DiffPure's.
    """
    keys = (purifier, dataset), (purifier, ""), ("diffpure", dataset), ("", "")
    return next(SETTINGS[key] for key in keys if key in SETTINGS)


def usual_tau(dataset: str) -> tuple[float, str]:
    """Temperature of SSNI-N and its unit: one standard deviation, or on CIFAR-10 the paper's (inferred)."""
    return (20.0, "norm") if dataset == "cifar10" else (1.0, "std")
