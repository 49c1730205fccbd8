"""DefendedClassifier: a purifier in front of a classifier, as one module from images to logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from purify.answers import ask
from purify.checks import (
    check_count,
    check_eval,
    check_images,
    check_shape,
    check_weights,
    choose,
    sample_keys,
    whole_numbers,
)
from purify.diffusion.score import ScoreModel
from purify.purification.gradients import GradientEngine
from purify.purification.outcomes import Details
from purify.purification.plans import FixedSteps
from purify.purification.purifier import Purifier, twin
from purify.transforms import run_eagerly, set_mode


def mean_logits(logits: Tensor) -> Tensor:
    """Mean over purifications: (N, M, K) -> (N, K)."""
    return logits.mean(1)


def log_mean_softmax(logits: Tensor) -> Tensor:
    """Logarithm of the mean softmax over purifications: (N, M, K) -> (N, K).

    The same answers as the mean softmax, whose own gradient fades where every purification is sure.
    """
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])


def vote_shares(logits: Tensor) -> Tensor:
    """Share of votes per class: (N, M, K) -> (N, K), whose gradient is that of the mean softmax.

    Counting votes has zero gradient almost everywhere, which would only hide the model from an attack.
    """
    soft = logits.softmax(-1).mean(1)
    hard = one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(1)
    return hard + (soft - soft.detach())


AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": mean_logits,
    "softmax": log_mean_softmax,
    "votes": vote_shares,
}


class Auxiliary(nn.Module):
    """A purifier's auxiliary network, shown images at the size at which it guides."""

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to the network's logits."""
        assert self.purifier.auxiliary is not None
        return ask(self.purifier.auxiliary, self.purifier.resized(x), "The auxiliary network")


