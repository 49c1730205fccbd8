"""The deterministic white box: the attacker knows the noise that will be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from purify.attacks.continued import ContinuedPGD
from purify.checks import sample_keys
from purify.diffusion.noise import derive_seed
from purify.evaluate.metrics import estimate
from purify.evaluate.protocols.base import Attacked, Effort, Found, Line, Protocol, Stage, counting, purified_logits
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
    from a random place.
    """

    name = "deterministic"

    def climbs(self, averages: Sequence[int]) -> bool:
        return True

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        yield Stage(
            STAGE, self.planned(attacked.defence, attacked.effort), lambda batch: self._measure(attacked, batch)
        )

    def planned(self, defence: Defence, effort: Effort) -> float:
        own = calls(defence.model)
        return RUNS * (effort.steps * own.gradient + own.forward) + own.forward

    def lines(self, attacked: Attacked) -> list[Line]:
        right, clean = attacked.answered(STAGE)[:, 0], attacked.right(CLEAN)[:, 0]
        words = f"one known noise per image, PGD {attacked.effort.steps} steps x {RUNS} runs"
        held, control = (estimate(values.astype(float)) for values in (right, clean))
        return [Line(self.name, words, held, control, attacked.calls(STAGE), "knows the noise that will be used")]

    def _measure(self, attacked: Attacked, batch: Samples) -> Found:
        effort, known = attacked.effort, KnownNoise(attacked.model, attacked.judge_seed)
        strongest = attacked.strongest()
        attack = ContinuedPGD(
            strongest.norm,
            strongest.eps,
            steps=effort.steps,
            eot=1,
            restarts=RUNS,
            max_rows=effort.max_rows,
            start=attacked.images(stage_name(strongest), batch),
        )
        seed = derive_seed(attacked.seed, "attack", STAGE)
        with counting() as counted:
            images = attack(known, batch.images, batch.labels, sample_ids=batch.ids, seed=seed).images
        answers = purified_logits(
            attacked.model, images, batch.ids, range(1), attacked.judge_seed, effort.max_rows
        ).argmax(2)
        own = calls(attacked.model)
        spent = counted.gradients / len(batch) * own.gradient + (RUNS + 1) * own.forward
        return Found(answers, spent, images)
