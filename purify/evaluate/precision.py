"""Which precision attacks take under ``--precision auto``: the fastest whose gradient is still float32's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from purify.diffusion.precision import COMPILE, FLOAT32, HALVES
from purify.evaluate.dryrun import rows_at_once, times
from purify.evaluate.runner import Defence, Samples
from purify.evaluate.selfchecks import input_gradient
from purify.purification import cost
from purify.purification.defended import DefendedClassifier
from purify.transforms import compiled_in_words

AUTO = "auto"
COSINE = 0.995  # with the gradient in float32, at the worst of a few images of every defence
IMAGES = 4  # that the cosine is asked on
WORTH = 0.9  # of the time that the best one so far takes: what is hardly faster would be chosen by chance


@dataclass(frozen=True)
class Candidate:
    """A precision that attacks might take.

    Attributes:
        name: one of ``PRECISIONS``.
        time: of a gradient, in units of that in float32.
        cosine: with the gradient in float32, least over a few images and all purified defences; None: not asked,
            because the precision is not faster.
        refused: why some defence cannot have it.
    """

    name: str
    time: float = math.inf
    cosine: float | None = None
    refused: str | None = None

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name} is refused: {self.refused}"
        asked = "" if self.cosine is None else f" at gradient cosine {self.cosine:.4f}"
        return f"{self.name} takes {self.time:.2f} of float32's time{asked}"


@dataclass(frozen=True)
class Choice:
    """What ``auto`` chose, and from what."""

    name: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        found = "; ".join(map(str, self.candidates)) or "nothing faster is known on this device"
        return f"attacks in {self.name} ({found}; a cosine of {COSINE} is asked for)"


def check_compiler(name: str, device: torch.device) -> None:
    """Raise ValueError where a compiled precision finds no compiler: the undefended classifier would not miss it."""
    if name.endswith(COMPILE):
        with compiled_in_words():
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))


def choose_precision(
    defences: Sequence[Defence], samples: Samples, batch_size: int, max_rows: int, seed: int = 0
) -> Choice:
    """The fastest precision in which the gradients of all purified defences keep to those in float32.

    One step of each is timed in every precision, in batches as large as the attacks'; where that is worth it, whole
    gradients of a few images are compared. Half precision on a CPU is bf16: fp16 is emulated there, many times slower.
    On a GPU the best one is then compared with itself by ``torch.compile``.
    """
    purified = [d for d in defences if isinstance(d.model, DefendedClassifier)]
    if not purified:
        return Choice(FLOAT32, ())
    rows = max(rows_at_once(d, len(samples), batch_size, max_rows) for d in purified)
    usual = sum(step_time(d, FLOAT32, samples, rows) for d in purified)
    few = samples[torch.arange(min(IMAGES, len(samples)))]
    best, found = Candidate(FLOAT32, 1.0, 1.0), []

    def consider(name: str) -> Candidate:
        """The better one of this and of the best so far."""
        try:
            with compiled_in_words():
                candidate = Candidate(name, sum(step_time(d, name, samples, rows) for d in purified) / usual)
                if candidate.time < WORTH * best.time:
                    candidate = replace(candidate, cosine=min(cosine(d, name, few, seed) for d in purified))
        except ValueError as refusal:
            candidate = Candidate(name, refused=str(refusal))
        found.append(candidate)
        return candidate if candidate.cosine is not None and candidate.cosine >= COSINE else best

    for name in offered(samples):
        best = consider(name)
    if worth_compiling(samples):
        best = consider(best.name + COMPILE)
    return Choice(best.name, tuple(found))


def offered(samples: Samples) -> list[str]:
    """Precisions, not compiled, that may be faster than float32 where the images are."""
    return [name for name in HALVES if samples.images.is_cuda or name != "fp16"]


def worth_compiling(samples: Samples) -> bool:
    """Whether the best of them is tried compiled, too. On a CPU it saves less than the compiler takes."""
    return samples.images.is_cuda


def step_time(defence: Defence, precision: str, samples: Samples, rows: int) -> float:
    """Seconds per row of a gradient through one reverse step per round, times the number of steps."""
    model = replace(defence, precision=precision).attacked
    assert isinstance(model, DefendedClassifier)
    one = model.with_purifier(cost.shortened(model.purifier, 1))
    return times(one, samples, rows)[1] * cost.most_steps(model.purifier)


def cosine(defence: Defence, precision: str, few: Samples, seed: int) -> float:
    """Between the whole gradient in this precision and in float32, at the worst image."""
    half, whole = (
        input_gradient(replace(defence, precision=p).attacked, few, few.images.dtype, seed)
        for p in (precision, FLOAT32)
    )
    return torch.cosine_similarity(half, whole, dim=1, eps=0.0).nan_to_num(0.0).min().item()
