"""How the loop of purification steps is differentiated.

``Full`` and ``Checkpoint`` are exact: their gradient is that of the discrete process that was run, at the times
and with the noise that were run, and they can be differentiated again. ``Adjoint``, ``BPDA`` and ``Surrogate``
are approximations, offered for comparison and as attack tools; ``engine.exact`` tells.

Every engine gives the same forward values, bit for bit (the ODE's ``Adjoint``: up to rounding of its times).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint_adjoint

from purify.checks import check_count
from purify.process import Process, ReverseStep, Round
from purify.reverse import OneShot, ProbabilityFlow

Step = Callable[[Tensor], Tensor]


class GradientEngine(ABC):
    """Runs a process on u (N, C, H, W) in [-1, 1] space and decides what its gradient is.

    ``build(steps)`` gives the process, with at most ``steps`` reverse steps per round if that is not None.
    """

    exact: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, build: Callable[[int | None], Process], u: Tensor) -> Tensor: ...


def run(steps: Sequence[Step], u: Tensor) -> Tensor:
    """Apply the steps in order."""
    for step in steps:
        u = step(u)
    return u


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


def run_checkpointed(steps: Sequence[Step], u: Tensor) -> Tensor:
    """Apply the steps, keeping one image per step and recomputing its graph in the backward pass."""
    for step in steps:
        # Steps draw keyed noise, so no generator state needs to be kept or restored.
        u = checkpoint(step, u, use_reentrant=False, preserve_rng_state=False)
    return u


def run_within_budget(steps: Sequence[Step], u: Tensor, budget: int) -> Tensor:
    """Keep the graphs of as many whole steps as fit in ``budget`` bytes, recompute the others.

    The first reverse step is measured, and kept if one fits; the others kept are the last ones, whose graphs are
    freed first in the backward pass, before any is rebuilt.
    """
    u = steps[0](u)  # the diffusion, which has next to no graph
    rest = list(steps[1:])
    probe, size = saved_bytes(rest[0], u)
    keep = min(len(rest), budget // max(size, 1))
    if keep:
        u, rest, keep = probe, rest[1:], keep - 1
    del probe  # if it does not fit, its graph goes before others are built
    split = len(rest) - keep
    return run(rest[split:], run_checkpointed(rest[:split], u))


@dataclass(frozen=True)
class _Exact(GradientEngine):
    """Shared by the two exact engines: ``memory_budget`` is the bytes that kept step graphs may take."""

    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            check_count(self.memory_budget, "memory_budget (bytes)", 0)

    @abstractmethod
    def _unbounded(self, steps: Sequence[Step], u: Tensor) -> Tensor: ...

    def __call__(self, build: Callable[[int | None], Process], u: Tensor) -> Tensor:
        process = build(None)
        steps = list(process.steps())
        if not torch.is_grad_enabled():
            u = run(steps, u)
        elif self.memory_budget is None:
            u = self._unbounded(steps, u)
        else:
            u = run_within_budget(steps, u, self.memory_budget)
        return process.finish(u)


@dataclass(frozen=True)
class Full(_Exact):
    """Plain backpropagation: every step's graph is kept, or as many as ``memory_budget`` (bytes) allows."""

    def _unbounded(self, steps: Sequence[Step], u: Tensor) -> Tensor:
        return run(steps, u)


@dataclass(frozen=True)
class Checkpoint(_Exact):
    """One image per step is kept and graphs are recomputed, but for what ``memory_budget`` (bytes) can keep."""

    def _unbounded(self, steps: Sequence[Step], u: Tensor) -> Tensor:
        return run_checkpointed(steps, u)


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


class _Flow(nn.Module):
    """The probability flow of a whole chain over tau in [0, 1], as odeint_adjoint wants it: a module."""

    def __init__(self, first: ReverseStep, last: ReverseStep, rule: ProbabilityFlow) -> None:
        super().__init__()
        self.model, self.rule = first.model, rule
        self.start, self.span = first.t.detach(), (last.s - first.t).detach()

    def forward(self, tau: Tensor, u: Tensor) -> Tensor:
        t = self.start + tau * self.span
        return self.span.to(u.dtype).reshape(-1, 1, 1, 1) * self.rule.velocity(self.model, u, t)


@dataclass(frozen=True)
class Adjoint(GradientEngine):
    """Continuous adjoint in constant memory: approximate, as in DiffPure, for comparison.

    The ODE goes through torchdiffeq's ``odeint_adjoint``; stochastic and DDIM chains through a stochastic adjoint
    that reconstructs the states backward. Gradients do not flow into the times; no second derivative.
    """

    exact: ClassVar[bool] = False

    def __call__(self, build: Callable[[int | None], Process], u: Tensor) -> Tensor:
        process = build(None)
        for one_round in process.rounds:
            u = self._chain(one_round, one_round.diffuse(u))
        return process.finish(u)

    def _chain(self, one_round: Round, u: Tensor) -> Tensor:
        steps = one_round.reverse
        rule = steps[0].rule
        if not torch.is_grad_enabled() or isinstance(rule, OneShot):  # a single step has nothing to reconstruct
            return run(steps, u)
        if not isinstance(rule, ProbabilityFlow):
            return _StochasticAdjoint.apply(u, steps)
        grid = torch.linspace(0, 1, len(steps) + 1, dtype=torch.float64, device=u.device)
        flow = _Flow(steps[0], steps[-1], rule)
        options = {"rtol": rule.rtol, "atol": rule.atol, "method": rule.solver, "adjoint_params": ()}
        return odeint_adjoint(flow, u, grid, **options)[-1]


@dataclass(frozen=True)
class BPDA(GradientEngine):
    """Backward pass differentiable approximation (Athalye et al. 2018): exact forward, identity backward."""

    exact: ClassVar[bool] = False

    def __call__(self, build: Callable[[int | None], Process], u: Tensor) -> Tensor:
        return _with_gradient_of(_forward(build, u), u)


@dataclass(frozen=True)
class Surrogate(GradientEngine):
    """Exact forward; backward through a process of fewer ``steps`` (Lee & Kim 2023, section 4.2)."""

    steps: int = 5
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self.steps, "surrogate steps")

    def __call__(self, build: Callable[[int | None], Process], u: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _forward(build, u)
        return _with_gradient_of(_forward(build, u), _run_all(build(self.steps), u))


def _forward(build: Callable[[int | None], Process], u: Tensor) -> Tensor:
    with torch.no_grad():
        return _run_all(build(None), u)


def _run_all(process: Process, u: Tensor) -> Tensor:
    return process.finish(run(list(process.steps()), u))


def _with_gradient_of(value: Tensor, proxy: Tensor) -> Tensor:
    """``value`` forward, bit for bit; the gradient of ``proxy`` backward."""
    return _Straight.apply(proxy, value)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proxy: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


ENGINES: dict[str, type[GradientEngine]] = {
    "full": Full,
    "checkpoint": Checkpoint,
    "adjoint": Adjoint,
    "bpda": BPDA,
    "surrogate": Surrogate,
}
