"""FreqPure (Pei et al. 2025): low frequencies of the clean estimate follow those of the image that came in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from purify.checks import choose, is_number
from purify.diffusion.noise import Noise
from purify.diffusion.score import ScoreModel, per_sample
from purify.purification.conditioning import Correction
from purify.purification.guidance import GUIDANCES

REFERENCES = ("input", "denoised")


@dataclass(frozen=True)
class FrequencyProjection(Correction):
    """Each channel of u0_hat gets amplitudes of the reference, and phases near its own, at low frequencies.

    With F = A exp(i phi) the discrete Fourier transform of a channel in [0, 1], at frequencies (k_y, k_x) counted in
    periods per image, k = |(k_y, k_x)|:

        A' = A_ref where k <= amplitude_radius, else A
        phi' = phi_ref + clip(phi - phi_ref, -delta, delta) where k <= phase_radius, else phi

    with the difference of phases in (-pi, pi]. Arguments as for
    :class:`~purify.purification.conditioning.Conditioning`, with ``scale`` the share of the way from F to F', and

        amplitude_radius, phase_radius: at least 0; the frequency 0, the mean, is always among them.
        delta: how far phases may be from the reference's, in [0, pi]; 0 replaces them.
        reference: the ``input``, or the input ``denoised``: diffused to ``reference_t`` with noise of its own in each
            step, and u0_hat of that, for one network call more per step.
        reference_t: in (0, 1].
    """

    scale: float = 1.0
    amplitude_radius: float = 10.0
    phase_radius: float = 10.0
    delta: float = 0.3
    reference: str = "input"
    reference_t: float = 0.051

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("amplitude_radius", "phase_radius"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, in periods per image, got {value!r}.")
        if not (is_number(self.delta) and 0 <= self.delta <= torch.pi):
            raise ValueError(f"delta must be an angle in [0, pi], got {self.delta!r}.")
        if not (is_number(self.reference_t) and 0 < self.reference_t <= 1):
            raise ValueError(f"reference_t must lie in (0, 1], got {self.reference_t!r}.")
        choose(self.reference, dict.fromkeys(REFERENCES), "reference of the frequencies")

    @property
    def calls(self) -> tuple[int, int]:
        return int(self.scale != 0 and self.reference == "denoised"), 0

    def added(
        self, model: ScoreModel, u0: Tensor, images: Tensor, t: Tensor, noise: Noise, index: int | Tensor
    ) -> Tensor:
        if self.reference == "denoised":
            images = self._denoised(model, images, noise, index)
        return 2 * (self.project((u0 + 1) / 2, (images + 1) / 2) - (u0 + 1) / 2)

    def _denoised(self, model: ScoreModel, images: Tensor, noise: Noise, index: int | Tensor) -> Tensor:
        t = torch.full((len(images),), self.reference_t, dtype=torch.float64, device=images.device)
        z = noise.normal(index, images.shape[1:], images.dtype)
        alpha, sigma = per_sample(model.schedule.alpha(t), images), per_sample(model.schedule.sigma(t), images)
        return model.denoise(alpha * images + sigma * z, t)

    def project(self, x: Tensor, reference: Tensor) -> Tensor:
        """Images ``x`` (N, C, H, W) in [0, 1] with F' of ``reference``."""
        f, f_ref = torch.fft.fft2(x), torch.fft.fft2(reference)
        k = radius(x)
        amplitude = torch.where(k <= self.amplitude_radius, f_ref.abs(), f.abs())
        # Neither abs, angle nor sgn has an infinite slope at 0, which a blank image has everywhere.
        turn = (f * f_ref.conj()).angle().clamp(-self.delta, self.delta)
        near = f_ref.sgn() * torch.polar(torch.ones_like(turn), turn)
        direction = torch.where(k <= self.phase_radius, near, f.sgn())
        return torch.fft.ifft2(amplitude * direction).real


def radius(x: Tensor) -> Tensor:
    """|(k_y, k_x)| of the frequencies of images (N, C, H, W), in periods per image: (H, W)."""
    ky, kx = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=x.device) for n in x.shape[-2:])
    return torch.hypot(*torch.meshgrid(ky, kx, indexing="ij"))


GUIDANCES["frequency"] = FrequencyProjection
