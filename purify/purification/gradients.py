"""How the loop of purification steps is differentiated.

``Full`` and ``Checkpoint`` are exact: their gradient is that of the discrete process that was run, at the times
and with the noise that were run, and they can be differentiated again. ``Adjoint``, ``BPDA`` and ``Surrogate``
are approximations, offered for comparison and as attack tools; ``engine.exact`` tells.

Every engine gives the same forward values, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint_adjoint

from purify.checks import check_count
from purify.diffusion.reverse import OneShot, ProbabilityFlow
from purify.memory import free_bytes
from purify.purification.plans import FixedSteps, Plan
from purify.purification.process import Evaluate, Process, ReverseStep, Round, Step
from purify.purification.rebuilt import Rebuilt, Straight
from purify.purification.scorenorm import plain_total

DEFAULT_BUDGET = 2**30  # bytes of step graphs that are kept unless something else is asked for
AUTO = "auto"  # the budget that takes what is free
AUTO_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory: a CPU's is shared with other programs
AUTO_LEFT = 3  # steps for whose graphs it leaves room: the one that is rebuilt, and what a backward pass works with


@dataclass(frozen=True)
class Shorter:
    """A process cut short: the indices of the ``rounds`` that are kept, and the steps that each has at most."""

    rounds: Sequence[int]
    steps: Sequence[int]


Build = Callable[[Shorter | None], Process]


@dataclass(frozen=True)
class Task:
    """What an engine is asked to differentiate: the plan, how many rounds of it, and whether its steps are guided."""

    plan: Plan
    rounds: int = 1
    guided: bool = False


class GradientEngine(ABC):
    """Runs a process on u (N, C, H, W) in [-1, 1] space and decides what its gradient is.

    ``build(None)`` gives the process, ``build(shorter)`` one cut short.
    """

    exact: ClassVar[bool] = True
    through_level: ClassVar[bool] = True  # whether gradients flow through the noise levels

    @abstractmethod
    def __call__(self, build: Build, u: Tensor) -> Tensor: ...

    def total(self, terms: Sequence[Step], u: Tensor) -> Tensor:
        """Sum of independent network evaluations of u, which noise levels are computed from; graphs are recomputed."""
        evaluate = recompute if torch.is_grad_enabled() else keep
        return plain_total([partial(evaluate, term) for term in terms], u)

    def shorter(self, rounds: int) -> Shorter | None:
        """What a gradient goes through of a process of so many rounds; None: all of it."""
        return None

    keeps_states: ClassVar[bool] = False  # whether the image before every step stays until the backward pass

    def kept(self, step_bytes: int, steps: int, free: int = 0) -> int:
        """How many of ``steps`` step graphs of ``step_bytes`` bytes stay until the backward pass.

        ``free``: bytes that they may fill under the budget ``auto``.
        """
        return 0

    def held(self, step_bytes: int, steps: int, free: int = 0) -> int:
        """Bytes of step graphs that a gradient through them holds at once: all that are kept, or, once the last steps'
        are gone, the first step's and one that is built again."""
        kept = self.kept(step_bytes, steps, free)
        return step_bytes * max(kept, min(kept, 1) + (kept < steps))

    def whole(self) -> GradientEngine:
        """The engine of a process that is short already: where this one cuts it, one that does not."""
        return self

    def check(self, task: Task) -> None:  # noqa: B027 - most engines take any task
        """Raise ValueError if the engine cannot differentiate ``task``."""


def run(steps: Sequence[Step], u: Tensor) -> Tensor:
    """Apply the steps in order."""
    for step in steps:
        u = step(u)
    return u


def keep(step: Step, u: Tensor) -> Tensor:
    """One step, its graph kept."""
    return step(u)


def recompute(step: Step, u: Tensor) -> Tensor:
    """One step, of which only the input is kept; its graph is built again in the backward pass."""
    if isinstance(step, ReverseStep) and step.frozen and unpack_dual(u).tangent is None:
        return _rebuilt(step, u)
    # What a step closes over, weights among it, gets its gradients. Steps draw keyed noise, so no generator state
    # needs to be kept or restored.
    return checkpoint(step, u, use_reentrant=False, preserve_rng_state=False)


def _rebuilt(step: ReverseStep, u: Tensor) -> Tensor:
    """The first pass without a graph, the second without hooks: a tenth to a fifth of the time less."""
    variables = step.variables()

    def moved(u: Tensor, *values: Tensor) -> tuple[Tensor]:
        now = step.at(dict(zip(variables, values, strict=True)))
        return (now.for_graph(u) if torch.is_grad_enabled() else now(u),)  # only the first pass is without a graph

    return Rebuilt.apply(moved, u, *variables.values())[0]


