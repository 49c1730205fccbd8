"""The expected perturbation score and its norm: how far from clean data an image looks to a score model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from purify.checks import check_count, check_images, choose, is_number, short
from purify.diffusion.noise import Noise
from purify.diffusion.resize import resized
from purify.diffusion.score import ScoreModel, per_sample
from purify.finite import broken

# Sum of independent network evaluations of u; a gradient engine decides which of their graphs are kept.
Total = Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor], Tensor]

FORMS = {"score": ScoreModel.score, "eps": ScoreModel.eps}
ROWS = 256  # images times draws that go through the network at once, and whose graph is rebuilt at once


def plain_total(terms: Sequence[Callable[[Tensor], Tensor]], u: Tensor) -> Tensor:
    """Sum of ``term(u)``, every graph kept."""
    return torch.stack([term(u) for term in terms]).sum(0)


@dataclass(frozen=True)
class ScoreNorm:
    """n(x) = || mean over times and noise of score(u_t, t) ||_2, the norm of the EPS (Sun et al. 2025, SSNI).

    Args:
        t_min, t_max: times are drawn from (t_min, t_max), one from each of ``draws`` equal parts.
        draws: noise draws and times that are averaged, as vectors, before the norm is taken.
        form: ``score`` (-eps / sigma: small times weigh more) or ``eps``.

    The range and the stratified times are inferred, not the paper's. Under keyed noise the norm is a function of
    (seed, sample, draw). It is differentiable in the image.
    """

    t_min: float = 1e-3
    t_max: float = 0.02
    draws: int = 8
    form: str = "score"

    def __post_init__(self) -> None:
        if not (is_number(self.t_min) and is_number(self.t_max) and 0 < self.t_min < self.t_max <= 1):
            raise ValueError(f"The score norm needs 0 < t_min < t_max <= 1, got {self.t_min} and {self.t_max}.")
        check_count(self.draws, "score-norm draws")
        choose(self.form, FORMS, "score-norm form")

    def __call__(self, model: ScoreModel, u: Tensor, noise: Noise, total: Total = plain_total) -> Tensor:
        """Norms (N,), float64, of images u (N, C, H, W) in [-1, 1] space."""
        noise = noise.stream("score-norm")
        per_call = max(1, ROWS // max(len(u), 1))
        groups = torch.arange(self.draws, device=u.device).split(per_call)
        mean = total([partial(self._sum, model, noise, group) for group in groups], u) / self.draws
        return torch.linalg.vector_norm(mean.flatten(1).double(), dim=1)

    def _sum(self, model: ScoreModel, noise: Noise, draws: Tensor, u: Tensor) -> Tensor:
        """Sum of scores over some of the draws, all in one network call."""
        n = len(u)
        rows = torch.arange(n, device=u.device).repeat(len(draws))
        m = draws.repeat_interleave(n)
        keyed = noise[rows]
        part = (m + keyed.uniform(2 * m, (), torch.float64)) / self.draws
        t = self.t_min + (self.t_max - self.t_min) * part
        z = keyed.normal(2 * m + 1, u.shape[1:], u.dtype)
        u_t = per_sample(model.schedule.alpha(t), u) * u[rows] + per_sample(model.schedule.sigma(t), u) * z
        return FORMS[self.form](model, u_t, t).unflatten(0, (len(draws), n)).sum(0)


@dataclass(frozen=True)
class Calibration:
    """What the score norm is on clean images, and the score model for which that holds.

    Attributes:
        xi_min, xi_max, mean, std: of the norm over the reference images.
        images: how many there were.
        score_model: fingerprint of the score model.
        norm: the statistic that was measured.
    """

    xi_min: float
    xi_max: float
    mean: float
    std: float
    images: int
    score_model: str
    norm: ScoreNorm

    def __post_init__(self) -> None:
        numbers = (self.xi_min, self.xi_max, self.mean, self.std)
        if not (all(map(is_number, numbers)) and 0 <= self.xi_min < self.xi_max and self.std > 0):
            raise ValueError(
                f"A calibration needs finite norms with xi_min < xi_max and std > 0, got {numbers}; "
                "calibrate on more, and different, images."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Calibration:
        """The calibration that ``dataclasses.asdict`` described.

        Raises:
            ValueError: keys are missing or unknown, or the numbers are no calibration.
        """
        try:
            fields = {**config, "norm": ScoreNorm(**config["norm"])}
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"This is not a score-norm calibration ({error}); run `purify calibrate`.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON. Raises ValueError if the file cannot be written."""
        try:
            Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); choose another file.") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote. Raises ValueError if the file is missing or something else."""
        try:
            config = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} cannot be read as a calibration ({why}); run `purify calibrate`.") from error
        try:
            return cls.from_config(config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a score-norm calibration; run `purify calibrate`.") from error

    def check(self, model: ScoreModel) -> None:
        """Raise ValueError unless this was measured with ``model``."""
        if model.fingerprint() != self.score_model:
            raise ValueError(
                "The noise level was calibrated with another score model; run purify.calibrate(score_model, images) "
                "(or `purify calibrate`) with this one."
            )


@torch.no_grad()
def calibrate(
    model: ScoreModel,
    images: Tensor,
    norm: ScoreNorm | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
    resize: bool = False,
) -> Calibration:
    """Measure the score norm on clean images (N, C, H, W) in [0, 1], at least two, taken from the training data.

    The paper uses a few thousand. The model is put in eval mode, as a purifier does. The result depends on the images,
    ``norm`` and ``seed``, not on ``batch_size``. ``resize``: bring images to the model's size first, for a purifier
    that resizes.

    Raises:
        ValueError: bad images, or all with the same norm; a norm that is NaN or infinite; resize without a known size.
    """
    norm = norm or ScoreNorm()
    if not isinstance(model, ScoreModel):
        raise ValueError(f"Calibration is of a purify.ScoreModel, got {short(model)}; wrap the network in one first.")
    if not isinstance(norm, ScoreNorm):
        raise ValueError(f"norm must be a purify.ScoreNorm, got {short(norm)}.")
    check_count(batch_size, "batch size")
    model.eval()
    shape = model.image_shape
    if resize and shape is None:
        raise ValueError("resize needs to know the score model's size; give the ScoreModel an image_shape.")
    check_images(images, (shape[0], *images.shape[2:]) if resize and shape else shape, model.dtype)
    check_count(len(images), "reference images", 2)
    ids = torch.arange(len(images), device=images.device)
    parts = list(zip(images.split(batch_size), ids.split(batch_size), strict=True))
    bar = tqdm(parts, desc="calibrating", unit="batch", disable=not progress)
    sized = (resized(x, shape) if resize and shape else x for x, _ in bar)
    norms = torch.cat([norm(model, 2 * x - 1, Noise.keyed(seed, i)) for x, (_, i) in zip(sized, parts, strict=True)])
    if bool(broken(norms[:, None]).any()):
        first = int(broken(norms[:, None]).nonzero()[0, 0])
        raise ValueError(f"The score norm of image {first} is NaN or infinite; check the score network's weights.")
    low, high, mean, std = map(float, (norms.min(), norms.max(), norms.mean(), norms.std()))
    return Calibration(low, high, mean, std, len(images), model.fingerprint(), norm)
