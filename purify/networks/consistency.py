"""Consistency functions of public layouts (Song et al. 2023) as variance-preserving networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from purify.checks import is_number
from purify.diffusion.schedule import ContinuousVP


class ConsistencyFunction(nn.Module):
    """f(x; s) = c_skip x + c_out F(c_in x, label) of x = u + s z, seen as one of u_t = alpha (u + (sigma / alpha) z).

    ``ScoreModel(ConsistencyFunction(network, schedule), schedule, prediction="consistency")`` is its score model. With
    b = ``sigma_min`` and d = ``sigma_data`` (Song et al. 2023, appendix C):

        c_skip = d^2 / ((s - b)^2 + d^2),  c_out = d (s - b) / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2)

    and the label is 250 log s. Below b f is the identity. Public ones know s up to 80: t = 0.93 by default.

    Args:
        network: F, called as ``network(x, labels)``, class-conditional ones with classes; returns a tensor or an object
            with ``.sample``.
        schedule: the VP-SDE in whose times it is driven.
        sigma_min, sigma_data: the published ones.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: ContinuousVP | None = None,
        sigma_min: float = 0.002,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if not (is_number(sigma_min) and is_number(sigma_data) and sigma_min > 0 and sigma_data > 0):
            raise ValueError(f"sigma_min and sigma_data must be positive numbers, got {sigma_min} and {sigma_data}.")
        self.network, self.schedule = network, schedule or ContinuousVP()
        self.sigma_min, self.sigma_data = float(sigma_min), float(sigma_data)

    @property
    def num_classes(self) -> int | None:
        """Classes that the network is conditional on; None: none."""
        return getattr(getattr(self.network, "config", None), "num_class_embeds", None)

    @property
    def class_embedding(self) -> nn.Module | None:
        """The network's table of classes."""
        return getattr(self.network, "class_embedding", None)

    def forward(self, u: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
        """f at u_t (N, C, H, W) and labels 1000 t (N,); ``classes``: int64 (N,)."""
        t = labels.double() / 1000
        alpha = self.schedule.alpha(t)
        s, d = (self.schedule.sigma(t) / alpha).clamp_min(self.sigma_min), self.sigma_data
        past, total = s - self.sigma_min, (s.square() + d**2).sqrt()
        c_skip, c_out, c_in = (
            c.to(u.dtype)[:, None, None, None] for c in (d**2 / (past.square() + d**2), d * past / total, 1 / total)
        )
        x = u / alpha.to(u.dtype)[:, None, None, None]
        told: tuple[Any, ...] = () if classes is None else (classes,)
        output = self.network(c_in * x, (250 * s.log()).to(labels.dtype), *told)
        return c_skip * x + c_out * getattr(output, "sample", output)