def saved_bytes(step: Step, u: Tensor) -> tuple[Tensor, int]:
    """Run one step; return its output and the bytes that its autograd graph keeps, weights not counted."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        base = x if x._base is None else x._base
        if not isinstance(base, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # the tensor itself would tie its own graph into a cycle that is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = step(u)
    return output, sum(storages.values())


class WithinBudget:
    """Evaluates steps in order, keeping the graphs of as many as fit in ``budget`` bytes and recomputing the others.

    The first step is measured, and kept if it fits; the others kept are the last ones, whose graphs are freed first
    in the backward pass, before any is rebuilt. ``sizes``: samples in each step, in order. ``spare``: steps of the
    first one's size that must fit beside those kept.
    """

    def __init__(self, sizes: Sequence[int], budget: int, spare: int = 0) -> None:
        self.sizes, self.budget, self.spare = sizes, budget, spare
        self.kept: set[int] = set()
        self.index = 0

    def __call__(self, step: Step, u: Tensor) -> Tensor:
        index, self.index = self.index, self.index + 1
        if index > 0:
            return (keep if index in self.kept else recompute)(step, u)
        output, size = saved_bytes(step, u)
        self.kept = self._fitting(size / max(self.sizes[0], 1))
        if 0 in self.kept:
            return output
        del output  # its graph goes before others are built
        return recompute(step, u)

    def _fitting(self, bytes_per_sample: float) -> set[int]:
        left, kept = self.budget - self.spare * bytes_per_sample * self.sizes[0], set()
        for index in [0, *range(len(self.sizes) - 1, 0, -1)]:
            left -= bytes_per_sample * self.sizes[index]
            if left < 0:
                break
            kept.add(index)
        return kept


def fillable(device: torch.device) -> int:
    """Bytes that the budget ``auto`` may fill on a device now."""
    return int(AUTO_SHARE.get(device.type, AUTO_SHARE["cpu"]) * free_bytes(device))


@dataclass(frozen=True)
class _Budgeted(GradientEngine):
    """Shared by engines that differentiate steps: ``memory_budget`` is the bytes that kept step graphs may take.

    ``auto``: nine tenths of what is free on a GPU, half on a CPU, when the first step is measured. Graphs of a noise
    level that is computed by the network may take as much again. No budget changes a result.
    """

    memory_budget: int | str | None = None

    keeps_states: ClassVar[bool] = True
    unbounded: ClassVar[Evaluate]

    def __post_init__(self) -> None:
        budget: Any = self.memory_budget
        if budget is not None and budget != AUTO:
            check_count(budget, "memory_budget (bytes)", 0)

    def __call__(self, build: Build, u: Tensor) -> Tensor:
        return self._run(build(None), u)

    def _run(self, process: Process, u: Tensor) -> Tensor:
        return process.run(u, self._evaluate(process.batch_sizes(), u.device))

    def kept(self, step_bytes: int, steps: int, free: int = 0) -> int:
        if self.memory_budget is None:
            return steps if type(self).unbounded is keep else 0
        budget = max(free - AUTO_LEFT * step_bytes, 0) if self.memory_budget == AUTO else int(self.memory_budget)
        return min(steps, budget // step_bytes) if step_bytes else steps

    def total(self, terms: Sequence[Step], u: Tensor) -> Tensor:
        evaluate = self._evaluate([len(u)] * len(terms), u.device)
        return plain_total([partial(evaluate, term) for term in terms], u)

    def _evaluate(self, sizes: Sequence[int], device: torch.device) -> Evaluate:
        if not torch.is_grad_enabled():
            return keep
        if self.memory_budget is None:
            return type(self).unbounded
        if self.memory_budget == AUTO:
            return WithinBudget(sizes, fillable(device), AUTO_LEFT)
        return WithinBudget(sizes, int(self.memory_budget))


@dataclass(frozen=True)
class Full(_Budgeted):
    """Plain backpropagation: every step's graph is kept, or as many as ``memory_budget`` (bytes, or auto) allows."""

    unbounded: ClassVar[Evaluate] = staticmethod(keep)


@dataclass(frozen=True)
class Checkpoint(_Budgeted):
    """One image per step is kept and graphs are recomputed, but for what ``memory_budget`` (bytes, or auto) keeps."""

    unbounded: ClassVar[Evaluate] = staticmethod(recompute)