class DefendedClassifier(nn.Module):
    """A classifier behind a purifier: images (N, C, H, W) in [0, 1] to logits (N, K).

    Every call without ``sample_ids`` purifies with fresh noise, which is what attack libraries expect of a
    randomized defence. All weights are frozen (``requires_grad`` off): attacks differentiate with respect to the
    image only, and that saves a third of the backward pass.

    Args:
        classifier: any module from images in [0, 1] to logits (a RobustBench model, say), in eval mode.
        purifier: the purifier in front of it.
        purifications: independent purifications per call.
        aggregate: ``logits`` (their mean), ``softmax`` (the log of their mean softmax) or ``votes`` (shares of votes;
            see :func:`vote_shares`).
        image_shape: (C, H, W) of the images, checked when given; None: what the purifier takes.

    Raises:
        ValueError: classifier or purifier of another type, classifier in train mode or with NaN in its weights, unknown
            aggregate, purifications < 1; at the call: images that the purifier or the classifier cannot take, answers
            that are no logits, NaN, infinite or all equal.
    """

    accepts_keys = True  # tells runners and attacks that forward takes sample_ids, draw and seed

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier,
        purifications: int = 1,
        aggregate: str = "logits",
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            advice = "make one with purify.diffpure(score_model), another preset, or purify.Purifier"
            raise ValueError(f"The purifier must be a purify.Purifier, got {type(purifier).__name__}; {advice}.")
        if not isinstance(classifier, nn.Module) or isinstance(classifier, Purifier | ScoreModel):
            advice = "pass DefendedClassifier(classifier, purifier), the classifier a torch.nn.Module"
            raise ValueError(f"{type(classifier).__name__} is no classifier of images; {advice}.")
        check_count(purifications, "purifications")
        self._aggregate = choose(aggregate, AGGREGATES, "aggregate")
        check_eval(classifier, "defending it")
        check_weights(classifier, "The classifier")
        self.classifier = classifier.requires_grad_(False)
        self.purifier = purifier
        self.purifications, self.aggregate = purifications, aggregate
        self.image_shape = None if image_shape is None else check_shape(image_shape)
        self.eval()

    def train(self, mode: bool = True) -> DefendedClassifier:
        """As usual; an exported classifier keeps the mode of its export."""
        self.training = mode
        for part in (self.classifier, self.purifier):
            set_mode(part, mode)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
    ) -> Tensor:
        """Logits (N, K), or vote shares; the keys are those of :meth:`Purifier.forward`.

        The ``m``-th of M purifications of draw d uses the purifier's draw ``d * M + m``.
        """
        return self.details(x, sample_ids=sample_ids, draw=draw, seed=seed).logits

    def details(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
        deviation: bool = False,
    ) -> Details:
        """As :meth:`forward`, with noise levels and network calls, and deviations if asked for."""
        return run_eagerly(self._details, x, sample_ids, draw, seed, deviation)

    def _details(
        self, x: Tensor, sample_ids: Tensor | Sequence[int] | None, draw: int | Tensor, seed: int, deviation: bool
    ) -> Details:
        check_eval(self.classifier, "attacking it")
        check_images(x)
        if self.image_shape is not None and tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(
                f"This defence takes images of shape {self.image_shape} (C, H, W), got {tuple(x.shape[1:])}; name "
                "their data set, or pass a purifier of your own."
            )
        m = self.purifications
        if sample_ids is not None and m > 1:
            sample_ids = sample_keys(sample_ids, x).repeat_interleave(m)
            draws = whole_numbers(draw, "draw", x.device)
            if draws.ndim and len(draws) != len(x):
                raise ValueError(f"There are {len(x)} images but {len(draws)} draws; give one, or one per image.")
            draws = draws.expand(len(x))
            draw = (draws[:, None] * m + torch.arange(m, device=x.device)).flatten()
        rows = x.repeat_interleave(m, 0) if m > 1 else x
        purified = self.purifier.purify(rows, sample_ids=sample_ids, draw=draw, seed=seed, deviation=deviation)
        ids = None if sample_ids is None else sample_keys(sample_ids, rows)
        logits = ask(self.classifier, purified.images, ids=ids)
        return Details.of(self._aggregate(logits.unflatten(0, (len(x), m))), purified, m)

    @property
    def level_varies(self) -> bool:
        """Whether the purifier chooses a noise level for each image."""
        return self.purifier.level.varies

    @property
    def guided(self) -> bool:
        """Whether something guides the purifier's reverse steps."""
        return self.purifier.guidance is not None

    @property
    def auxiliary(self) -> nn.Module | None:
        """The network that guides them, if there is one, as a classifier of images (N, C, H, W) in [0, 1]."""
        return None if self.purifier.auxiliary is None else Auxiliary(self.purifier)

    @property
    def in_step(self) -> bool:
        """Whether all samples take the same number of reverse steps, and each step has its exact gradient."""
        return isinstance(self.purifier.plan, FixedSteps) and self.purifier.engine.exact

    def with_gradient(
        self,
        gradient: str | GradientEngine | Mapping[str, Any] | None = None,
        through_level: bool | None = None,
        second_order: bool | None = None,
    ) -> DefendedClassifier:
        """The same model (sharing all weights) under another gradient of its purifier; see there."""
        return self.with_purifier(self.purifier.with_gradient(gradient, through_level, second_order))

    def at_share(self, share: float) -> DefendedClassifier:
        """The same model (sharing all weights) with its purifier at this share, in (0, 1], of its noise level."""
        return self.with_purifier(self.purifier.at_share(share))

    def with_precision(self, precision: str) -> DefendedClassifier:
        """The same model (sharing all weights) with its score network in ``float32``, ``bf16`` or ``fp16``, or in
        one of them by ``torch.compile`` (``bf16+compile``, ...).

        For attacks: what they find is to be judged by the model itself. The classifier keeps its type. See
        :meth:`Purifier.with_precision`.
        """
        return self.with_purifier(self.purifier.with_precision(precision))

    def with_purifier(self, purifier: Purifier) -> DefendedClassifier:
        """The same classifier (sharing its weights) behind another purifier."""
        return twin(self, purifier=purifier)

    def with_purifications(self, purifications: int, aggregate: str = "logits") -> DefendedClassifier:
        """The same model (sharing all weights) with another number of purifications per call, combined like this."""
        check_count(purifications, "purifications")
        combine = choose(aggregate, AGGREGATES, "aggregate")
        return twin(self, purifications=purifications, aggregate=aggregate, _aggregate=combine)

    def config(self) -> dict[str, Any]:
        """Plain data: the purifier's config and how its purifications are combined."""
        return {
            "purifier": self.purifier.config(),
            "purifications": self.purifications,
            "aggregate": self.aggregate,
        }
