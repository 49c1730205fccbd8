"""Network calls of an answer and of its gradient: what an attack's budget is counted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from purify.purification.cost import most_steps, shortened
from purify.purification.purifier import Purifier

GRADIENT = 3  # calls that a gradient takes for each call forward: itself, backward, and what is recomputed
ADAPTIVE = 10  # network calls that a step of an adaptive solver counts as; how many it takes is not known before


@dataclass(frozen=True)
class Calls:
    """Network calls for one image: of a forward pass, and of a pass forward and backward.

    ``classifier``, ``statistic``: those of the forward pass that the classifier takes, and the statistic behind t*(x).
    """

    forward: int
    gradient: int
    classifier: int
    statistic: int = 0


def own_calls(classifier: Any) -> int:
    """Network calls of an answer of a classifier alone: one, or as many as it says (a diffusion classifier)."""
    return int(getattr(classifier, "network_calls", 1))


def is_purified(model: Any) -> bool:
    """Whether calls of a purifier are in the model's; a classifier may have something else by that name."""
    parts = ("purifications", "classifier")
    return isinstance(getattr(model, "purifier", None), Purifier) and all(hasattr(model, part) for part in parts)


def calls(model: Any, steps: int | None = None) -> Calls:
    """What one answer of ``model`` takes; a model without a purifier is one network, or as many as it says.

    A call is one network (score model, guide, classifier) at one image, forward or backward; a purifier counts at
    its greatest noise level, and a gradient as if all its steps were recomputed. So the count is an upper bound.
    ``steps``: of a purifier with so many in each round at most; default: as it is.
    """
    if not is_purified(model):
        own = own_calls(model)
        return Calls(own, GRADIENT * own, own)
    purifier, m = model.purifier, model.purifications
    taken = most_steps(purifier if steps is None else shortened(purifier, steps))
    score = purifier.level.calls + taken * (purifier.rule.calls or ADAPTIVE)
    guide, once = (0, 0) if purifier.guidance is None else purifier.guidance.calls
    guides = taken * guide + once
    # Held constant, what guides is asked in the pass and in its recomputation, and has no backward pass.
    times = GRADIENT if purifier.guidance is None or purifier.guidance.second_order else GRADIENT - 1
    own = own_calls(model.classifier)
    gradient = GRADIENT * (score + own) + times * guides
    return Calls(m * (score + guides + own), m * gradient, m * own, m * purifier.level.calls)