class _StochasticAdjoint(torch.autograd.Function):
    """Reverse-mode over a chain of which only the end was kept.

    Backward, u_j is reconstructed from u_{j+1} by the same increment with the opposite sign, at the forward
    times and noise, and the vector-Jacobian product is taken where that increment was evaluated.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, steps: tuple[ReverseStep, ...]) -> Tensor:
        ctx.steps = steps
        u = run(steps, u)
        ctx.save_for_backward(u)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        grad = grads[0]
        for step in reversed(ctx.steps):
            with torch.enable_grad():
                end = u.detach().requires_grad_()
                moved = step(end)
            (grad,) = torch.autograd.grad(moved, end, grad)
            u = 2 * end.detach() - moved.detach()
        return grad, None


# The times are constants of the adjoint, and no weight has a gradient.
_odeint_adjoint = partial(odeint_adjoint, adjoint_params=())


@dataclass(frozen=True)
class Adjoint(GradientEngine):
    """Continuous adjoint without graphs: approximate, as in DiffPure, for comparison.

    The ODE goes step by step through torchdiffeq's ``odeint_adjoint``, which keeps both ends of each step; stochastic
    and DDIM chains through a stochastic adjoint that keeps the last state and reconstructs the others backward.
    Gradients do not flow into the times; no second derivative; no guidance.
    """

    exact: ClassVar[bool] = False
    through_level: ClassVar[bool] = False

    def check(self, task: Task) -> None:
        if not isinstance(task.plan, FixedSteps):
            raise ValueError("The adjoint engine needs the plan fixed_steps; give a number of steps.")
        if task.guided:
            raise ValueError("The adjoint engine cannot differentiate guidance; use the gradient checkpoint or full.")

    def __call__(self, build: Build, u: Tensor) -> Tensor:
        process = build(None)
        for one_round in process.rounds:
            assert isinstance(one_round, Round)
            u = self._chain(one_round, one_round.diffuse(u))
        return process.finish(u)

    def _chain(self, one_round: Round, u: Tensor) -> Tensor:
        steps = one_round.reverse
        rule = steps[0].rule
        if not torch.is_grad_enabled() or isinstance(rule, OneShot):  # a single step has nothing to reconstruct
            return run(steps, u)
        if not isinstance(rule, ProbabilityFlow):
            return _StochasticAdjoint.apply(u, steps)
        for step in steps:
            u = rule.solve(_odeint_adjoint, step.model, u, step.t, step.s)
        return u


@dataclass(frozen=True)
class BPDA(GradientEngine):
    """Backward pass differentiable approximation (Athalye et al. 2018): exact forward, identity backward."""

    exact: ClassVar[bool] = False
    through_level: ClassVar[bool] = False

    def shorter(self, rounds: int) -> Shorter:
        return Shorter((), ())

    def __call__(self, build: Build, u: Tensor) -> Tensor:
        return with_gradient_of(_forward(build, u), u)


@dataclass(frozen=True)
class Surrogate(_Budgeted):
    """Exact forward; backward through a shorter process (Lee & Kim 2023, section 4.2).

    Args:
        steps: steps at most, in every round or one number for each round that is kept.
        rounds: indices of the rounds that are kept; default: all. Theirs for gradual noise: rounds (3, 5, 7) with
            steps (1, 1, 5).
        memory_budget: bytes that kept step graphs of the shorter process may take; None: they are all recomputed.
    """

    steps: int | Sequence[int] = 5
    rounds: Sequence[int] | None = None
    memory_budget: int | str | None = field(default=DEFAULT_BUDGET, kw_only=True)
    exact: ClassVar[bool] = False
    unbounded: ClassVar[Evaluate] = staticmethod(recompute)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "rounds"):  # lists, as JSON has them
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for steps in (self.steps,) if isinstance(self.steps, int) else self.steps:
            check_count(steps, "surrogate steps")

    def check(self, task: Task) -> None:
        kept = range(task.rounds) if self.rounds is None else self.rounds
        if not kept or not all(isinstance(r, int) and 0 <= r < task.rounds for r in kept):
            raise ValueError(f"The surrogate keeps rounds {tuple(kept)}, but they are 0 to {task.rounds - 1}.")
        if not isinstance(self.steps, int) and len(self.steps) != len(kept):
            raise ValueError(f"The surrogate keeps {len(kept)} rounds but has {len(self.steps)} numbers of steps.")

    def whole(self) -> GradientEngine:
        return Checkpoint(memory_budget=self.memory_budget)

    def shorter(self, rounds: int) -> Shorter:
        kept = range(rounds) if self.rounds is None else self.rounds
        return Shorter(kept, (self.steps,) * len(kept) if isinstance(self.steps, int) else self.steps)

    def __call__(self, build: Build, u: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _forward(build, u)
        shorter = self.shorter(len(build(None).rounds))
        return with_gradient_of(_forward(build, u), self._run(build(shorter), u))


def _forward(build: Build, u: Tensor) -> Tensor:
    with torch.no_grad():
        return build(None).run(u, keep)


def with_gradient_of(value: Tensor, proxy: Tensor) -> Tensor:
    """``value`` forward, bit for bit; the gradient of ``proxy`` backward."""
    return Straight.apply(proxy, value)


ENGINES: dict[str, type[GradientEngine]] = {
    "full": Full,
    "checkpoint": Checkpoint,
    "adjoint": Adjoint,
    "bpda": BPDA,
    "surrogate": Surrogate,
}
