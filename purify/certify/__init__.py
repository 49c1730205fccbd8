"""Certificates: radii within which the answer of a smoothed classifier provably does not change.

A certificate sees only a function that maps noisy images to class counts.
"""

from purify.certify.base import ABSTAIN, Certificate, Certifier
from purify.certify.counts import NoisyCounts, NoisyModel
from purify.certify.densepure import DensePure, dense_smoothing
from purify.certify.gaussian import OneShotDenoised, Smooth, denoised_smoothing
from purify.certify.multiscale import Cascade
from purify.certify.sampling import Anytime, Draws, EarlyStop
from purify.certify.splitting import DSSN, SSN, to_grid

__all__ = [
    "ABSTAIN",
    "DSSN",
    "SSN",
    "Anytime",
    "Cascade",
    "Certificate",
    "Certifier",
    "DensePure",
    "Draws",
    "EarlyStop",
    "NoisyCounts",
    "NoisyModel",
    "OneShotDenoised",
    "Smooth",
    "denoised_smoothing",
    "dense_smoothing",
    "to_grid",
]
