"""purify: diffusion-based adversarial purification, attacked with exact gradients and reported honestly."""

from purify import compat
from purify.defended import DefendedClassifier
from purify.noise import Noise, derive_seed
from purify.presets import PURIFIERS, diffpure
from purify.purifier import Purifier
from purify.schedule import ContinuousVP, DiscreteVP
from purify.score import ScoreModel

__version__ = "0.1.0"

compat.install()

__all__ = [
    "PURIFIERS",
    "ContinuousVP",
    "DefendedClassifier",
    "DiscreteVP",
    "Noise",
    "Purifier",
    "ScoreModel",
    "derive_seed",
    "diffpure",
]
