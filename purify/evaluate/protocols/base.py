"""What every protocol is: stages that are measured and stored, and lines that say what they come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from purify.attacks.base import Attack
from purify.attacks.continued import ContinuedPGD
from purify.attacks.counting import heard
from purify.attacks.noise import RandomNoise
from purify.diffusion.noise import derive_seed
from purify.evaluate.metrics import Estimate
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import CLEAN, Defence, Samples, predictions, stage_name
from purify.purification.defended import DefendedClassifier

AVERAGES = (1, 8)  # purifications per answer of which each costs little


@dataclass(frozen=True)
class Effort:
    """What protocols may spend, from the run's own budget.

    Attributes:
        steps: gradient steps of the run's attacks.
        averages: purifications per answer.
        batch_size: samples attacked at once, as in the run.
        max_rows: images times draws in the model at once.
    """

    steps: int
    averages: tuple[int, ...] = AVERAGES
    batch_size: int = 64
    max_rows: int = 256


@dataclass(frozen=True)
class Attacked:
    """A purified defence of a run whose records are complete, as protocols see it.

    Attributes:
        run: the run's own records and adversarial images; read only.
        folder: where protocols' records are.
        defence: the model with the attacks it met.
        samples: all images of the run.
        seed: the run's.
        effort: see there.
    """

    run: RunFolder
    folder: RunFolder
    defence: Defence
    samples: Samples
    seed: int
    effort: Effort

    @property
    def model(self) -> DefendedClassifier:
        """The defence's model."""
        assert isinstance(self.defence.model, DefendedClassifier)
        return self.defence.model

    @property
    def judge_seed(self) -> int:
        """Keys the purifications that judge; no attack of the run has seen them."""
        return derive_seed(self.seed, "judge")

    def strongest(self, attacks: Sequence[Attack] | None = None) -> Attack:
        """Of these attacks (default: the defence's) the one that left least; random noise only if it is alone."""
        found = self.defence.attacks if attacks is None else attacks
        found = [a for a in found if not isinstance(a, RandomNoise)] or found
        return min(found, key=lambda attack: float(self.right(stage_name(attack)).mean()))

    def right(self, stage: str) -> np.ndarray:
        """Which of the judges' draws were right in a stage of the run, (N, R)."""
        labels = self.samples.labels.cpu().numpy()
        return predictions(self.run, self.defence, stage, self.samples) == labels[:, None]

    def images(self, stage: str, batch: Samples) -> Tensor:
        """The images of a stage of the run, like ``batch.images``."""
        if stage == CLEAN:
            return batch.images
        found = [torch.from_numpy(self.run.image(self.defence.name, stage, int(i))) for i in batch.ids]
        return torch.stack(found).to(batch.images)

    def records(self, stage: str) -> list[dict[str, Any]]:
        """A protocol's records of all samples."""
        return [self.folder.get(self.defence.name, stage, int(i)) for i in self.samples.ids]

    def answered(self, stage: str) -> np.ndarray:
        """Which answers of a protocol's stage were right, (N, R).

        Raises:
            ValueError: the record of a sample was changed by hand.
        """
        rows, labels = self.records(stage), self.samples.labels.tolist()
        other = any(r["label"] != y for r, y in zip(rows, labels, strict=True))
        if other or len({len(r["predictions"]) for r in rows}) > 1:
            raise ValueError(f"Records of {stage} in {self.folder.path} were changed by hand; remove them.")
        return np.array([r["predictions"] for r in rows]) == np.array(labels)[:, None]

    def calls(self, *stages: str) -> float:
        """Network calls that these stages of a protocol took for one image, on average."""
        return float(sum(np.mean([r["calls"] for r in self.records(stage)]) for stage in stages))


@dataclass(frozen=True)
class Found:
    """What a stage measured of a batch of N samples.

    Attributes:
        predictions: answers (N, R).
        calls: network calls for each image, (N,), or for every one.
        images: adversarial images, if the stage made any.
        more: what each record says besides.
    """

    predictions: Tensor
    calls: Tensor | float
    images: Tensor | None = None
    more: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Stage:
    """Something to measure of every sample, and to store.

    Attributes:
        name: its records'.
        planned: network calls for one image.
        measure: from a batch of samples to what was found.
    """

    name: str
    planned: float
    measure: Callable[[Samples], Found]


@dataclass(frozen=True)
class Line:
    """What a protocol's number means.

    Attributes:
        protocol: its name.
        number: what was counted, in words.
        accuracy: share that is right, with its 95 % interval.
        clean: the same on unattacked images.
        calls: network calls for one image beyond those of the run.
        assumes: what the attacker knows, or may do.
    """

    protocol: str
    number: str
    accuracy: Estimate
    clean: Estimate
    calls: float
    assumes: str


class Protocol(ABC):
    """A way to judge a purified defence. Its docstring's first line says what it is."""

    name: ClassVar[str]

    def check(self, defence: Defence) -> None:  # noqa: B027 - most judge every defence
        """Raise ValueError unless the defence can be judged so, before anything runs."""

    def climbs(self, averages: Sequence[int]) -> bool:
        """Whether it needs gradients; ``averages``: purifications per answer, as in :class:`Effort`."""
        return False

    @abstractmethod
    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        """What is measured, one after another: a stage may need the records of those before it."""

    @abstractmethod
    def planned(self, defence: Defence, effort: Effort) -> float:
        """Network calls of all stages for one image."""

    @abstractmethod
    def lines(self, attacked: Attacked) -> list[Line]:
        """What the records of all stages come to."""


def check_continues(name: str, defence: Defence) -> None:
    """Raise ValueError unless a protocol's own attack can go on from the images of the run's attacks."""
    threat = defence.attacks[0].norm
    if threat not in ContinuedPGD.threats:
        raise ValueError(
            f"The protocol {name} goes on from attacked images, which do not say how far in {threat} they are; leave "
            "it out of --protocol."
        )


class Counted:
    """Gradients of images that attacks took."""

    gradients = 0

    def hear(self, rows: int, each: int | None = None) -> None:
        """Add what an attack says it took."""
        self.gradients += rows


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts the gradients of attacks while it lasts, as :mod:`purify.attacks.counting` tells them."""
    found = Counted()
    with heard(found.hear):
        yield found


@torch.no_grad()
def purified_logits(
    model: DefendedClassifier, images: Tensor, ids: Tensor, draws: range, seed: int, max_rows: int
) -> Tensor:
    """Logits (N, R, K) of the model's answers to ``images`` (N, C, H, W) on these draws."""
    n, count = len(images), len(draws)
    rows = torch.arange(n, device=images.device).repeat_interleave(count)
    draw = torch.arange(draws.start, draws.stop, device=images.device).repeat(n)
    ids = ids.to(images.device)
    size = max(1, max_rows // model.purifications)
    parts = zip(rows.split(size), draw.split(size), strict=True)
    found = [model(images[r], sample_ids=ids[r], draw=d, seed=seed) for r, d in parts]
    return torch.cat(found).unflatten(0, (n, count))
