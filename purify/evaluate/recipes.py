"""Evaluations of papers by name: their protocol as options of ours, and the numbers that they published.

The numbers are data with a source, never measured here, and never mixed with what is. A number is listed only where it
could be read in that source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KASSIS = "Kassis et al. 2024 (arXiv 2411.16598)"


@dataclass(frozen=True)
class Published:
    """A number of a paper.

    Attributes:
        defence, classifier: what was attacked.
        means: what was counted, and under which attack.
        clean, robust: accuracies in %; None where the source does not say.
        source: where the number was read.
    """

    defence: str
    classifier: str
    means: str
    clean: float | None
    robust: float
    source: str


@dataclass(frozen=True)
class Recipe:
    """A paper's evaluation.

    Attributes:
        about: what it is, in a line.
        options: of :class:`purify.Evaluation`.
        source: where the protocol was read.
        differs: what is not as published, or could not be read.
        published: its numbers.
    """

    about: str
    options: dict[str, Any]
    source: str
    differs: str
    published: tuple[Published, ...] = ()


def _cifar10(**options: Any) -> dict[str, Any]:
    """What all of them have in common."""
    return {"dataset": "cifar10", "model": "Standard", "threat_model": "Linf", "eps": 8 / 255, **options}


WRN28, WRN70 = "WRN-28-10", "WRN-70-16"
TABLE_1, TABLE_4 = f"{KASSIS}, table 1", f"{KASSIS}, table 4"

RECIPES: dict[str, Recipe] = {
    "diffpure-cifar10-linf": Recipe(
        "DiffPure under AutoAttack rand through the adjoint, one purification (Nie et al. 2022)",
        _cifar10(
            purifier=("diffpure",), noise_level=("constant",), t_star=0.1, steps=100, reverse="sde",
            settings={"diffpure.variant": "published"}, gradient="adjoint", attacks=("autoattack-rand",),
            attack_steps=100, eot=20, n_examples=512, judge_draws=1, budget="paper",
        ),
        "run_scripts/cifar10/run_cifar_rand_inf.sh of the authors' program (t 100, EOT 20, SDE); AutoAttack's own 100 "
        "steps",
        "the first 512 test images instead of a drawn subset; the adjoint is ours (docs/gradients.md)",
        (
            Published(
                "diffpure", WRN28, "AutoAttack, adjoint gradient, one purification", 89.02, 70.64,
                f"Nie et al. 2022, as quoted in {TABLE_4}",
            ),
        ),
    ),
    "gdmp-cifar10-linf": Recipe(
        "GDMP under PGD on the bare classifier, which does not know of the purifier (Wang et al. 2022)",
        _cifar10(
            purifier=("gdmp",), noise_level=("constant",), t_star=0.036, dt=1e-3, reverse="ddpm",
            settings={"gdmp.rounds": 4, "gdmp.distance": "mse", "gdmp.scale": 60000.0}, attacks=("transfer",),
            attack_steps=40, eot=1, n_examples=10_000, judge_draws=10, budget="paper",
        ),
        "configs/cifar10_MSE.yml of the authors' program (clf_pgd, 40 iterations, 36 steps x 4, MSE 60000, all images)",
        "PGD's steps are ours; the mean of 10 purifications is reported, and what theirs does with its 10 paths was "
        "not read",
        (
            Published(
                "gdmp", WRN28, "PGD on the bare classifier", 93.50, 90.06,
                f"Wang et al. 2022, as quoted in {TABLE_4} (blind)",
            ),
        ),
    ),
    "ssni-cifar10-linf": Recipe(
        "DiffPure with SSNI-N under PGD+EOT through a surrogate of 20 steps (Sun et al. 2025)",
        _cifar10(
            purifier=("diffpure",), noise_level=("ssni-n",), t_star=0.1, dt=1e-3, reverse="ddpm", gradient="surrogate",
            surrogate_steps=20, attacks=("pgd-eot-lee-kim",), attack_steps=200, eot=20, n_examples=512, judge_draws=1,
            seed=121, budget="paper",
        ),
        "the example commands in the README of the authors' program (200 iterations, EOT 20, 100 steps attacked "
        "through 20, seeds 121 to 123)",
        "512 images are inferred; needs --calibration; no robust accuracy could be read in a source, so none is listed",
    ),
    "agdm-cifar10-linf": Recipe(
        "AGDM under AutoAttack rand (Lin et al. 2024)",
        _cifar10(
            purifier=("agdm",), noise_level=("constant",), t_star=0.07, dt=1e-3, reverse="ddpm",
            attacks=("autoattack-rand",), attack_steps=100, eot=20, n_examples=512, judge_draws=1, budget="paper",
        ),
        "public reviews of the paper's submission (70 steps, 512 images)",
        "iterations and EOT are AutoAttack's and DiffPure's (the reviews say that they are not stated); scale and "
        "auxiliary network are not known: give --set agdm.auxiliary=",
        (
            Published(
                "agdm", "not stated", "AutoAttack", None, 78.12,
                "Lin et al. 2024 (arXiv 2403.16067), as quoted in a public review of its submission",
            ),
        ),
    ),
    "lee-kim-cifar10-linf": Recipe(
        "DiffPure in 5 steps from t* 0.2 under PGD+EOT, 200 x 20, through the exact gradient (Lee & Kim 2023)",
        _cifar10(
            purifier=("diffpure",), noise_level=("constant",), t_star=0.2, steps=5, reverse="ddpm",
            attacks=("pgd-eot-lee-kim",), attack_steps=200, eot=20, n_examples=512, judge_draws=1, budget="paper",
        ),
        "scripts/cifar10_pgd.sh and attacks/pgd_eot.py of the authors' program",
        "512 images are inferred; to which of their settings the quoted numbers belong, their source does not say",
        (
            Published(
                "diffpure", WRN28, "PGD+EOT, surrogate gradient, one purification", 90.07, 48.28,
                f"Lee & Kim 2023, as quoted in {TABLE_4}",
            ),
            Published(
                "gdmp", WRN28, "PGD+EOT, surrogate gradient, one purification", 89.96, 24.53,
                f"Lee & Kim 2023, as quoted in {TABLE_4}",
            ),
            Published(
                "gdmp", WRN28, "BPDA, one purification", 89.96, 75.59, f"Lee & Kim 2023, as quoted in {TABLE_4}"
            ),
        ),
    ),
    "diffbreak-cifar10-linf": Recipe(
        "DiffPure and GDMP under APGD, 100 x 10, exactly: in the loop, and by majority of 10 (Kassis et al. 2024)",
        _cifar10(
            purifier=("diffpure", "gdmp"), noise_level=("constant",), attacks=("apgd-margin-eot",), attack_steps=100,
            eot=10, n_examples=256, judge_draws=10, protocol=("in-loop",), budget="paper",
        ),
        "sections 3.3 and 4.2 and appendix E of the paper (100 iterations, N = 10, 256 images; t* 0.1, and 0.036 x 4); "
        "the margin loss from the README of the authors' program",
        "the first 256 test images; the networks of table 1 are WRN-70-16, give yours as --model",
        (
            Published("diffpure", WRN70, "in-loop: any of 10 at every iterate", 89.06, 17.19, TABLE_1),
            Published("diffpure", WRN70, "majority of 10", 91.02, 39.45, TABLE_1),
            Published("gdmp", WRN70, "in-loop: any of 10 at every iterate", 91.80, 7.03, TABLE_1),
            Published("gdmp", WRN70, "majority of 10", 92.19, 16.80, TABLE_1),
            Published("diffpure", WRN28, "AutoAttack, 10 steps, EOT 128, one purification", 89.46, 48.05, TABLE_4),
            Published("gdmp", WRN28, "AutoAttack, 10 steps, EOT 128, one purification", 93.36, 19.53, TABLE_4),
        ),
    ),
}  # fmt: skip
