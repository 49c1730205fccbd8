"""Averaged and voted purifications: how much accuracy more purifications per answer bring back, and against whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

from purify.attacks.continued import ContinuedPGD
from purify.diffusion.noise import derive_seed
from purify.evaluate.metrics import Estimate, estimate
from purify.evaluate.protocols.base import (
    Attacked,
    Effort,
    Found,
    Line,
    Protocol,
    Stage,
    check_continues,
    counting,
    purified_logits,
)
from purify.evaluate.runner import CLEAN, Defence, Samples, stage_name
from purify.purification.calls import calls
from purify.purification.defended import DefendedClassifier, log_mean_softmax, mean_logits

LEAST = 16  # purifications of an image at least: a single answer of eight says little


def majority(logits: Tensor) -> Tensor:
    """Votes per class: (N, M, K) -> (N, K)."""
    return one_hot(logits.argmax(-1), logits.shape[-1]).sum(1)


# How M purifications become one answer, and whose gradient there is: counting has none.
ANSWERS = {"logits": mean_logits, "softmax": log_mean_softmax, "majority": majority}
GRADIENTS = ("logits", "softmax")
WORDS = {"logits": "mean logits", "softmax": "mean softmax", "majority": "majority"}


def draws(k: int) -> int:
    """Purifications of an image that answers of ``k`` take: as few whole answers as reach ``LEAST``."""
    return k * -(-LEAST // k)


def answers(logits: Tensor, k: int, how: str) -> Tensor:
    """Classes (N, T // k) that answers of ``k`` purifications each give, from logits (N, T, K) of T purifications."""
    whole = logits[:, : logits.shape[1] // k * k].unflatten(1, (-1, k))
    return ANSWERS[how](whole.flatten(0, 1)).argmax(1).unflatten(0, whole.shape[:2])


@dataclass(frozen=True)
class Own:
    """An attack along the gradient of the mean of ``k`` purifications, of their logits or softmax."""

    k: int
    aggregate: str

    @property
    def stage(self) -> str:
        """How records call it."""
        return f"averaged {self.k} {self.aggregate}"


@dataclass(frozen=True)
class Point:
    """A point of the curve: accuracy of answers of ``k`` purifications, combined in the way ``how``.

    ``who``: whose images; ``clean``, ``cheap`` or ``own``, see :class:`Averaged`.
    """

    k: int
    how: str
    who: str
    accuracy: Estimate


class Averaged(Protocol):
    """Answers of k purifications each: mean logits, mean softmax, majority, against cheap and own gradients.

    The cheap attacker ends with the images of the run's strongest attack, made against single purifications. The other
    goes on from there, for half the steps of the run's attacks, along the gradient of answers of k purifications: of
    their mean logits, and of their mean softmax. Counting has none. Each kind of answer is asked about both attacks'
    images, and the lower accuracy counts. Answers of all k and kinds share their purifications.
    """

    name = "averaged"

    def climbs(self, averages: Sequence[int]) -> bool:
        return bool(owns(averages))

    def check(self, defence: Defence) -> None:
        check_continues(self.name, defence)

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        strongest, counts = stage_name(attacked.strongest()), attacked.effort.averages
        for name in (CLEAN, strongest):
            yield Stage(cheap(name, counts), self._asked(attacked.defence, counts), self._judging(attacked, name))
        for own in owns(counts):
            planned = self._climbed(attacked.defence, attacked.effort, own)
            yield Stage(own.stage, planned, self._climbing(attacked, strongest, own))

    def planned(self, defence: Defence, effort: Effort) -> float:
        climbed = sum(self._climbed(defence, effort, own) for own in owns(effort.averages))
        return 2 * self._asked(defence, effort.averages) + climbed

    def lines(self, attacked: Attacked) -> list[Line]:
        counts = attacked.effort.averages
        shared = attacked.calls(*(cheap(name, counts) for name in (CLEAN, stage_name(attacked.strongest()))))
        climbed = {k: attacked.calls(*(own.stage for own in owns((k,)))) for k in counts}
        points = {(p.k, p.how, p.who): p.accuracy for p in self.points(attacked)}
        found = []
        for (k, how, who), accuracy in points.items():
            if who == "clean":
                continue
            number = f"{k} purifications, {WORDS[how]}" if k > 1 else "1 purification"
            assumes, spent = "knows the defence, attacks single purifications", shared
            if who == "own":
                number = f"{number}; own gradients, {_steps(attacked.effort)} steps"
                assumes = "knows the defence and how its answers are combined"
                spent = climbed[k]
            found.append(Line(self.name, number, accuracy, points[k, how, "clean"], spent, assumes))
        return found

    def points(self, attacked: Attacked) -> list[Point]:
        """Accuracies of clean images, of those of the cheap attacker, and of the one with the answer's own gradient."""
        counts, strongest = attacked.effort.averages, stage_name(attacked.strongest())
        found = []
        for k in counts:
            for how in ANSWERS if k > 1 else ("logits",):  # one purification is its own mean, and majority
                for who, stage in (("clean", CLEAN), ("cheap", strongest)):
                    found.append(Point(k, how, who, _share(attacked, cheap(stage, counts), k, how)))
                own = [_share(attacked, attack.stage, k, how) for attack in owns((k,))]
                found += [Point(k, how, "own", min(own, key=lambda share: share.value))] if own else []
        return found

    def _asked(self, defence: Defence, counts: Sequence[int]) -> float:
        return max(map(draws, counts)) * calls(_single(defence)).forward

    def _climbed(self, defence: Defence, effort: Effort, own: Own) -> float:
        single = calls(_single(defence))
        climbed = own.k * (_steps(effort) * single.gradient + single.forward)
        return climbed + draws(own.k) * single.forward

    def _judging(self, attacked: Attacked, name: str) -> Callable[[Samples], Found]:
        counts = attacked.effort.averages

        def measure(batch: Samples) -> Found:
            found = _answers(attacked, attacked.images(name, batch), batch, counts)
            return Found(found[0], self._asked(attacked.defence, counts), more=found[1])

        return measure

    def _climbing(self, attacked: Attacked, strongest: str, own: Own) -> Callable[[Samples], Found]:
        effort, single = attacked.effort, calls(_single(attacked.defence))
        model = attacked.model.with_purifications(own.k, own.aggregate)

        def measure(batch: Samples) -> Found:
            base = attacked.strongest()
            attack = ContinuedPGD(
                base.norm,
                base.eps,
                steps=_steps(effort),
                eot=1,
                max_rows=max(1, effort.max_rows // own.k),
                start=attacked.images(strongest, batch),
            )
            seed = derive_seed(attacked.seed, "attack", own.stage)
            with counting() as counted:
                images = attack(model, batch.images, batch.labels, sample_ids=batch.ids, seed=seed).images
            found = _answers(attacked, images, batch, (own.k,))
            spent = own.k * (counted.gradients / len(batch) * single.gradient + single.forward)
            return Found(found[0], spent + draws(own.k) * single.forward, images, found[1])

        return measure


def owns(counts: Sequence[int]) -> list[Own]:
    """The attacks along the gradient of an aggregate; of one purification it is that of the run's own attacks."""
    return [Own(k, aggregate) for k in counts if k > 1 for aggregate in GRADIENTS]


def cheap(name: str, counts: Sequence[int]) -> str:
    """How records call purifications of a stage of the run."""
    return f"averaged {'-'.join(map(str, counts))} {name}"


def _steps(effort: Effort) -> int:
    return max(1, effort.steps // 2)


def _single(defence: Defence) -> DefendedClassifier:
    """The defence's model with one purification per answer."""
    assert isinstance(defence.model, DefendedClassifier)
    return defence.model.with_purifications(1)


def _answers(
    attacked: Attacked, images: Tensor, batch: Samples, counts: Sequence[int]
) -> tuple[Tensor, list[dict[str, dict[str, dict[str, list[int]]]]]]:
    """Classes of single purifications (N, T), and of each sample the answers by their number and kind."""
    single, asked = attacked.model.with_purifications(1), range(max(map(draws, counts)))
    logits = purified_logits(single, images, batch.ids, asked, attacked.judge_seed, attacked.effort.max_rows).cpu()
    found = {str(k): {how: answers(logits, k, how) for how in ANSWERS} for k in counts}
    rows = [
        {"answers": {k: {how: classes[i].tolist() for how, classes in kinds.items()} for k, kinds in found.items()}}
        for i in range(len(batch))
    ]
    return logits.argmax(2), rows


def _share(attacked: Attacked, stage: str, k: int, how: str) -> Estimate:
    """Share of answers of ``k`` purifications that are right."""
    rows = attacked.records(stage)
    right = [np.mean(np.array(r["answers"][str(k)][how]) == r["label"]) for r in rows]
    return estimate(np.array(right))
