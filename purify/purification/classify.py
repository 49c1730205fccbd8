"""A class-conditional diffusion model as a classifier: the class under which it denoises the image best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from purify.checks import check_count, check_images, check_seed, choose, is_number, sample_keys
from purify.diffusion.classes import USUAL, Unconditional, classes_of
from purify.diffusion.noise import Noise
from purify.diffusion.schedule import Schedule
from purify.diffusion.score import ScoreModel, per_sample
from purify.purification.gradients import Checkpoint, Full
from purify.purification.purifier import DEFAULT_ENGINE

ROWS = 256  # images times classes in the network at once, where there are fewer images


def plain_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """1: the error of the predicted noise counts alike at all times (Li et al. 2023; Chen et al. 2024 with VP)."""
    return torch.ones_like(t)


def likelihood_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """beta / (2 sigma^2): the integral over times then bounds -log p(x | k) (Song et al. 2021, arXiv 2101.09258)."""
    return schedule.beta(t) / (2 * schedule.variance(t))


EDM_MEAN, EDM_STD, EDM_DATA = -1.2, 1.2, 0.5  # of log sigma in training, and of the data (Karras et al. 2022)


def edm_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """That of EDM's training loss (Karras et al. 2022, table 1; Chen et al. 2024): density of sigma, and lambda(sigma).

    The loss is lambda ||D - x||^2 = lambda sigma^2 ||eps error||^2, under a log-normal density of sigma = sigma(t) /
    alpha(t), of which dsigma / dt is what a unit of time holds.
    """
    variance, log_abar = schedule.variance(t), schedule.log_alpha_bar(t)
    sigma = (variance.log() - log_abar).mul(0.5).exp()
    per_time = schedule.beta(t) * (-log_abar).exp() / (2 * sigma)
    deviation = (sigma.log() - EDM_MEAN) / EDM_STD
    density = (-deviation.square() / 2).exp() / (sigma * EDM_STD * math.sqrt(2 * math.pi))
    return (sigma.square() + EDM_DATA**2) / EDM_DATA**2 * density * per_time


WEIGHTS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "eps": plain_weight,
    "edm": edm_weight,
    "likelihood": likelihood_weight,
}


class DiffusionClassifier(nn.Module):
    """Images (N, C, H, W) in [0, 1] to logits (N, K): minus the diffusion loss under each class, up to a constant.

    ``logit_k(x) = -integral over t of w(t) || eps(alpha u + sigma z, t, k) - z ||^2``, u = 2 x - 1 (Li et al. 2023,
    arXiv 2303.16203; Chen et al. 2024, arXiv 2305.15241): for w the likelihood's a bound on log p(x | k), so that a
    softmax is Bayes' rule. All classes share times and noise z. Behind the purifier ``likelihood`` it is RDC.

    The gradient is exact, at the memory of one network call of ``max(N, ROWS)`` rows, beside what ``gradient`` keeps.

    Args:
        score_model: of a class-conditional network; it is frozen and put in eval mode.
        timesteps: times, one drawn in each of so many equal parts of (t_min, t_max).
        num_classes: K; None: all that the network says it knows, without its entry for no class.
        t_min, t_max: between which times lie.
        weight: w, one of ``WEIGHTS``: ``eps`` (1), ``edm`` or ``likelihood``.
        random: fresh times and noise for each call and image, keyed by (seed, sample, draw) where keys are given.
            False: those of ``seed`` for all images at every call, so that there is nothing to average over.
        seed: of these.
        gradient: ``Checkpoint(memory_budget=...)`` or ``Full()``: how many graphs stay until the backward pass.

    Raises:
        ValueError: a network without classes; numbers out of range; at the call: images of another
            shape than the network's.
    """

    def __init__(
        self,
        score_model: ScoreModel,
        timesteps: int = 50,
        num_classes: int | None = None,
        t_min: float = 1e-3,
        t_max: float = 1.0,
        weight: str = "eps",
        random: bool = False,
        seed: int = 0,
        gradient: Full | Checkpoint = DEFAULT_ENGINE,
    ) -> None:
        super().__init__()
        if not isinstance(score_model, ScoreModel):
            raise ValueError(f"A diffusion classifier takes a purify.ScoreModel, got {type(score_model).__name__}.")
        if not isinstance(gradient, Full | Checkpoint):
            raise ValueError("A diffusion classifier takes the gradient Full() or Checkpoint(memory_budget=...).")
        if not (is_number(t_min) and is_number(t_max) and 0 < t_min < t_max <= 1):
            raise ValueError(f"A diffusion classifier needs 0 < t_min < t_max <= 1, got {t_min} and {t_max}.")
        check_count(timesteps, "timesteps")
        self._weight = choose(weight, WEIGHTS, "weight of a diffusion classifier")
        self.entries, self.num_classes = known_classes(score_model, num_classes)
        self.score_model = score_model.eval().requires_grad_(False)
        self.timesteps, self.t_min, self.t_max, self.weight = timesteps, float(t_min), float(t_max), weight
        self.accepts_keys, self.seed, self.gradient = random, check_seed(seed), gradient
        self.eval()

    @property
    def network_calls(self) -> int:
        """Of an answer to one image."""
        return self.timesteps * self.num_classes

    def forward(
        self, x: Tensor, *, sample_ids: Tensor | Sequence[int] | None = None, draw: int | Tensor = 0, seed: int = 0
    ) -> Tensor:
        """Logits; the keys say which times and noise a ``random`` one draws, and another ignores them."""
        check_images(x)
        shape = self.score_model.image_shape
        if shape is not None and tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(f"This diffusion classifier takes images of shape {shape}, got {tuple(x.shape[1:])}.")
        noise = self._noise(x, sample_ids, draw, seed).stream("classify")
        at_once = max(1, ROWS // max(len(x), 1))
        groups = torch.arange(self.num_classes, device=x.device).split(at_once)
        terms = [partial(self._term, noise, i, group) for i in range(self.timesteps) for group in groups]
        return self.gradient.total(terms, 2 * x - 1) * ((self.t_min - self.t_max) / self.timesteps)

    def _noise(self, x: Tensor, ids: Tensor | Sequence[int] | None, draw: int | Tensor, seed: int) -> Noise:
        if not self.accepts_keys:
            return Noise.keyed(self.seed, torch.zeros(1, dtype=torch.int64, device=x.device))
        if ids is None:
            return Noise.fresh(len(x), x.device)
        return Noise.keyed(seed, sample_keys(ids, x), draw)

    def _term(self, noise: Noise, index: int, group: Tensor, u: Tensor) -> Tensor:
        """Weighted losses at the ``index``-th time under the classes of a group, 0 under the others; (N, K)."""
        n, k = len(u), len(group)
        part = (index + noise.uniform(2 * index, (), torch.float64).expand(n)) / self.timesteps
        t = self.t_min + (self.t_max - self.t_min) * part
        z = noise.normal(2 * index + 1, u.shape[1:], u.dtype).expand(u.shape)
        schedule = self.score_model.schedule
        u_t = per_sample(schedule.alpha(t), u) * u + per_sample(schedule.sigma(t), u) * z
        told = one_hot(group.repeat_interleave(n), self.entries).to(u.dtype)
        eps = self.score_model.told(told).eps(u_t.repeat(k, 1, 1, 1), t.repeat(k)).unflatten(0, (k, n))
        losses = (eps - z).square().flatten(2).sum(2) * self._weight(schedule, t).to(u.dtype)
        before = int(group[0])
        return pad(losses.T, (before, self.num_classes - before - k))

    def config(self) -> dict[str, Any]:
        """Plain data that describes the classifier apart from its network."""
        names = ("timesteps", "num_classes", "t_min", "t_max", "weight", "seed")
        return {**{name: getattr(self, name) for name in names}, "random": self.accepts_keys}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], score_model: ScoreModel) -> DiffusionClassifier:
        """What :meth:`config` described, over this model."""
        return cls(score_model, **config)


def known_classes(score_model: ScoreModel, asked: int | None) -> tuple[int, int]:
    """Entries of the network's table of classes, and how many of them are classes of images.

    Raises:
        ValueError: it has no table, or fewer classes than are asked for.
    """
    entries = classes_of(score_model.network)
    if entries is None:
        raise ValueError("This score model's network is not class-conditional, so it cannot tell classes apart.")
    spare = isinstance(score_model.classes, Unconditional) and entries not in USUAL
    count = entries - spare if asked is None else asked
    check_count(count, "num_classes", 2)
    if count > entries:
        raise ValueError(f"num_classes must be at most the network's {entries}, got {count}.")
    return entries, count
