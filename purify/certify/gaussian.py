"""Gaussian smoothing (Cohen et al. 2019) and diffusion denoised smoothing (Carlini et al. 2022), in L2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from purify.answers import as_logits
from purify.certify.base import RandomizedSmoothing
from purify.certify.counts import check_classifier
from purify.certify.protocols import Denoiser
from purify.checks import check_weights, has, short
from purify.diffusion.noise import Noise
from purify.diffusion.schedule import check_sigma
from purify.diffusion.score import per_sample
from purify.finite import clamped


@dataclass(frozen=True)
class Gaussian:
    """x + sigma z with standard normal z; noisy images leave [0, 1]."""

    sigma: float

    def __call__(self, x: Tensor, noise: Noise) -> Tensor:
        return x + self.sigma * noise.stream("certify").normal(0, x.shape[1:], x.dtype)


@dataclass(frozen=True)
class Smooth(RandomizedSmoothing):
    """A classifier smoothed by Gaussian noise: R = sigma Phi^-1(p) in L2 (Cohen et al. 2019, theorem 1).

    Args:
        classifier: images in [0, 1] plus noise to logits, in eval mode.
        sigma: standard deviation of the noise, in units of images in [0, 1].
        max_rows: noisy images in the classifier at once (keyword).

    The noise is a function of (seed, sigma, sample, draw), independent between sigmas.
    """

    sigma: float

    norm: ClassVar[str] = "L2"

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        super().__post_init__()

    @property
    def perturb(self) -> Gaussian:
        return Gaussian(self.sigma)

    @property
    def stream(self) -> str:
        return f"gaussian {float(self.sigma)}"

    def radius(self, probability: np.ndarray) -> np.ndarray:
        return self.sigma * norm.ppf(probability)

    def probability(self, radius: float) -> float:
        return float(norm.cdf(radius / self.sigma))

    def config(self) -> dict[str, Any]:
        return {"kind": "gaussian", "sigma": self.sigma}


class OneShotDenoised(nn.Module):
    """A classifier behind the one-step denoiser of a diffusion model (Carlini et al. 2022, algorithm 1).

    Takes x + sigma z, that is (u + 2 sigma z + 1) / 2. The denoiser sees alpha(t) (u + 2 sigma z) at the time t whose
    noise-to-signal ratio is 2 sigma (the first step with at least that ratio if the schedule is discrete); u0_hat,
    clipped to [-1, 1], goes to the classifier. Differentiable, weights frozen.

    Raises:
        ValueError: sigma is not positive, or beyond the schedule's end; the classifier is in train mode.
    """

    def __init__(self, classifier: nn.Module, score_model: Denoiser, sigma: float) -> None:
        super().__init__()
        check_classifier(classifier, None)
        if not has(score_model, Denoiser):
            advice = "pass (classifier, score_model, sigma)"
            raise ValueError(f"The denoiser must be a purify.ScoreModel, got {short(score_model)}; {advice}.")
        check_weights(score_model.network, "The score network")
        check_sigma(sigma)
        self.time = score_model.schedule.time_of_sigma(2 * sigma)
        self.classifier = classifier.requires_grad_(False)
        self.score_model: Denoiser = score_model
        score_model.requires_grad_(False)
        self.eval()

    def forward(self, noisy: Tensor) -> Tensor:
        """Noisy images (N, C, H, W) around [0, 1] -> logits (N, K)."""
        t = torch.full((len(noisy),), self.time, dtype=torch.float64, device=noisy.device)
        return as_logits(self.classifier(denoise(self.score_model, noisy, t)))


def denoise(score_model: Denoiser, noisy: Tensor, t: Tensor) -> Tensor:
    """Images in [0, 1] from x + sigma z, (N, C, H, W); ``t`` float64 (N,): the times of 2 sigma."""
    u_t = per_sample(score_model.schedule.alpha(t), noisy) * (2 * noisy - 1)
    return (clamped(score_model.denoise(u_t, t), -1, 1) + 1) / 2


def denoised_smoothing(
    classifier: nn.Module, score_model: Denoiser, sigma: float, max_rows: int | None = None
) -> Smooth:
    """Diffusion denoised smoothing (Carlini et al. 2022): :class:`Smooth` over :class:`OneShotDenoised`."""
    return Smooth(OneShotDenoised(classifier, score_model, sigma), sigma, max_rows=max_rows)
