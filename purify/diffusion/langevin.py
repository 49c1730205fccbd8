"""Langevin steps: many noisy steps along the score at one small noise level, from the image as it came."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from purify.checks import is_number
from purify.diffusion.reverse import REVERSE_RULES, Look, ReverseRule, bent, unguided
from purify.diffusion.score import ScoreModel, per_sample


@dataclass(frozen=True)
class Langevin(ReverseRule):
    """u + (step^2 / 2) score(u, t) + step temperature z, t held (Hill et al. 2021, eq. 4, with the score for -grad U).

    An energy is a :class:`~purify.diffusion.score.ScoreModel` of prediction ``score`` whose network gives -grad U.
    Guidance bends the score.

    Args:
        step: tau, above 0, in units of [-1, 1] images; where step^2 / 2 exceeds sigma(t)^2 the walk diverges.
        temperature: of the noise, at least 0; 0 climbs the density.
    """

    step: float = 0.01
    temperature: float = 1.0

    adds_noise = True

    def __post_init__(self) -> None:
        if not (is_number(self.step) and self.step > 0):
            raise ValueError(f"The Langevin step must be a number above 0, got {self.step!r}.")
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise ValueError(f"The temperature of Langevin steps must be at least 0, got {self.temperature!r}.")

    @property
    def held(self) -> bool:
        return True

    @property
    def stochastic(self) -> bool:
        return self.temperature > 0

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        eps = model.noise(bent(model, *look(model, u, t), t), t)
        moved = u - per_sample(0.5 * self.step**2 / model.schedule.sigma(t), u) * eps
        return moved if z is None else moved + self.step * self.temperature * z


REVERSE_RULES["langevin"] = Langevin
