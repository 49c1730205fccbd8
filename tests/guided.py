"""Purifiers with every kind of guidance under every reverse rule, in float64."""

import torch
from conftest import TinyClassifier, smooth_model

from purify import Purifier
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, ProbabilityFlow
from purify.purification.guidance import AdversarialGuidance, MSEGuidance, SSIMGuidance

IDS = range(7)
AUXILIARY = TinyClassifier()
RULES = {
    "sde": EulerMaruyama(),
    "ddpm": Ancestral(),
    "ddim": DDIM(0.0),
    "ddim-half": DDIM(0.5),
    "ode": ProbabilityFlow("midpoint"),
}
KINDS = {
    "mse": lambda scale: MSEGuidance(scale),
    "mse-input": lambda scale: MSEGuidance(scale, reference="input", growth="constant"),
    "mse-u0": lambda scale: MSEGuidance(scale, point="u0_hat", reference="input", through_score=True),
    "ssim": lambda scale: SSIMGuidance(scale, sigma=0.5),
    "agdm": lambda scale: AdversarialGuidance(scale, auxiliary=AUXILIARY.double()),
    "agdm-through": lambda scale: AdversarialGuidance(scale, auxiliary=AUXILIARY.double(), through_score=True),
    "agdm-layer": lambda scale: AdversarialGuidance(
        scale, auxiliary=AUXILIARY.double(), layer="layers.1", point="u_t", reference="diffused"
    ),
}
STRONG = {"ssim": 3.0}


def make(kind=None, rule="ddpm", scale=20.0, steps=4, level=0.3, **options):
    """A purifier with one of ``KINDS``, or without guidance, under one of ``RULES``."""
    guidance = None if kind is None else KINDS[kind](STRONG.get(kind, scale) if scale else 0.0)
    options = {"clip": False, **options}
    return Purifier(smooth_model(torch.float64), level, RULES[rule], steps, guidance=guidance, **options)


def assert_scale_zero_is_plain(make, rule, kind, images):
    """Of a ``make(kind, rule, scale)``: scale 0 gives the bits of no guidance, and its default scale does not."""
    x = images.double()
    plain, off, on = (make(*what)(x, sample_ids=IDS) for what in ((None, rule), (kind, rule, 0.0), (kind, rule)))
    assert torch.equal(plain, off)
    assert (on - plain).abs().max() > 1e-4
