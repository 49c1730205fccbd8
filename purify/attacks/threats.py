"""Threat models by name: what an attacker may do to an image, and how a radius is written."""

from __future__ import annotations

from purify.attacks.flowfield import FlowBall
from purify.attacks.norms import BALLS, Ball
from purify.attacks.perceptual import LPIPSBall, SSIMBall

PERCEPTUAL: dict[str, Ball] = {"lpips": LPIPSBall(), "ssim": SSIMBall()}

# A run has one of them: numbers of two are about different attackers, and have no worst case in common.
THREATS: dict[str, Ball] = {**BALLS, **PERCEPTUAL, "flow": FlowBall()}

NORMS = tuple(BALLS)


def stated(name: str, eps: float, between: str = " ") -> str:
    """A threat model and its radius in words: ``Linf 0.3``, ``flow 1 px``."""
    unit = THREATS[name].unit if name in THREATS else ""
    return f"{name}{between}{eps:g}{f' {unit}' if unit else ''}"
