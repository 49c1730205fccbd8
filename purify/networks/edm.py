"""EDM's denoisers (Karras et al. 2022) as variance-preserving networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import one_hot

from purify.checks import short
from purify.diffusion.schedule import ContinuousVP


class EDMDenoiser(nn.Module):
    """A denoiser D(x; sigma) of x = u + sigma z, seen as one of u_t = alpha (u + (sigma / alpha) z).

    ``ScoreModel(EDMDenoiser(denoiser, schedule), schedule, prediction="x0")`` is its score model: x = u_t / alpha and
    EDM's sigma is sigma(t) / alpha(t) (Karras et al. 2022, appendix C.1).

    Args:
        denoiser: called as ``denoiser(x, sigma)`` with x (N, C, H, W) and sigma (N,) in units of [-1, 1] images;
            returns the denoised images. Preconditioning belongs to it (EDM's ``EDMPrecond`` does).
        schedule: the VP-SDE in whose times it is driven.
    """

    def __init__(self, denoiser: nn.Module, schedule: ContinuousVP | None = None) -> None:
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise ValueError(f"denoiser must be a torch.nn.Module, got {short(denoiser)}.")
        if not isinstance(schedule, ContinuousVP | None):
            raise ValueError(f"schedule of an EDMDenoiser must be a purify.ContinuousVP, got {short(schedule)}.")
        self.denoiser = denoiser
        self.schedule = schedule or ContinuousVP()

    takes_weights = True  # of classes, besides their indices

    def forward(self, u: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
        """u0_hat at u_t (N, C, H, W) and labels 1000 t (N,); ``classes``: int64 (N,) or weights (N, K), None: none."""
        t = labels.double() / 1000
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        inputs = u / alpha.to(u.dtype)[:, None, None, None], (sigma / alpha).to(labels.dtype)
        if classes is None:
            return self.denoiser(*inputs)
        if not classes.is_floating_point():
            k: Any = self.denoiser.label_dim
            classes = one_hot(classes, k).to(u.dtype)
        return self.denoiser(*inputs, classes)
