"""What purifications cost: reverse steps, and bytes of the graphs that a gradient holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from purify.purification.gradients import fillable, saved_bytes
from purify.purification.guidance import Guide
from purify.purification.process import ReverseStep, Step
from purify.purification.purifier import Purifier, twin
from purify.purification.scorenorm import Total


def most_steps(purifier: Purifier) -> int:
    """Reverse steps, in all rounds, of a sample at the greatest noise level."""
    return sum(purifier.most_steps_by_round())


def shortened(purifier: Purifier, steps: int, rounds: int | None = None) -> Purifier:
    """The same purifier with at most so many reverse steps per round: each costs the same.

    ``rounds``: at most so many, the last ones, and the gradient is that of all that is left; default: every round.
    Unchecked: a purification of few steps may end before ``t_end``.
    """
    changed: dict[str, Any] = {"plan": purifier.plan.at_most(steps)}
    if rounds is not None:
        changed |= {"rounds": purifier.rounds[-rounds:], "engine": purifier.engine.whole()}
    return twin(purifier, **changed)


def held_bytes(purifier: Purifier, x: Tensor, rows: int, classifier: Callable[[Tensor], Tensor] | None = None) -> int:
    """Bytes of graphs that a gradient of ``rows`` images like x (1, C, H, W) in [0, 1] holds at once, about.

    Those of reverse steps, the image before every step that is recomputed, what guidance holds, and the graphs of a
    noise level that is computed by the network: kept through the backward pass of the steps, or built again after it.
    That of a ``classifier`` behind the purifier lives beside the steps that are kept, and is gone before one is built
    again.
    """
    engine, free = purifier.engine, fillable(x.device)
    steps = sum(purifier.most_steps_by_round(engine.shorter(len(purifier.rounds))))
    behind = 0 if classifier is None else linear(lambda x: _saved(classifier, x), x, rows)
    chain = behind
    if steps > 0:
        step = linear(lambda x: graph_bytes(purifier, x), x, rows)
        kept = engine.kept(step, steps, free)
        later = engine.held(step, steps, free) + linear(lambda x: rebuilt_bytes(purifier, x), x, rows)
        states = steps - kept if engine.keeps_states else 0
        chain = max(kept * step + behind, later) + states * rows * purifier.resized(x).nbytes
    term, terms = level_bytes(purifier, x, rows)
    return max(term * engine.kept(term, terms, free) + chain, engine.held(term, terms, free))


def kept_steps(purifier: Purifier, x: Tensor, rows: int) -> int:
    """Reverse steps whose graphs a gradient of ``rows`` images like x (1, C, H, W) keeps; it recomputes the others."""
    step = linear(lambda x: graph_bytes(purifier, x), x, rows)
    return purifier.engine.kept(step, most_steps(purifier), fillable(x.device))


def linear(measure: Callable[[Tensor], int], x: Tensor, rows: int) -> int:
    """What ``measure`` would be of ``rows`` images like x (1, C, H, W), by what it is of one and of two.

    Not all that a graph keeps grows with its batch: turned weights do not.
    """
    if rows == 1:  # two may not fit
        return measure(x)
    one, two = measure(x), measure(x.repeat(2, 1, 1, 1))
    return one + (rows - 1) * max(two - one, 0)


def _saved(network: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that the graph of ``network`` at x (N, C, H, W) keeps."""
    with torch.enable_grad():
        return saved_bytes(network, x.clone().requires_grad_())[1]


def graph_bytes(purifier: Purifier, x: Tensor) -> int:
    """Bytes that the graph of one reverse step of the images x (N, C, H, W) in [0, 1] keeps for a gradient."""
    return saved_bytes(*_first_step(purifier, x))[1]


def rebuilt_bytes(purifier: Purifier, x: Tensor) -> int:
    """Bytes of graph on top: of what guidance keeps of the input, and of what one step's backward pass builds."""
    step, state = _first_step(purifier, x)
    guidance, model = purifier.guidance, purifier.score_model
    of_input = 0 if guidance is None else saved_bytes(guidance.bind, (2 * purifier.resized(x) - 1).requires_grad_())[1]
    built = [step.rule.rebuilt(model, step.t)]
    if isinstance(step.look, Guide) and step.look.guidance.second_order and step.look.guidance.scale != 0:
        built.append(step.look.rebuilt(model, step.t))
    return of_input + max((saved_bytes(build, state)[1] for build in built if build is not None), default=0)


def level_bytes(purifier: Purifier, x: Tensor, rows: int) -> tuple[int, int]:
    """Bytes of the graph of one of the network evaluations that the noise level of ``rows`` images sums up, and how
    many these are; both 0 where it asks no network."""
    found: list[tuple[int, int, torch.Size]] = []

    def measure(terms: Sequence[Step], u: Tensor) -> Tensor:
        results = [saved_bytes(term, u) for term in terms]
        found.append((sum(size for _, size in results), len(terms), results[0][0].shape))
        return torch.stack([result for result, _ in results]).sum(0)

    def count(terms: Sequence[Step], u: Tensor) -> Tensor:
        found.append((0, len(terms), torch.Size()))
        return u.new_zeros(len(u), *found[0][2][1:])

    def ask(n: int, total: Total) -> None:
        u = (2 * purifier.resized(x.expand(n, *x.shape[1:])) - 1).requires_grad_()
        purifier.level.statistic(purifier.score_model, u, purifier.noise(n, x.device, range(n), 0, 0), total)

    ask(1, measure)
    if not found:
        return 0, 0
    ask(rows, count)
    (size, _, _), (_, terms, _) = found
    return rows * size // terms, terms


def _first_step(purifier: Purifier, x: Tensor) -> tuple[ReverseStep, Tensor]:
    """The first reverse step and the state that it starts from, at the greatest noise level."""
    u = (2 * purifier.resized(x) - 1).requires_grad_()
    t_star = torch.full((len(x),), purifier.level.highest, dtype=torch.float64, device=x.device)
    noise = purifier.noise(len(x), x.device, range(len(x)), 0, 0)
    one_round = purifier.process(t_star, noise, images=u).rounds[0]
    return one_round.reverse[0], one_round.diffuse(u)
