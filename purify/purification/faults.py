"""Where a purification that ended in NaN or infinity went wrong: it is run again, one image alone, and watched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from purify.diffusion.noise import Noise
from purify.finite import Origin, broken, origin
from purify.purification.process import ROUND_INDICES, ReverseStep, Step

if TYPE_CHECKING:
    from purify.purification.purifier import Purifier

SCORE, AUXILIARY = "The score network", "The auxiliary network"


class _Found(Exception):
    """The first step that left a broken state, with the state before it."""

    def __init__(self, step: ReverseStep, u: Tensor) -> None:
        super().__init__()
        self.step, self.u = step, u


@torch.no_grad()
def sentence(purifier: Purifier, u: Tensor, noise: Noise, row: int) -> str:
    """Which network, step, time and layer made the first NaN or infinity of one ``row`` of u (N, C, H, W)."""
    u, noise = u[row : row + 1], noise[row : row + 1]
    sample = int(noise.sample_ids[0])
    statistic = purifier.statistic(u, noise)
    if not bool(statistic.isfinite()):
        made = origin({SCORE: purifier.score_model.network}, lambda: purifier.statistic(u, noise))
        return _said(made, SCORE, f"sample {sample}, asked for its noise level")
    try:
        purifier.process(purifier.level.level(statistic), noise, images=u).run(u, _watched)
    except _Found as found:
        return _of_step(purifier, found.step, found.u, sample)
    return (
        f"Sample {sample} is purified to NaN or infinity in this batch but not alone; the score network must not mix "
        "the samples of a batch."
    )


def _watched(step: Step, u: Tensor) -> Tensor:
    moved = step(u)
    if bool(broken(moved)):
        assert isinstance(step, ReverseStep)
        raise _Found(step, u)
    return moved


def _of_step(purifier: Purifier, step: ReverseStep, u: Tensor, sample: int) -> str:
    one_round, position = divmod(int(step.index), ROUND_INDICES)
    rounds = len(purifier.rounds)
    at = f"reverse step {position}" + (f" of round {one_round + 1}" if rounds > 1 else "")
    made = origin({SCORE: step.model.network, AUXILIARY: purifier.auxiliary}, lambda: step(u))
    what = SCORE if bool(broken(step.model.predict(step.rule.finish(u), step.t).eps)) else "The guidance"
    if purifier.guidance is None and what != SCORE:
        what = "The reverse rule"
    return _said(made, what, f"sample {sample} in {at} (t = {float(step.t[0]):.4g})")


def _said(made: Origin | None, otherwise: str, where: str) -> str:
    if made is None:
        return f"{otherwise} gives NaN or infinity for {where}; check its weights, scale and precision."
    return f"{made.network} gives NaN or infinity for {where}, {made}."
