"""Losses of the training-side defences of 2024: what purifies, or what classifies, is trained on what it will meet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from purify import zoo
from purify.checks import check_count, check_weight, is_number
from purify.diffusion.reverse import DDIM
from purify.diffusion.score import ScoreModel, per_sample
from purify.presets import diffpure
from purify.purification.purifier import Purifier
from purify.train.losses import T_MIN, ascend, training_times


def gaussian_by_rank(values: Tensor, normal: Tensor) -> Tensor:
    """The numbers of ``normal`` in the order of ``values``, image by image; (N, C, H, W) each.

    Rank-based Gaussian mapping (Liu et al. 2024): whatever ``values`` are, the result is Gaussian noise.
    """
    ranks = values.flatten(1).argsort(1).argsort(1)
    return normal.flatten(1).sort(1).values.gather(1, ranks).reshape(values.shape)


@dataclass(frozen=True)
class ADDTLoss:
    """ADDT (Liu et al. 2024, arXiv 2404.14309): the noise loss with adversarial noise that is Gaussian by its ranks.

        u_t = alpha u + sigma n,  n = sqrt(1 - l^2) z + l R(delta),  l = min(unit alpha / sigma, most)

    R is :func:`gaussian_by_rank`. delta begins as noise and takes ``attack_steps`` steps up the cross-entropy of a
    frozen classifier on u0_hat, each as large in rms as that noise (inferred); the network is then to say n.

    Args:
        classifier: zoo name, or path of a classifier that purify saved.
        unit: how large adversarial noise is at t = 0, rms in units of [-1, 1] images (inferred: 0.03 at 8/255).
        most: the greatest share l of it, below 1 (inferred: 0.3).
    """

    classifier: str
    unit: float = 0.03
    most: float = 0.3
    attack_steps: int = 3

    def __post_init__(self) -> None:
        check_weight(self.unit, "unit")
        check_count(self.attack_steps, "attack_steps", 0)
        if not (is_number(self.most) and 0 <= self.most < 1):
            raise ValueError(f"most must lie in [0, 1), got {self.most}.")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        t = training_times(len(images), generator)
        z, normal, delta = (torch.randn(images.shape, generator=generator) for _ in range(3))
        module.eval().requires_grad_(False)
        for _ in range(self.attack_steps):
            adversarial = gaussian_by_rank(delta, normal).requires_grad_()
            u_t, _ = self.noised(module, images, t, z, adversarial)
            loss = cross_entropy(self.frozen((module.denoise(u_t, t) + 1) / 2), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
            delta = delta + gradient / rms.clamp_min(1e-12)
        module.train().requires_grad_(True)
        u_t, noise = self.noised(module, images, t, z, gaussian_by_rank(delta, normal))
        return (module.eps(u_t, t) - noise).square().mean()

    def noised(
        self, module: ScoreModel, images: Tensor, t: Tensor, z: Tensor, adversarial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u_t and n, (N, C, H, W) each, of images in [0, 1] at times ``t`` (N,)."""
        u, alpha, sigma = 2 * images - 1, module.schedule.alpha(t), module.schedule.sigma(t)
        share = (self.unit * alpha / sigma).clamp_max(self.most)
        noise = per_sample((1 - share.square()).sqrt(), u) * z + per_sample(share, u) * adversarial
        return per_sample(alpha, u) * u + per_sample(sigma, u) * noise, noise

    @cached_property
    def frozen(self) -> nn.Module:
        """The classifier."""
        return zoo.classifier(self.classifier)


@dataclass(frozen=True)
class PurifiedCrossEntropy:
    """Cross-entropy on purified images: fine-tunes the classifier that stands behind a frozen purifier.

    With ``attack_steps`` the images are adversarial to both together, by PGD through the purification's exact gradient
    under the noise that is trained at.

    Args:
        score_model: zoo name of the purifier's, or a path.
        t_star, steps, reverse: of :func:`~purify.presets.diffpure`.
        eps: L_inf radius in units of images in [0, 1].
        attack_steps: 0 trains at clean images.
    """

    score_model: str
    t_star: float
    steps: int = 10
    reverse: str = "ddpm"
    eps: float = 0.0
    attack_steps: int = 0

    def __post_init__(self) -> None:
        check_weight(self.eps, "eps")
        check_count(self.attack_steps, "attack_steps", 0)
        check_count(self.steps, "steps")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        seed, ids = int(torch.randint(2**62, (), generator=generator)), range(len(images))

        def purified(x: Tensor) -> Tensor:
            return self.purifier(x, sample_ids=ids, seed=seed)

        if self.attack_steps > 0:
            images = ascend(
                module, images, self.eps, self.attack_steps, generator,
                lambda x: cross_entropy(module(purified(x)), labels),
            )  # fmt: skip
        with torch.no_grad():
            seen = purified(images)
        return cross_entropy(module(seen), labels)

    @cached_property
    def purifier(self) -> Purifier:
        """DiffPure with these settings."""
        return diffpure(zoo.score_model(self.score_model), self.t_star, self.steps, self.reverse)


@dataclass(frozen=True)
class ConsistencyDistillation:
    """Consistency distillation (Song et al. 2023, algorithm 2) of a teacher into a network that predicts noise, too.

    The consistency function is u0_hat of the network: at t = 0 it is the identity, as c_skip = 1 / alpha and c_out =
    -sigma / alpha make it. It is to say at (u_t, t) what it says, held constant, where one DDIM step of the teacher to
    ``t - interval`` leads. The distance is pseudo-Huber and there is no second average (Song & Dhariwal 2024, arXiv
    2310.14189).

    Args:
        teacher: zoo name, or path of a score model.
        t_max: times are uniform in (T_MIN, t_max).
        interval: length of the teacher's step; the last one ends at 0.
    """

    teacher: str
    t_max: float = 0.5
    interval: float = 0.02

    def __post_init__(self) -> None:
        if not (is_number(self.t_max) and is_number(self.interval) and T_MIN < self.t_max <= 1 and self.interval > 0):
            raise ValueError(f"Distillation needs t_max in ({T_MIN:g}, 1] and a positive interval.")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        t = T_MIN + (self.t_max - T_MIN) * torch.rand(len(images), generator=generator, dtype=torch.float64)
        s = (t - self.interval).clamp_min(0)
        z = torch.randn(images.shape, generator=generator)
        u = 2 * images - 1
        u_t = per_sample(module.schedule.alpha(t), u) * u + per_sample(module.schedule.sigma(t), u) * z
        with torch.no_grad():
            target = module.denoise(DDIM(0.0)(self.frozen, u_t, t, s, None), s)
        error = (module.denoise(u_t, t) - target).square().flatten(1).sum(1)
        softness = 0.00054 * u[0].numel() ** 0.5
        return ((error + softness**2).sqrt() - softness).mean()

    @cached_property
    def frozen(self) -> ScoreModel:
        """The teacher."""
        return zoo.score_model(self.teacher)
