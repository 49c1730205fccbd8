"""Network calls of an answer and of its gradient: what an attack's budget is counted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from purify.purification.cost import most_steps

GRADIENT = 3  # calls that a gradient takes for each call forward: itself, backward, and what is recomputed
ADAPTIVE = 10  # network calls that a step of an adaptive solver counts as; how many it takes is not known before


@dataclass(frozen=True)
class Calls:
    """Network calls for one image: of a forward pass, and of a pass forward and backward."""

    forward: int
    gradient: int


def own_calls(classifier: Any) -> int:
    """Network calls of an answer of a classifier alone: one, or as many as it says (a diffusion classifier)."""
    return int(getattr(classifier, "network_calls", 1))


def calls(model: Any) -> Calls:
    """What one answer of ``model`` takes; a model without a purifier is one network, or as many as it says.

    A call is one network (score model, guide, classifier) at one image, forward or backward; a purifier counts at
    its greatest noise level, and a gradient as if all its steps were recomputed. So the count is an upper bound.
    """
    purifier = getattr(model, "purifier", None)
    if purifier is None:
        own = own_calls(model)
        return Calls(own, GRADIENT * own)
    steps = most_steps(purifier)
    score = purifier.level.calls + steps * (purifier.rule.calls or ADAPTIVE)
    guide, once = (0, 0) if purifier.guidance is None else purifier.guidance.calls
    guides = steps * guide + once
    # Held constant, what guides is asked in the pass and in its recomputation, and has no backward pass.
    times = GRADIENT if purifier.guidance is None or purifier.guidance.second_order else GRADIENT - 1
    m, own = model.purifications, own_calls(model.classifier)
    return Calls(m * (score + guides + own), m * (GRADIENT * (score + own) + times * guides))
