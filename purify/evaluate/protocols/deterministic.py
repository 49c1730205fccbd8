"""The deterministic white box: the attacker knows the noise that will be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from purify.attacks.continued import ContinuedPGD
from purify.checks import sample_keys
from purify.diffusion.noise import derive_seed
from purify.evaluate.metrics import estimate
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
from purify.purification.defended import DefendedClassifier

RUNS = 2  # of PGD: from the run's strongest image, and from a random place
STAGE = "deterministic"


class KnownNoise(nn.Module):
    """A randomized defence that purifies each sample with the same noise every time: draw 0 under ``seed``.

    Who attacks it knows that noise, as whoever knows the generator of a deployed defence does.
    """

    accepts_keys = True

    def __init__(self, model: DefendedClassifier, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.eval()

    def forward(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
    ) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits (N, K); ``draw`` and ``seed`` change nothing."""
        return self.model(x, sample_ids=sample_keys(sample_ids, x), draw=0, seed=self.seed)


class Deterministic(Protocol):
    """The attacker knows the noise: attacked and judged under one and the same (Liu et al. 2024, arXiv 2404.14309).

    The noise of each sample is that of the judges' first draw, so the clean control is in the run's records. PGD
    without EOT, as there is nothing to average over, in two runs: from the image of the run's strongest attack, and
    from a random place. What is wrong under its noise needs no further run: that noise is all there is.
    """

    name = "deterministic"

    def climbs(self, averages: Sequence[int]) -> bool:
        return True

    def check(self, defence: Defence) -> None:
        check_continues(self.name, defence)

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        yield Stage(
            STAGE, self.planned(attacked.defence, attacked.effort), lambda batch: self._measure(attacked, batch)
        )

    def planned(self, defence: Defence, effort: Effort) -> float:
        own = calls(defence.model)
        return RUNS * (effort.steps * own.gradient + 2 * own.forward)

    def lines(self, attacked: Attacked) -> list[Line]:
        right, clean = attacked.answered(STAGE)[:, 0], attacked.right(CLEAN)[:, 0]
        words = f"one known noise per image, PGD {attacked.effort.steps} steps x {RUNS} runs"
        held, control = (estimate(values.astype(float)) for values in (right, clean))
        return [Line(self.name, words, held, control, attacked.calls(STAGE), "knows the noise that will be used")]

    def _measure(self, attacked: Attacked, batch: Samples) -> Found:
        stage = stage_name(attacked.strongest())
        images = attacked.images(stage, batch).clone()
        records = [attacked.run.get(attacked.defence.name, stage, int(i)) for i in batch.ids]
        answers = torch.tensor([r["predictions"][0] for r in records])  # under the noise that is known
        spent = torch.zeros(len(batch), dtype=torch.float64)
        for run in range(RUNS):
            left = (answers == batch.labels.cpu()).nonzero()[:, 0]
            if len(left) == 0:
                break
            start = images[left] if run == 0 else None
            images[left], taken = self._climb(attacked, batch[left], start, run)
            asked = purified_logits(
                attacked.model, images[left], batch.ids[left], range(1), attacked.judge_seed, attacked.effort.max_rows
            )
            answers[left] = asked.argmax(2)[:, 0].cpu()
            spent[left] += taken
        return Found(answers[:, None], spent, images)

    def _climb(self, attacked: Attacked, batch: Samples, start: Tensor | None, run: int) -> tuple[Tensor, float]:
        """Images of one run of PGD, and the calls that each took, its answer included."""
        strongest, effort, own = attacked.strongest(), attacked.effort, calls(attacked.model)
        attack = ContinuedPGD(
            strongest.norm, strongest.eps, steps=effort.steps, eot=1, max_rows=effort.max_rows, start=start
        )
        seed = derive_seed(attacked.seed, "attack", f"{STAGE} {run}" if run else STAGE)
        known = KnownNoise(attacked.model, attacked.judge_seed)
        with counting() as counted:
            images = attack(known, batch.images, batch.labels, sample_ids=batch.ids, seed=seed).images
        return images, counted.gradients / len(batch) * own.gradient + 2 * own.forward
