"""Purifiers of every kind that the adaptive attack tells apart."""

import torch
from conftest import TinyClassifier, smooth_model

from purify import FixedDt, Purifier, SSNISigmoid, calibrate, diffpure
from purify.purification.guidance import AdversarialGuidance, MSEGuidance

IDS = torch.arange(7)


def network(**options):
    return AdversarialGuidance(20.0, auxiliary=TinyClassifier(size=4), layer="layers.2", **options)


def guided(**options):
    return Purifier(smooth_model(), 0.3, "ddpm", 8, guidance=network(**options))


def varying(guidance=None):
    score_model = smooth_model()
    found = calibrate(score_model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    return Purifier(score_model, SSNISigmoid(0.4, found), "ddpm", 6, guidance=guidance)


MODELS = {
    "plain": lambda: diffpure(smooth_model(), 0.3, 8, "ddpm"),
    "rounds": lambda: Purifier(smooth_model(), 0.3, "ddpm", 6, rounds=(0.5, 1.0)),
    "level": varying,
    "mse": lambda: Purifier(smooth_model(), 0.3, "ddpm", 6, guidance=MSEGuidance(1.0)),
    "network": guided,
    "diffused": lambda: guided(reference="diffused"),
    "both": lambda: varying(network()),
    "packed": lambda: diffpure(smooth_model(), 0.3, FixedDt(0.05), "ddpm"),
}
