"""What an attack wants the answer to be: any class but the label, one class, or the likeliest wrong ones in turn."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from purify.attacks.losses import LOSSES, PAIR_LOSSES, Loss
from purify.checks import check_count, short
from purify.diffusion.noise import derive_seed

TAKES = "a goal is any, a class (its number from 0), or top-K for the K likeliest wrong classes in turn"
WRITTEN = re.compile(r"(?:top-)?\d+|any")


class Goal(ABC):
    """What an attack wants of an image. ``str`` of it is how command lines and records write it."""

    wanted: int | None = None  # the class that the answer shall be, if it is the same for all images
    asks: ClassVar[bool] = False  # whether the model is asked about the clean images before

    @property
    def turns(self) -> int:
        """Runs of the attack for each restart, at most."""
        return 1

    @abstractmethod
    def aims(self, y: Tensor, logits: Callable[[], Tensor]) -> Iterator[Tensor]:
        """What the objective takes beside logits, for each run in turn: classes (N,), or pairs of them (N, 2).

        ``y``: labels (N,); ``logits``: asks for the answer to the clean images, (N, K).
        """

    @abstractmethod
    def objective(self, loss: str) -> Loss:
        """What is climbed, for a loss by name."""

    def concerns(self, y: Tensor) -> Tensor:
        """Which images (N,) are attacked at all; the others are returned as they came."""
        return torch.ones_like(y, dtype=torch.bool)

    def check(self, classes: int) -> None:  # noqa: B027 - most goals exist in every model
        """Raise ValueError unless a model of this many classes can be attacked so."""


@dataclass(frozen=True)
class AnyOther(Goal):
    """Any class but the label."""

    def __str__(self) -> str:
        return "any"

    def aims(self, y: Tensor, logits: Callable[[], Tensor]) -> Iterator[Tensor]:
        yield y

    def objective(self, loss: str) -> Loss:
        return LOSSES[loss]


@dataclass(frozen=True)
class OneClass(Goal):
    """One class for all images; those whose label it is are left alone.

    The loss is minus that of a label: of the margin the class's logit minus the largest other, positive where it is the
    answer.
    """

    wanted: int

    def __str__(self) -> str:
        return f"{self.wanted}"

    def aims(self, y: Tensor, logits: Callable[[], Tensor]) -> Iterator[Tensor]:
        yield torch.full_like(y, self.wanted)

    def objective(self, loss: str) -> Loss:
        return lambda logits, aim: -LOSSES[loss](logits, aim)

    def concerns(self, y: Tensor) -> Tensor:
        return y != self.wanted

    def check(self, classes: int) -> None:
        if self.wanted >= classes:
            raise ValueError(f"The model has the classes 0 to {classes - 1}, and no class {self.wanted} to aim at.")


@dataclass(frozen=True)
class MostLikely(Goal):
    """The ``count`` most likely wrong classes in turn (Gowal et al. 2019; as AutoAttack's targeted APGD aims at nine).

    Likely on the clean image, by mean logits over the attack's EOT draws. Each class is a run of its own from the
    label's logit to that class's; of all runs the iterate with the largest loss is returned. A model of few classes
    has fewer wrong ones: all of them are aimed at.
    """

    count: int = 9
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self.count, "classes to aim at")

    def __str__(self) -> str:
        return f"top-{self.count}"

    @property
    def turns(self) -> int:
        return self.count

    def aims(self, y: Tensor, logits: Callable[[], Tensor]) -> Iterator[Tensor]:
        wrong = logits().scatter(1, y[:, None], -math.inf)
        likely = wrong.topk(min(self.count, wrong.shape[1] - 1), dim=1).indices
        yield from (torch.stack([y, aim], 1) for aim in likely.unbind(1))

    def objective(self, loss: str) -> Loss:
        return PAIR_LOSSES[loss]


ANY_OTHER = AnyOther()


def find_goal(goal: Goal | int | str) -> Goal:
    """A goal as it is, or as it is written: ``any``, a class, ``top-K``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(goal, Goal):
        return goal
    text = str(goal)
    if isinstance(goal, bool) or not (isinstance(goal, int | str) and WRITTEN.fullmatch(text)):
        raise ValueError(f"Unknown goal {short(goal)}; {TAKES}.")
    if text == "any":
        return ANY_OTHER
    return MostLikely(int(text.removeprefix("top-"))) if text.startswith("top-") else OneClass(int(text))


def rank_seed(seed: int) -> int:
    """Keys the answers by which wrong classes are ranked; no gradient has their draws."""
    return derive_seed(seed, "goal")
