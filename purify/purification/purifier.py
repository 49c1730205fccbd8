"""Purifier: diffuse an image to its noise level and step back to a clean one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purify import registry
from purify.checks import check_flag, check_images, check_weights, choose, is_number, short, whole_numbers
from purify.diffusion.noise import Noise
from purify.diffusion.precision import PRECISIONS
from purify.diffusion.resize import resized
from purify.diffusion.reverse import REVERSE_RULES, OneShot, ReverseRule
from purify.diffusion.schedule import Schedule, as_schedule, schedule_from_config
from purify.diffusion.score import ScoreModel
from purify.finite import broken
from purify.purification import faults
from purify.purification.conditioning import Conditioning
from purify.purification.gradients import (
    DEFAULT_BUDGET,
    ENGINES,
    Checkpoint,
    GradientEngine,
    Shorter,
    Task,
)
from purify.purification.guidance import GUIDANCES
from purify.purification.levels import LEVELS, NoiseLevel, Share
from purify.purification.outcomes import Purified
from purify.purification.parts import as_level, as_part, as_plan, as_rounds, held_against
from purify.purification.plans import PLANS, FixedSteps, Held, Plan, StepFactory
from purify.purification.process import MOST_ROUNDS, ROUND_INDICES, Deviation, Process, Watch, unwatched
from purify.transforms import func_in_words, readable, run_eagerly

# Exact, as fast as ``full`` where the graph is small, and safe where it is not.
DEFAULT_ENGINE = Checkpoint(memory_budget=DEFAULT_BUDGET)

Module = TypeVar("Module", bound=nn.Module)


class Purifier(nn.Module):
    """Maps images (N, C, H, W) in [0, 1] to purified images of the same shape, dtype and range.

    Args:
        score_model: the diffusion model. Its weights are frozen (``requires_grad`` off) and it is put in eval mode.
        level: noise level t* in (0, 1], or a :class:`~purify.purification.levels.NoiseLevel` rule.
        reverse: name of a reverse rule (``purify.diffusion.reverse.REVERSE_RULES``), a rule, or its config.
        steps: number of reverse steps from t* to ``t_end``, or an execution plan (``purify.purification.plans.PLANS``):
            ``FixedSteps(n)``, what a number stands for, or ``FixedDt(dt)``, where t* decides how many steps run; for
            rules that hold their time ``Held(n)``, there what a number stands for.
        t_end: time at which the reverse process stops.
        gradient: name of a gradient engine (``purify.purification.gradients.ENGINES``), an engine, or its config;
            default: exact, keeping up to 1 GiB of step graphs and recomputing the others.
        forward_schedule: schedule that diffuses the image, where it differs from the score model's; as there.
        clip: clamp the purified image to [0, 1]; its exact gradient is zero where it clamps.
        through_level: whether gradients flow through t* where it depends on the image; without, they are those of an
            attacker who takes t* for constant.
        guidance: what ties the reverse steps to the image that came in, a
            :class:`~purify.purification.conditioning.Conditioning` (:class:`~purify.purification.guidance.Guidance` or
            a correction), or its config if it has no network; default: nothing.
        rounds: how many times in a row the image is diffused and stepped back, or for each time the share of t* in
            (0, 1] to which it is diffused. The plan holds for each round.
        resize: bring images bilinearly to the score model's size and the purified ones back to theirs, as DiffPure
            does on ImageNet (256 x 256 for the diffusion model, 224 x 224 for the classifier).

    Raises:
        ValueError: t* outside (0, 1], steps < 1, unknown names, a noise level calibrated with another score model, a
            gradient engine that cannot differentiate this, NaN in the weights; and at the call: images that are not
            float in [0, 1], contain NaN, do not have the score model's shape, or that the network cannot take.
    """

    def __init__(
        self,
        score_model: ScoreModel,
        level: float | NoiseLevel | Mapping[str, Any] = 0.1,
        reverse: str | ReverseRule | Mapping[str, Any] = "sde",
        steps: int | Plan | Mapping[str, Any] = 100,
        t_end: float = 0.0,
        gradient: str | GradientEngine | Mapping[str, Any] = DEFAULT_ENGINE,
        forward_schedule: Schedule | str | None = None,
        clip: bool = True,
        through_level: bool = True,
        guidance: Conditioning | Mapping[str, Any] | None = None,
        rounds: int | Sequence[float] = 1,
        resize: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(score_model, ScoreModel):
            kind = type(score_model).__name__
            raise ValueError(f"A purifier wraps a purify.ScoreModel; wrap this {kind} in one first.")
        if not (is_number(t_end) and 0 <= t_end < 1):
            raise ValueError(f"t_end must lie in [0, 1), got {short(t_end)}.")
        for name, flag in (("clip", clip), ("through_level", through_level), ("resize", resize)):
            check_flag(flag, name)
        check_weights(score_model.network, "The score network")
        self.score_model = score_model.eval().requires_grad_(False)
        self.level = as_level(level)
        self.level.check(score_model)
        self.rounds = as_rounds(rounds)
        self.rule: ReverseRule = as_part(reverse, REVERSE_RULES, ReverseRule, "reverse rule")
        self.plan = as_plan(steps, self.rule)
        self.rule.check(score_model)
        self.guidance = None if guidance is None else as_part(guidance, GUIDANCES, Conditioning, "guidance")
        self.auxiliary = None  # registered here, so that it moves with the purifier
        if self.guidance is not None and self.guidance.network is not None:
            self.auxiliary = self.guidance.network.eval().requires_grad_(False)
        if self.guidance is not None:
            self.guidance.check(score_model)
        self.engine = as_part(gradient, ENGINES, GradientEngine, "gradient engine")
        self.t_end, self.clip, self.through_level = float(t_end), clip, through_level
        self.forward_schedule = None if forward_schedule is None else as_schedule(forward_schedule, "forward_schedule")
        self.resize = resize
        self._check()

    def _check(self) -> None:
        """Raise ValueError unless the parts go together. Each was held against the score model when it was given."""
        lowest = self.plan.step_length(self.level.highest * min(self.rounds))
        if lowest <= self.t_end:
            raise ValueError(f"t_end = {self.t_end} must be smaller than a step, {lowest:.3g}.")
        if len(self.rounds) > MOST_ROUNDS or max(self.most_steps_by_round()) >= ROUND_INDICES:
            raise ValueError(f"There can be {MOST_ROUNDS} rounds of {ROUND_INDICES - 1} steps at most.")
        if isinstance(self.rule, OneShot) and self.plan != FixedSteps(1):
            raise ValueError(f"The one-shot rule denoises in one step; set steps=1 instead of {self.plan}.")
        if self.rule.held != isinstance(self.plan, Held):
            kind = "stays at its time" if self.rule.held else "steps down in time"
            advice = "give steps as a whole number and leave dt out, or take another reverse rule"
            raise ValueError(f"The rule {type(self.rule).__name__} {kind}, which {self.plan} does not; {advice}.")
        if self.resize and self.score_model.image_shape is None:
            raise ValueError("resize needs to know the score model's size; give the ScoreModel an image_shape.")
        self.engine.check(self.task)

    def _with(self, **changed: Any) -> Purifier:
        """A twin with other parts, checked."""
        other = twin(self, **changed)
        other._check()
        return other

    def forward(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
    ) -> Tensor:
        """Purify ``x``.

        Args:
            x: images (N, C, H, W), float in [0, 1].
            sample_ids: identity of each image, whole numbers (N,): noise is then a function of (``seed``, sample id,
                ``draw``, step) alone, whatever the batch. None: fresh noise under torch's global seed.
            draw: which purification of the sample this is; one number, or one per row.
            seed: seed of the keyed noise.
        """
        return self.purify(x, sample_ids=sample_ids, draw=draw, seed=seed).images

    def purify(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
        deviation: bool = False,
    ) -> Purified:
        """As :meth:`forward`, with the noise levels and what they cost; with the deviation, if asked for.

        Raises:
            ValueError: the deviation of a process whose samples are not in step, or under an engine that is not exact;
                guidance in inference mode; NaN or infinity on the way, with the first network, layer, step and time.
        """
        return run_eagerly(self._purify, x, sample_ids, draw, seed, deviation)

    def _purify(
        self, x: Tensor, sample_ids: Tensor | Sequence[int] | None, draw: int | Tensor, seed: int, deviation: bool
    ) -> Purified:
        if self.guidance is not None and self.guidance.takes_gradients and torch.is_inference_mode_enabled():
            raise ValueError("Guidance takes gradients, which torch.inference_mode() forbids; use torch.no_grad().")
        if deviation and not isinstance(self.plan, FixedSteps):
            raise ValueError("Intermediate steps can be compared under the plan fixed_steps only.")
        if deviation and not self.engine.exact:
            raise ValueError("Intermediate steps have a gradient under the engines full and checkpoint only; use one.")
        shape = self.score_model.image_shape
        check_images(x, (shape[0], *x.shape[2:]) if self.resize and shape else shape, self.score_model.dtype)
        noise = self.noise(len(x), x.device, sample_ids, draw, seed)
        if len(x) == 0:
            return self._nothing(x)
        u = 2 * self.resized(x) - 1
        statistic = self.statistic(u, noise)
        t_star = self.level.level(statistic)
        held = t_star if self.through_level and self.engine.through_level else t_star.detach()
        watch = Deviation(u) if deviation else unwatched
        with func_in_words():
            purified = self.engine(lambda shorter: self.process(held, noise, shorter, watch, u), u)
        self._check_numbers(purified, statistic, u, noise)
        images = (self._sized(purified, x.shape[1:]) + 1) / 2
        calls = None if self.rule.calls is None else self.level.calls + self.steps(t_star) * self.rule.calls
        standard = (statistic - self.level.centre) / self.level.scale
        deviated = watch.mean() if isinstance(watch, Deviation) else None
        return Purified(images, t_star=t_star, statistic=standard, network_calls=calls, deviation=deviated)

    def _check_numbers(self, purified: Tensor, statistic: Tensor, u: Tensor, noise: Noise) -> None:
        """Raise ValueError if a noise level or a purified image is no number; says where it stopped to be one."""
        bad = broken(purified) | ~statistic.detach().isfinite()
        if readable(bad) and bool(bad.any()):
            raise ValueError(faults.sentence(self, u.detach(), noise, int(bad.nonzero()[0, 0])))

    def _nothing(self, x: Tensor) -> Purified:
        """The purification of an empty batch, which not every network could take."""
        none = torch.zeros(0, dtype=torch.float64, device=x.device)
        calls = None if self.rule.calls is None else none.long()
        return Purified(x, t_star=none, statistic=none, network_calls=calls, deviation=none.to(x.dtype))

    def steps(self, t_star: Tensor) -> Tensor:
        """Reverse steps of each sample in all rounds, int64 (N,), for levels ``t_star`` (N,)."""
        return torch.stack([self.plan.counts(share * t_star) for share in self.rounds]).sum(0)

    @property
    def task(self) -> Task:
        """What a gradient engine is asked to differentiate."""
        return Task(self.plan, len(self.rounds), self.guidance is not None)

    def resized(self, x: Tensor) -> Tensor:
        """Images in [0, 1] as the networks of the purifier see them: of the score model's size under ``resize``."""
        return self._sized(x, self.score_model.image_shape)

    def _sized(self, u: Tensor, shape: Sequence[int] | None) -> Tensor:
        return u if not self.resize or shape is None else resized(u, shape)

    def statistic(self, u: Tensor, noise: Noise) -> Tensor:
        """What the noise level is computed from, float64 (N,), for u in [-1, 1] space."""
        return self.level.statistic(self.score_model.bind(u), u, noise, self.engine.total)

    def train(self, mode: bool = True) -> Purifier:
        """Sets the flag as usual, but keeps all networks in eval mode: dropout would break keyed noise."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self

    @staticmethod
    def noise(
        n: int, device: torch.device, sample_ids: Tensor | Sequence[int] | None, draw: int | Tensor, seed: int
    ) -> Noise:
        """The noise that ``forward`` uses for these keys."""
        if sample_ids is None:
            return Noise.fresh(n, device)
        ids = whole_numbers(sample_ids, "sample_ids", device)
        noise = Noise.keyed(seed, ids, whole_numbers(draw, "draw", device))
        if len(noise) != n:
            raise ValueError(f"There are {n} images but {len(noise)} sample_ids; give one per image.")
        return noise

    def process(
        self,
        t_star: Tensor,
        noise: Noise,
        shorter: Shorter | None = None,
        watch: Watch = unwatched,
        images: Tensor | None = None,
    ) -> Process:
        """The rounds that purify from levels ``t_star`` (N,), or a shorter process.

        ``images``: what came in, u (N, C, H, W) in [-1, 1] space; guidance needs it.
        """
        forward = self.forward_schedule or self.score_model.schedule
        bound = None if self.guidance is None or images is None else self.guidance.bind(images)
        model = self.score_model if images is None else self.score_model.bind(images)
        rounds = []
        for j, plan in self._plans(shorter):
            index = j * ROUND_INDICES
            factory = StepFactory(model, self.rule, noise, forward, self.t_end, index, self.guidance, bound)
            rounds.append(plan.round(factory, self.rounds[j] * t_star))
        return Process(tuple(rounds), self.clip, watch)

    def _plans(self, shorter: Shorter | None = None) -> list[tuple[int, Plan]]:
        """The index of each round that runs, with its plan."""
        if shorter is None:
            return [(j, self.plan) for j in range(len(self.rounds))]
        return [(j, self.plan.at_most(n)) for j, n in zip(shorter.rounds, shorter.steps, strict=True)]

    def with_gradient(
        self,
        gradient: str | GradientEngine | Mapping[str, Any] | None = None,
        through_level: bool | None = None,
        second_order: bool | None = None,
    ) -> Purifier:
        """The same purifier (sharing its weights) under another gradient engine, or with t* or the guidance held
        constant in it."""
        changed: dict[str, Any] = {}
        if gradient is not None:
            changed["engine"] = as_part(gradient, ENGINES, GradientEngine, "gradient engine")
        if through_level is not None:
            changed["through_level"] = through_level
        if second_order is not None and self.guidance is not None:
            changed["guidance"] = replace(self.guidance, second_order=second_order)
        return self._with(**changed)

    def with_precision(self, precision: str) -> Purifier:
        """The same purifier (sharing its weights) with its score network run as one of ``PRECISIONS`` says.

        ``bf16`` or ``fp16``: the network computes in it, and everything between its calls in float32 (times, the
        labels of times, updates, guidance, sums); see :func:`purify.diffusion.precision.evaluate`. ``bf16+compile``,
        ``fp16+compile``, ``float32+compile``: also by ``torch.compile``. ``float32``: neither.

        Raises:
            ValueError: an unknown precision; ``fp16`` or a compiled network where guidance or rule takes second
                derivatives of it; a float64 network.
        """
        run = choose(precision, PRECISIONS, "precision")
        for what, part in (("This guidance", self.guidance), ("This reverse rule", self.rule)):
            if part is not None and part.twice:
                run.check_twice(what)
        return twin(self, score_model=self.score_model.with_precision(precision))

    def with_steps(self, steps: int | Plan | Mapping[str, Any]) -> Purifier:
        """The same purifier (sharing its weights) under another number of steps or plan."""
        return self._with(plan=as_plan(steps, self.rule))

    def with_level(self, level: float | NoiseLevel | Mapping[str, Any]) -> Purifier:
        """The same purifier (sharing its weights) with another rule for its noise level."""
        rule = as_level(level)
        rule.check(self.score_model)
        return self._with(level=rule)

    def at_share(self, share: float) -> Purifier:
        """The same purifier (sharing its weights) at this share, in (0, 1], of its noise level."""
        return self._with(level=Share(self.level, share))

    def most_steps_by_round(self, shorter: Shorter | None = None) -> list[int]:
        """Reverse steps of each round, or of each that is kept, at the greatest noise level."""
        highest = torch.tensor([self.level.highest], dtype=torch.float64)
        return [int(plan.counts(self.rounds[j] * highest)) for j, plan in self._plans(shorter)]

    @property
    def exact(self) -> bool:
        """Whether gradients are those of the purification that runs."""
        steps = self.rule.exact and (self.guidance is None or self.guidance.exact)
        return self.engine.exact and steps and (self.through_level or not self.level.varies)

    def with_resize(self, resize: bool = True) -> Purifier:
        """The same purifier (sharing its weights), with or without resizing images to its score model's size."""
        return self._with(resize=resize)

    def config(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_config` builds the same purifier around the same score model."""
        forward = self.forward_schedule
        return {
            "level": registry.describe(self.level, LEVELS),
            "reverse": registry.describe(self.rule, REVERSE_RULES),
            "steps": registry.describe(self.plan, PLANS),
            "t_end": self.t_end,
            "gradient": registry.describe(self.engine, ENGINES),
            "forward_schedule": None if forward is None else forward.config(),
            "clip": self.clip,
            "through_level": self.through_level,
            "guidance": None if self.guidance is None else registry.describe(self.guidance, GUIDANCES),
            "rounds": list(self.rounds),
            "resize": self.resize,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], score_model: ScoreModel, auxiliary: nn.Module | None = None
    ) -> Purifier:
        """Build the purifier that :meth:`config` described, around its score model and auxiliary network, if any.

        Raises:
            ValueError: unknown settings, or the auxiliary network is missing or another one.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"A purifier's config is a dict, got {short(config)}; Purifier.config() makes one.")
        arguments = dict(config)
        forward = arguments.pop("forward_schedule", None)
        known = set(inspect.signature(cls).parameters) - {"score_model"}
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise ValueError(f"Unknown purifier setting {', '.join(unknown)}; is this a purifier's config?")
        schedule = None if forward is None else schedule_from_config(forward)
        guidance = arguments.get("guidance")
        if guidance is not None and "auxiliary" in guidance:
            arguments["guidance"] = {**guidance, "auxiliary": held_against(auxiliary, guidance["auxiliary"])}
        return cls(score_model, forward_schedule=schedule, **arguments)


def twin(module: Module, **changed: Any) -> Module:
    """A shallow copy that shares weights and hooks, with other attributes or submodules.

    Not made by the constructor: that would take the weights' fingerprint again, and a run's progress bar would lose
    its hook, which counts the calls of twins, too.
    """
    other = copy.copy(module)
    other._modules = dict(module._modules)  # of its own, so that the original keeps its submodules
    for name, value in changed.items():
        setattr(other, name, value)
    return other
