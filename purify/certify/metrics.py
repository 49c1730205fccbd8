"""What a set of certificates is worth: certified accuracy at radii, average certified radius, abstentions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from purify.certify.base import ABSTAIN
from purify.checks import choose


def correct_radii(classes: np.ndarray, radii: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Radius of each image that is answered right, and -1 of others, float64 (N,)."""
    shapes = [np.shape(v) for v in (classes, radii, labels)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"Classes, radii and labels must be (N,), one per image, got {shapes}.")
    return np.where(np.asarray(classes) == np.asarray(labels), radii, -1.0)


def certified_accuracy(correct: np.ndarray, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of images right and certified at least to each of ``radii``; ``correct`` from :func:`correct_radii`."""
    if np.ndim(radii) != 1:
        raise ValueError(f"radii must be a sequence of radii, as [{radii}], got shape {np.shape(radii)}.")
    return (np.asarray(correct)[None] >= np.asarray(radii)[:, None]).mean(1)


def linf_share(norm: str, dimension: int) -> float:
    """What part of a radius in ``norm`` (L1 or L2) holds in L_inf, for images of ``dimension`` values: the largest cube
    in a ball of radius r has the half side r / sqrt(d) in L2, and r / d in L1.

    Raises:
        ValueError: another norm.
    """
    choose(norm, {"L1": None, "L2": None}, "norm of a certificate")
    return dimension**-0.5 if norm == "L2" else 1 / dimension


def average_certified_radius(correct: np.ndarray) -> float:
    """Mean radius over all images, 0 where wrong or abstained (ACR; Zhai et al. 2020)."""
    if np.size(correct) == 0:
        raise ValueError("There are no certificates to take the mean of.")
    return float(np.maximum(correct, 0).mean())


def abstentions(classes: np.ndarray) -> float:
    """Share of images without an answer."""
    return float((np.asarray(classes) == ABSTAIN).mean())
