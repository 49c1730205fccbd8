"""purify: diffusion-based adversarial purification, attacked with exact gradients and reported honestly."""

from purify import compat
from purify.checkpoints import load_score_model
from purify.diffusion.noise import Noise, derive_seed
from purify.diffusion.schedule import ContinuousVP, DiscreteVP
from purify.diffusion.score import ScoreModel
from purify.networks.edm import EDMDenoiser
from purify.presets import PURIFIERS, agdm, diffpure, gdmp, gns
from purify.purification.defended import DefendedClassifier
from purify.purification.guidance import AdversarialGuidance, MSEGuidance, SSIMGuidance
from purify.purification.levels import Constant, SSNILinear, SSNISigmoid
from purify.purification.plans import FixedDt, FixedSteps
from purify.purification.purifier import Purifier
from purify.purification.scorenorm import Calibration, ScoreNorm, calibrate
from purify.wrap import wrap

__version__ = "0.1.0"

compat.install()

__all__ = [
    "PURIFIERS",
    "AdversarialGuidance",
    "Calibration",
    "Constant",
    "ContinuousVP",
    "DefendedClassifier",
    "DiscreteVP",
    "EDMDenoiser",
    "FixedDt",
    "FixedSteps",
    "MSEGuidance",
    "Noise",
    "Purifier",
    "SSIMGuidance",
    "SSNILinear",
    "SSNISigmoid",
    "ScoreModel",
    "ScoreNorm",
    "agdm",
    "calibrate",
    "derive_seed",
    "diffpure",
    "gdmp",
    "gns",
    "load_score_model",
    "wrap",
]
