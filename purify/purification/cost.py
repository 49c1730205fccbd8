"""What purifications cost: reverse steps, and bytes of the graphs that a gradient holds."""

from __future__ import annotations

import torch
from torch import Tensor

from purify.purification.gradients import fillable, saved_bytes
from purify.purification.guidance import Guide
from purify.purification.process import ReverseStep
from purify.purification.purifier import Purifier, twin


def most_steps(purifier: Purifier) -> int:
    """Reverse steps, in all rounds, of a sample at the greatest noise level."""
    return sum(purifier.most_steps_by_round())


def shortened(purifier: Purifier, steps: int) -> Purifier:
    """The same purifier with at most so many reverse steps per round: each costs the same.

    Unchecked: a purification of few steps may end before ``t_end``.
    """
    return twin(purifier, plan=purifier.plan.at_most(steps))


def held_bytes(purifier: Purifier, x: Tensor, rows: int) -> int:
    """Bytes of step graphs that a gradient of ``rows`` images like x (1, C, H, W) in [0, 1] holds at once."""
    steps = sum(purifier.most_steps_by_round(purifier.engine.shorter(len(purifier.rounds))))
    if steps == 0:
        return 0
    held = purifier.engine.held(rows * graph_bytes(purifier, x), steps, fillable(x.device))
    return held + rows * rebuilt_bytes(purifier, x)


def graph_bytes(purifier: Purifier, x: Tensor) -> int:
    """Bytes that the graph of one reverse step of the images x (N, C, H, W) in [0, 1] keeps for a gradient."""
    return saved_bytes(*_first_step(purifier, x))[1]


def rebuilt_bytes(purifier: Purifier, x: Tensor) -> int:
    """Bytes of graph on top: of what guidance keeps of the input, and of what one step's backward pass builds."""
    step, state = _first_step(purifier, x)
    guidance, model = purifier.guidance, purifier.score_model
    of_input = 0 if guidance is None else saved_bytes(guidance.bind, (2 * x - 1).requires_grad_())[1]
    built = [step.rule.rebuilt(model, step.t)]
    if isinstance(step.look, Guide) and step.look.guidance.second_order and step.look.guidance.scale != 0:
        built.append(step.look.rebuilt(model, step.t))
    return of_input + max((saved_bytes(build, state)[1] for build in built if build is not None), default=0)


def _first_step(purifier: Purifier, x: Tensor) -> tuple[ReverseStep, Tensor]:
    """The first reverse step and the state that it starts from, at the greatest noise level."""
    u = (2 * purifier.resized(x) - 1).requires_grad_()
    t_star = torch.full((len(x),), purifier.level.highest, dtype=torch.float64, device=x.device)
    noise = purifier.noise(len(x), x.device, range(len(x)), 0, 0)
    one_round = purifier.process(t_star, noise, images=u).rounds[0]
    return one_round.reverse[0], one_round.diffuse(u)
