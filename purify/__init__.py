"""purify: diffusion-based adversarial purification, attacked with exact gradients and reported honestly."""

from typing import TYPE_CHECKING, Any

from purify import compat
from purify.checkpoints import load_score_model
from purify.diffusion.langevin import Langevin
from purify.diffusion.noise import Noise, derive_seed
from purify.diffusion.schedule import ContinuousVP, DiscreteVP
from purify.diffusion.score import ScoreModel
from purify.networks.edm import EDMDenoiser
from purify.presets import (
    PURIFIERS,
    agdm,
    diffap,
    diffpure,
    freqpure,
    gdmp,
    gns,
    heterogeneous,
    langevin,
    likelihood,
    mimicdiffusion,
)
from purify.purification.blackbox import BlackBox, BPDAClassifier
from purify.purification.classify import DiffusionClassifier
from purify.purification.defended import DefendedClassifier
from purify.purification.frequency import FrequencyProjection
from purify.purification.guidance import AdversarialGuidance, MSEGuidance, SSIMGuidance
from purify.purification.heterogeneous import HeterogeneousNoise
from purify.purification.levels import Constant, SSNILinear, SSNISigmoid
from purify.purification.likelihood import LikelihoodAscent
from purify.purification.plans import FixedDt, FixedSteps, Held
from purify.purification.pulled import ManhattanPull, MediatorPull
from purify.purification.purifier import Purifier
from purify.purification.scorenorm import Calibration, ScoreNorm, calibrate
from purify.wrap import wrap

if TYPE_CHECKING:
    from purify.evaluate.description import Certification, Evaluation, MinimumDistortion

__version__ = "0.2.0"

compat.install()


def __getattr__(name: str) -> Any:
    """What needs half a second of evaluation's libraries, when it is asked for."""
    if name not in ("Certification", "Evaluation", "MinimumDistortion"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from purify.evaluate import description

    return getattr(description, name)


__all__ = [
    "PURIFIERS",
    "AdversarialGuidance",
    "BPDAClassifier",
    "BlackBox",
    "Calibration",
    "Certification",
    "Constant",
    "ContinuousVP",
    "DefendedClassifier",
    "DiffusionClassifier",
    "DiscreteVP",
    "EDMDenoiser",
    "Evaluation",
    "FixedDt",
    "FixedSteps",
    "FrequencyProjection",
    "Held",
    "HeterogeneousNoise",
    "Langevin",
    "LikelihoodAscent",
    "MSEGuidance",
    "ManhattanPull",
    "MediatorPull",
    "MinimumDistortion",
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
    "diffap",
    "diffpure",
    "freqpure",
    "gdmp",
    "gns",
    "heterogeneous",
    "langevin",
    "likelihood",
    "load_score_model",
    "mimicdiffusion",
    "wrap",
]
