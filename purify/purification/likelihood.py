"""Score optimisation: the image itself climbs its likelihood under the diffusion model, by Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from purify.checks import is_number
from purify.diffusion.reverse import REVERSE_RULES, Look, ReverseRule, safe_sqrt, unguided
from purify.diffusion.score import ScoreModel, per_sample
from purify.purification.rebuilt import Rebuilt, Straight, check_frozen, gradient_of

DECAYS = 0.9, 0.999  # of Adam's averages (Kingma & Ba 2015)
SMALL = 1e-8


@dataclass(frozen=True)
class LikelihoodAscent(ReverseRule):
    """One step of Adam down the diffusion loss of the image u (Zhang et al. 2023; Chen et al. 2024, section 3.4).

        L(u) = mean over values of (u0_hat(alpha(t) u + sigma(t) z, t) - u)^2, the mean negative log-likelihood's bound

    with the gradient through the network. t is held, and u comes as it is. The state is u with Adam's averages of the
    gradient and of its square and the count of steps, in (N, 3 C + 1, H, W). Guidance adds s_t grad D(u).

    Args:
        rate: Adam's, above 0, in units of [-1, 1] images: a step moves each value by about so much.
        softness: Adam divides the gradient by its own size, so that a step is nearly a sign, and an exact gradient
            nearly blind. With w above 0 attacks see m / sqrt(v + w^2) for m / (sqrt(v) + 1e-8) in the backward pass,
            which is inexact; the forward pass stays. In units of the gradient of L.
    """

    rate: float = 0.1
    softness: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.softness) and self.softness >= 0):
            raise ValueError(f"softness must be a number of at least 0, got {self.softness!r}.")
        if not (is_number(self.rate) and self.rate > 0):
            raise ValueError(f"The rate of likelihood ascent must be a number above 0, got {self.rate!r}.")

    @property
    def held(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return self.softness == 0

    @property
    def twice(self) -> bool:
        return True

    @property
    def calls(self) -> int:
        return 2  # forward and backward

    def begin(self, u: Tensor) -> Tensor:
        return torch.cat([u, torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u[:, :1])], 1)

    def finish(self, state: Tensor) -> Tensor:
        return state[:, : state.shape[1] // 3]

    def drawn(self, shape: Sequence[int]) -> Sequence[int]:
        return (shape[0] // 3, *shape[1:])

    def rebuilt(self, model: ScoreModel, t: Tensor) -> Callable[[Tensor], Tensor]:
        def build(state: Tensor) -> Tensor:
            u = self.finish(state)
            return gradient_of(lambda w: self.loss(model, w, torch.zeros_like(u), t), u)

        return build

    def loss(self, model: ScoreModel, u: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """L of each image, (N,)."""
        schedule = model.schedule
        noisy = per_sample(schedule.alpha(t), u) * u + per_sample(schedule.sigma(t), u) * z
        return (model.denoise(noisy, t) - u).square().flatten(1).mean(1)

    def __call__(
        self, model: ScoreModel, u: Tensor, t: Tensor, s: Tensor, z: Tensor | None, look: Look = unguided
    ) -> Tensor:
        assert z is not None
        image, mean, square, count = u.split([*[z.shape[1]] * 3, 1], 1)
        check_frozen((model.network,), u)
        (gradient,) = Rebuilt.apply(partial(self._gradient, model), image, z, t)
        if look is not unguided:
            push = look(model, image, t)[1]
            gradient = gradient if push is None else gradient + push
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * gradient
        square = DECAYS[1] * square + (1 - DECAYS[1]) * gradient.square()
        count = count + 1
        direction = self._direction(mean / (1 - DECAYS[0] ** count), square / (1 - DECAYS[1] ** count))
        return torch.cat([image - self.rate * direction, mean, square, count], 1)

    def _direction(self, mean: Tensor, square: Tensor) -> Tensor:
        direction = mean / (safe_sqrt(square) + SMALL)
        if self.softness == 0:
            return direction
        soft = mean / (square + self.softness**2).sqrt()
        return Straight.apply(soft, direction.detach())

    def _gradient(self, model: ScoreModel, u: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor]:
        return (gradient_of(lambda w: self.loss(model, w, z, t), u),)


REVERSE_RULES["likelihood"] = LikelihoodAscent
