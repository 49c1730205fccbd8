"""Network calls of an answer and of its gradient: what an attack's budget is counted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from purify.purification.cost import most_steps
from purify.purification.guidance import Guidance

GRADIENT = 3  # calls that a gradient takes for each call forward: itself, backward, and what is recomputed
ADAPTIVE = 10  # network calls that a step of an adaptive solver counts as; how many it takes is not known before


@dataclass(frozen=True)
class Calls:
    """Network calls for one image: of a forward pass, and of a pass forward and backward."""

    forward: int
    gradient: int


def calls(model: Any) -> Calls:
    """What one answer of ``model`` takes; a model without a purifier is one network.

    A call is one network (score model, guide, classifier) at one image, forward or backward; a purifier counts at
    its greatest noise level, and a gradient as if all its steps were recomputed. So the count is an upper bound.
    """
    purifier = getattr(model, "purifier", None)
    if purifier is None:
        return Calls(1, GRADIENT)
    steps = most_steps(purifier)
    score = purifier.level.calls + steps * (purifier.rule.calls or ADAPTIVE)
    guide, once = _guidance(purifier.guidance)
    guides = steps * guide + once
    # Held constant, what guides is asked in the pass and in its recomputation, and has no backward pass.
    times = GRADIENT if purifier.guidance is None or purifier.guidance.second_order else GRADIENT - 1
    m = model.purifications
    return Calls(m * (score + guides + 1), m * (GRADIENT * (score + 1) + times * guides))


def _guidance(guidance: Guidance | None) -> tuple[int, int]:
    """Calls for grad D in one step, and once per purification for what came in."""
    if guidance is None or guidance.scale == 0:
        return 0, 0
    through = int(guidance.point == "u0_hat" and guidance.through_score)  # backward through the score network
    if guidance.network is None:
        return through, 0
    each_reference = int(guidance.reference == "diffused")
    return 2 + through + each_reference, 1 - each_reference
