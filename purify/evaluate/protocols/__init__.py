"""Protocols: ways to judge a purified defence, each under its name, from one run where their definitions allow.

A protocol is a small file with a class, and a line in ``PROTOCOLS``.
"""

from __future__ import annotations

from purify.evaluate.protocols.averaged import Averaged
from purify.evaluate.protocols.base import AVERAGES, Attacked, Effort, Line, Protocol, Stage
from purify.evaluate.protocols.deterministic import Deterministic, KnownNoise
from purify.evaluate.protocols.fresh import Fresh
from purify.evaluate.protocols.in_loop import InLoop

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (Fresh(), Deterministic(), InLoop(), Averaged())}

__all__ = [
    "AVERAGES",
    "PROTOCOLS",
    "Attacked",
    "Averaged",
    "Deterministic",
    "Effort",
    "Fresh",
    "InLoop",
    "KnownNoise",
    "Line",
    "Protocol",
    "Stage",
]
