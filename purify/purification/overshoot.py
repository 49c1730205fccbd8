"""How far guidance overshoots: a mistake of a defence, and what makes its exact gradient a poor guide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from purify.diffusion.score import Prediction, ScoreModel, per_sample
from purify.purification.guidance import Guide
from purify.purification.process import ReverseStep
from purify.purification.purifier import Purifier

STABLE = 2.0  # a step u - k v (v'u) ends on the other side of where D is least for k > 1, and farther away for k > 2
ITERATIONS = 12  # of the power iteration


def overshoot(
    purifier: Purifier,
    x: Tensor,
    *,
    sample_ids: Tensor | Sequence[int] | None = None,
    draw: int | Tensor = 0,
    seed: int = 0,
    iterations: int = ITERATIONS,
) -> Tensor:
    """k of every guided step: the step moves the state by about ``I - k v v'`` where guidance bends it most.

    v is the direction in which the guidance's shift of a step changes most with the state, and -k by how much, with
    what the score network says held constant; by power iteration, from below. Arguments as for
    :meth:`~purify.purification.purifier.Purifier.forward`.

    Returns:
        k, float64 (steps, N), along one purification of each image; NaN where a step is not guided.

    Raises:
        ValueError: the purifier has no guidance, or its samples are not in step.
    """
    if purifier.guidance is None:
        raise ValueError("Only guidance can overshoot, and this purifier has none.")
    if purifier.rule.held:
        raise ValueError("Overshoot is measured where steps go down in time; this rule holds its time.")
    u = 2 * purifier.resized(x) - 1
    noise = purifier.noise(len(x), x.device, sample_ids, draw, seed)
    with torch.no_grad():
        t_star = purifier.level.level(purifier.statistic(u, noise))
        found = []
        for one_round in purifier.process(t_star, noise, images=u).rounds:
            state = one_round.diffuse(u)
            if any(len(step) != len(x) for step in one_round.reverse):
                raise ValueError("Overshoot is measured where all samples are in step; give a number of steps, no dt.")
            for step in one_round.reverse:
                found.append(_k(step, state, iterations))
                state = step(state)
            u = state
    return torch.stack(found)


def warn_overshoot(purifier: Purifier, x: Tensor, seed: int = 0) -> float | None:
    """Warn if guidance overshoots by more than a stable step may; the largest k, or None where it cannot be asked."""
    if purifier.guidance is None or purifier.guidance.scale == 0:
        return None
    try:
        k = overshoot(purifier, x, sample_ids=range(len(x)), seed=seed)
    except ValueError:
        return None
    guided = k[~k.isnan()]
    if len(guided) == 0:
        return None
    largest, share = guided.max().item(), (guided > STABLE).double().mean().item()
    if largest > STABLE:
        warnings.warn(
            f"The guidance overshoots: k is {largest:.3g} in some step, above {STABLE:g} in {100 * share:.0f} % of "
            "them, so that it drives states away from what it pulls to; lower its scale or take more steps.",
            stacklevel=2,
        )
    return largest


def _k(step: ReverseStep, state: Tensor, iterations: int) -> Tensor:
    look = step.look
    if not isinstance(look, Guide):
        return torch.full((len(state),), torch.nan, dtype=torch.float64, device=state.device)
    prediction = step.model.predict(state, step.t)
    n = len(state)
    v = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=state.dtype).to(state.device)
    unguided = _shifted(step, state, prediction, None)
    k = torch.full((n,), torch.nan, dtype=torch.float64, device=state.device)
    for _ in range(iterations):
        v = v / _length(v)
        # Symmetric, because D's second derivative is, and the rule shifts by a multiple of the push.
        turned = look.curvature(step.model, prediction, state, step.t, v)
        if turned is None:
            return k
        moved = unguided - _shifted(step, state, prediction, turned)
        k = (v * moved).flatten(1).sum(1).double()
        v = torch.where(_length(moved) > 0, moved, v)
    return k


def _shifted(step: ReverseStep, state: Tensor, prediction: Prediction, push: Tensor | None) -> Tensor:
    def look(model: ScoreModel, u: Tensor, t: Tensor) -> tuple[Prediction, Tensor | None]:
        return prediction, push

    return step.rule(step.model, state, step.t, step.s, None, look)


def _length(v: Tensor) -> Tensor:
    return per_sample(v.flatten(1).norm(dim=1), v)
