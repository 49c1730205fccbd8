"""Projected gradient descent with expectation over transformation, through whatever gradient the model has."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.attacks.base import Attack, AttackResult, check_budget, keyed
from purify.attacks.counting import count
from purify.attacks.goals import ANY_OTHER, Goal, find_goal, rank_seed
from purify.attacks.kinks import Inside, moved
from purify.attacks.losses import LOSSES, Loss
from purify.attacks.norms import Ball, L1Ball, unit
from purify.attacks.protocols import GUIDED, PURIFIER, Feature
from purify.attacks.submitted import SIGNED, Submitted
from purify.attacks.threats import NORMS, PERCEPTUAL, THREATS
from purify.checks import NO_GRADIENT, check_count, choose, is_number
from purify.diffusion.noise import Noise
from purify.memory import Parts
from purify.purification.calls import GRADIENT, calls
from purify.purification.gradients import DEFAULT_BUDGET, Surrogate
from purify.transforms import compiled_in_words, run_plainly

# Images, what the objective takes (labels), sample ids, draws (R rows each) -> terms (R,); the first chooses the best
# iterate.
Evaluator = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]

FLAT = (
    "The gradient is zero at every pixel of every image, so this attack finds what its start does; use square, or take "
    "the gradient of a surrogate (purify.BPDAClassifier)."
)

DRAWS = "EOT draws"  # what only models with randomness can be asked for

# Relative step size at progress p in [0, 1); each has mean 1, so that all schedules walk equally far.
STEP_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 2 * (1 - p),
    "cosine": lambda p: 1 + math.cos(math.pi * p),
}


@dataclass(frozen=True)
class Target:
    """What an attack asks, of N images.

    Attributes:
        evaluate: see ``Evaluator``.
        x, ids: clean images (N, C, H, W) and sample ids (N,).
        y: what the objective takes beside logits: labels (N,), or what :meth:`Goal.aims` says.
        seed: keys random starts.
        inside: which samples have their gradients taken inside [0, 1].
        submitted: what was answered to the iterates.
        parts: how many images times draws go through the model at once.
        each: network calls of a gradient.
    """

    evaluate: Evaluator
    x: Tensor
    y: Tensor
    ids: Tensor
    seed: int
    inside: Inside
    submitted: Submitted
    parts: Parts
    each: int


@dataclass(frozen=True)
class PGD(Attack):
    """PGD+EOT (Madry et al. 2018; Athalye et al. 2018), EOT draws batched together.

    The gradient at an iterate is that of the mean loss over ``eot`` draws of the model's randomness. The iterate
    with the largest mean loss, over all steps (the last included) and restarts, is returned. Everything is per
    sample: batch-mates, their order and ``max_rows`` do not change a sample's result.

    Args:
        norm, eps: threat model and radius.
        steps: gradient steps.
        eot: draws per gradient.
        restarts: runs from new random starts.
        step_size: mean step length in the norm; default eps, or in a perceptual distance the length of what there is
            of a perturbation. With the cosine schedule steps then fall from 2 eps, where
            APGD also starts, to 0. Measured on digits behind DiffPure (L_inf 0.3, 20 x 4, 64 images) this left 22 %
            right, Madry's 2.5 eps / steps 28 %.
        schedule: how the length changes over the run: one of ``STEP_SCHEDULES``.
        random_start: start anywhere in the ball; otherwise the first run starts at the clean image
            (Lee & Kim 2023).
        loss: one of ``LOSSES``; the margin was at least as strong as cross-entropy on the embedded purifiers.
        max_rows: images times draws that go through the model at once.
        sparsity: L1 only: share of the pixels that a step moves, or None: it follows the perturbation, see
            :class:`~purify.attacks.norms.L1Ball`. On digits None was far stronger on plain classifiers, so
            :meth:`on_deterministic` takes it, and a little weaker behind DiffPure (t* 0.18, eps 4, 20 x 4, 128 images,
            seeds 0 to 2: 24.3, 25.8, 22.5 % right against 22.3, 23.0, 22.4 %).
        goal: what the answer shall be: ``any`` class but the label, one class (its number), ``top-K``, the K likeliest
            wrong classes in turn, each with all steps and restarts; or a :class:`~purify.attacks.goals.Goal`.
    """

    steps: int = 40
    eot: int = 10
    restarts: int = 1
    step_size: float | None = None
    schedule: str = "cosine"
    random_start: bool = True
    loss: str = "margin"
    max_rows: int = 2048
    sparsity: float | None = 0.05
    goal: Goal | int | str = ANY_OTHER

    name: ClassVar[str] = "pgd-eot"
    threats: ClassVar[tuple[str, ...]] = (*NORMS, *PERCEPTUAL)
    terms: ClassVar[int] = 1  # what the evaluator returns, the loss first; where more, networks run uncompiled

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.steps, self.eot, self.restarts)
        check_count(self.max_rows, "max_rows")
        if self.step_size is not None and not (is_number(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be a positive number, got {self.step_size}.")
        if self.sparsity is not None and not (is_number(self.sparsity) and 0 < self.sparsity <= 1):
            raise ValueError(f"sparsity must be None or a share of the pixels in (0, 1], got {self.sparsity}.")
        choose(self.loss, LOSSES, "attack loss")
        choose(self.schedule, STEP_SCHEDULES, "step-size schedule")
        find_goal(self.goal)

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        rows = self.aim.concerns(y).nonzero()[:, 0]
        if len(rows) == len(y):
            return self._aimed(model, x, y, ids, seed)
        images, loss = x.clone(), torch.full((len(x),), math.nan, device=x.device)
        if len(rows):
            found = self._aimed(model, x[rows], y[rows], ids[rows], seed)
            images[rows], loss[rows] = found.images, found.loss
        return AttackResult(images, loss)

    def _aimed(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        """The attack at each class that the goal names for the labels ``y``, in turn."""
        target = self.target(model, x, y, ids, seed)
        found = AttackResult(x.clone(), torch.full((len(x),), -math.inf, device=x.device))
        for turn, aim in enumerate(self.aim.aims(y, lambda: self._asked(model, x, ids, seed))):
            aimed, first = replace(target, y=aim), self.first(model, x, aim, ids, seed)
            found = self.climb(aimed, first, found, turn)
        return replace(found, submitted=target.submitted if self.submits else None)

    def climb(self, target: Target, first: Tensor | None, best: AttackResult, turn: int = 0) -> AttackResult:
        """Every iterate's best and ``best``, per sample; the first run starts at ``first``, if there is one."""
        images, loss = best.images, best.loss
        for restart in range(self.restarts):
            start = None if restart else first
            for z, found in self._iterates(target, turn * self.restarts + restart, start):
                better = found > loss
                loss = torch.where(better, found, loss)
                images = torch.where(better.reshape(-1, 1, 1, 1), z, images)
        return AttackResult(images, loss)

    @torch.no_grad()
    def _asked(self, model: nn.Module, x: Tensor, ids: Tensor, seed: int) -> Tensor:
        """Mean logits (N, K) of the clean images, over as many draws as a gradient has."""
        call, eot = keyed(self.attacked(model), rank_seed(seed)), self.eot

        def ask(part: Tensor) -> Tensor:
            return call(x[part // eot], ids[part // eot], part % eot)

        rows = torch.arange(len(x) * eot, device=x.device)
        return torch.cat([found for _, found in Parts(self.max_rows).of(rows, ask)]).unflatten(0, (-1, eot)).mean(1)

    def target(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Target:
        """What is asked of iterates."""
        n, device = len(x), x.device
        own = Inside(n, device), Submitted(n, device), Parts(self.max_rows)
        return Target(self.evaluator(self.attacked(model), seed), x, y, ids, seed, *own, self.gradient_calls(model))

    def first(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor | None:
        """Where the first run starts; None: at random, like all others. ``y``: what the objective takes."""
        return None if self.random_start else x

    def evaluator(self, model: nn.Module, seed: int) -> Evaluator:
        """What is asked at each iterate, and differentiated."""
        call = keyed(model, seed)
        return lambda images, y, ids, draws: (self.objective(call(images, ids, draws), y),)

    @property
    def aim(self) -> Goal:
        """The goal, if it was given as it is written."""
        return find_goal(self.goal)

    @property
    def objective(self) -> Loss:
        """What is climbed, of logits and what :meth:`Goal.aims` says."""
        return self.aim.objective(self.loss)

    @property
    def wanted(self) -> int | None:
        return self.aim.wanted

    def check_classes(self, classes: int) -> None:
        self.aim.check(classes)

    @property
    def label(self) -> str:
        usual = type(self).goal  # of a dataclass: the default
        return super().label if self.aim == find_goal(usual) else f"{super().label}@{self.aim}"

    @property
    def ball(self) -> Ball:
        """The threat model's, with the attack's own way to move in it."""
        return L1Ball(self.sparsity) if self.norm == "L1" else THREATS[self.norm]

    def direction(self, gradients: Sequence[Tensor], z: Tensor, x: Tensor) -> Tensor:
        """Where to go from z, given the gradient of each of the evaluator's terms."""
        return self.ball.direction(gradients[0], z, x)

    def average(self, gradients: Tensor) -> Tensor:
        """Gradients (terms, N, draws, C, H, W) over the draws."""
        return gradients.mean(2)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """Back into the threat model's ball around x, and into [0, 1]."""
        return self.ball.project(z, x, self.eps)

    def mean_step(self, x: Tensor) -> float:
        """Mean length of a step along :meth:`direction`."""
        return self.ball.step(self.eps) if self.step_size is None else self.step_size

    @property
    def gradients(self) -> int:
        return self.runs * self.steps * self.eot

    @property
    def forwards(self) -> int:
        return (self.runs + self.aim.asks) * self.eot

    @property
    def runs(self) -> int:
        """Times that the steps are taken; of a model of few classes perhaps fewer."""
        return self.restarts * self.aim.turns

    def answers(self, model: nn.Module) -> int:
        return self.runs * (self.steps + 1) * self.eot if self.submits else 0

    @property
    def submits(self) -> bool:
        """Whether the losses of its iterates say how the judged model answers them."""
        return self.loss in SIGNED and not self.black_box and self.aim == ANY_OTHER

    def on_deterministic(self) -> Attack:
        return replace(self, eot=1, sparsity=None)

    def doubled(self) -> dict[str, Attack]:
        return {"steps": replace(self, steps=2 * self.steps), DRAWS: replace(self, eot=2 * self.eot)}

    def budget(self) -> dict[str, Any]:
        parts = super().budget()
        del parts["max_rows"]  # does not change results
        del parts["goal"]
        if self.aim != ANY_OTHER:
            parts["goal"] = str(self.aim)
        if self.norm != "L1":
            del parts["sparsity"]
        return parts

    def _iterates(self, target: Target, restart: int, first: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every iterate of one run with its estimated loss."""
        x, z = target.x, self._start(target, restart, first)
        for step in range(self.steps + 1):
            first_draw = (restart * (self.steps + 1) + step) * self.eot
            last = step == self.steps
            loss, gradients = self._eot(target, z, first_draw, not last)
            yield z, loss
            if not last:
                size = self.mean_step(x) * STEP_SCHEDULES[self.schedule](step / self.steps)
                z = self.project(z + size * self.direction(gradients, z, x), x)

    def _start(self, target: Target, restart: int, first: Tensor | None) -> Tensor:
        if first is not None:
            return first
        return self.anywhere(target.x, target.ids, target.seed, restart)

    def anywhere(self, x: Tensor, ids: Tensor, seed: int, restart: int = 0) -> Tensor:
        """Random starts around x, one for each restart."""
        uniform = Noise.keyed(seed, ids, restart).stream("attack").uniform(0, x.shape[1:], x.dtype)
        return self.ball.start(x, self.eps, uniform)

    def _eot(
        self, target: Target, z: Tensor, first_draw: int, with_gradient: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss (N,) over the draws and the gradient of each term, inside the box where it is blind at its ends."""
        y, ids, inside = target.y, target.ids, target.inside
        place = inside.place(z) if with_gradient else z
        losses, gradients = self._draws(target, place, y, ids, first_draw, with_gradient)
        target.submitted.add(losses)
        asked = inside.ask(z, gradients[0]) if with_gradient else y[:0]
        if len(asked):
            _, inner = self._draws(target, moved(z[asked]), y[asked], ids[asked], first_draw, True)
            better = inside.settle(asked, z[asked], gradients[0][asked], inner[0])
            for gradient, other in zip(gradients, inner, strict=True):
                gradient[asked[better]] = other[better]
        if with_gradient and first_draw == 0 and not bool(gradients[0].any()):
            warnings.warn(FLAT, stacklevel=2)
        return losses.mean(1), gradients

    def _draws(
        self, target: Target, z: Tensor, y: Tensor, ids: Tensor, first_draw: int, with_gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss of each draw (N, R) and the mean gradient of each term, ``max_rows`` rows at a time, if they fit."""
        n = len(z)

        def ask(part: Tensor) -> tuple[Tensor, Tensor]:
            r = part // self.eot
            twice = with_gradient and self.terms > 1  # back through one graph, which those of torch.compile refuse
            with torch.set_grad_enabled(with_gradient), run_plainly() if twice else nullcontext():
                images = z[r].requires_grad_(with_gradient)
                terms = target.evaluate(images, y[r], ids[r], first_draw + part % self.eot)
            if not with_gradient:
                return terms[0], z[:0]
            return terms[0].detach(), torch.stack(_gradients(terms, images))

        losses, gradients = [], []
        for part, (own, gradient) in target.parts.of(torch.arange(n * self.eot, device=z.device), ask):
            losses.append(own)
            if with_gradient:
                gradients.append(gradient)
                count(len(part), target.each)
        loss = _finite(torch.cat(losses).reshape(n, self.eot), ids)
        if not with_gradient:
            return loss, []
        means = self.average(torch.cat(gradients, 1).unflatten(1, (n, self.eot)))
        return loss, [_finite(gradient, ids) for gradient in means]


def _gradients(terms: Sequence[Tensor], images: Tensor) -> list[Tensor]:
    """Gradient of each term's sum; the graph goes with the last."""
    found: list[Tensor] = []
    for i, term in enumerate(terms):
        kept = i < len(terms) - 1
        with compiled_in_words():
            own = term.requires_grad and torch.autograd.grad(term.sum(), images, retain_graph=kept, allow_unused=True)
        if not own or own[0] is None:
            raise ValueError(f"The answer has no gradient with respect to the images: the model {NO_GRADIENT}.")
        found.append(own[0])
    return found


def mixed(gradients: Sequence[Tensor], weight: float) -> Tensor:
    """Loss gradient plus ``weight`` times the gradient of the second term, each of unit L2 norm."""
    loss, other = (unit(gradient) for gradient in gradients)
    return loss + weight * other


@dataclass(frozen=True)
class BPDA(PGD):
    """PGD+EOT on the identity gradient of the purifier (BPDA, Athalye et al. 2018)."""

    name: ClassVar[str] = "bpda-eot"
    needs: ClassVar[Feature[Any] | str | None] = PURIFIER
    exact_gradient: ClassVar[bool] = False

    def attacked(self, model: nn.Module) -> nn.Module:
        return PURIFIER.of(model).with_gradient("bpda")

    def gradient_calls(self, model: nn.Module) -> int:
        own = calls(model)  # only the classifier has a way back
        return own.forward + (GRADIENT - 1) * own.classifier


@dataclass(frozen=True)
class SurrogatePGD(PGD):
    """PGD+EOT on the gradient of a purifier with ``surrogate_steps`` steps (Lee & Kim 2023).

    Their graphs get the memory budget of the model's own gradient.
    """

    surrogate_steps: int = 5

    name: ClassVar[str] = "surrogate-eot"
    needs: ClassVar[Feature[Any] | str | None] = PURIFIER
    exact_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.surrogate_steps, "surrogate steps")

    def attacked(self, model: nn.Module) -> nn.Module:
        purified = PURIFIER.of(model)
        budget = getattr(purified.purifier.engine, "memory_budget", DEFAULT_BUDGET)
        return purified.with_gradient(Surrogate(self.surrogate_steps, memory_budget=budget))

    def gradient_calls(self, model: nn.Module) -> int:
        return calls(model).forward + calls(model, self.surrogate_steps).gradient  # its own steps are not gone back


@dataclass(frozen=True)
class FirstOrderPGD(PGD):
    """PGD+EOT that takes what guides the reverse steps for constant in its gradient, as published attacks did."""

    name: ClassVar[str] = "pgd-eot-first-order"
    needs: ClassVar[Feature[Any] | str | None] = GUIDED
    exact_gradient: ClassVar[bool] = False

    def attacked(self, model: nn.Module) -> nn.Module:
        return GUIDED.of(model).with_gradient(second_order=False)


def _finite(values: Tensor, ids: Tensor) -> Tensor:
    bad = ~values.flatten(1).isfinite().all(1) if values.ndim > 1 else ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"The model gave a loss or gradient that is not finite for sample {int(ids[bad][0])}; "
            "check that the logit of its label is finite, and the precision of the networks."
        )
    return values
