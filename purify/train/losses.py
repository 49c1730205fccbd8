"""What the networks of ours are trained on; each loss is ``loss(module, images, labels, generator) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot, pad

from purify import zoo
from purify.certify.counts import Perturbation
from purify.certify.gaussian import denoise
from purify.certify.splitting import Splitting, SplittingLevels, check_levels
from purify.checks import check_count, check_weight, choose, is_number
from purify.diffusion.classes import classes_of
from purify.diffusion.noise import Noise
from purify.diffusion.score import ScoreModel, per_sample

T_MIN = 1e-3  # the smallest time that score networks see
T_PURIFY = 0.4  # half of the training times lie below this one, where purification happens


def training_times(n: int, generator: torch.Generator) -> Tensor:
    """Times (n,) float64, half of them uniform on (T_MIN, T_PURIFY) and half on (T_MIN, 1)."""
    top = torch.where(torch.arange(n) < n // 2, T_PURIFY, 1.0).double()
    return T_MIN + (top - T_MIN) * torch.rand(n, generator=generator, dtype=torch.float64)


def noised(module: ScoreModel, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] at :func:`training_times` of the schedule: u_t, t (N,), u0 in [-1, 1], and the noise."""
    t = training_times(len(images), generator).to(images.device)
    z = torch.randn(images.shape, generator=generator).to(images)
    u = 2 * images - 1
    return per_sample(module.schedule.alpha(t), u) * u + per_sample(module.schedule.sigma(t), u) * z, t, u, z


@dataclass(frozen=True)
class EpsLoss:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14). The module is a :class:`ScoreModel`."""

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        u_t, t, _, z = noised(module, images, generator)
        return (module.eps(u_t, t) - z).square().mean()


@dataclass(frozen=True)
class ClassEpsLoss:
    """:class:`EpsLoss` of a network that is told the class, or for a share ``drop`` none (Ho & Salimans 2022).

    The last entry of the network's table stands for none.
    """

    drop: float = 0.1

    def __post_init__(self) -> None:
        if not (is_number(self.drop) and 0 <= self.drop <= 1):
            raise ValueError(f"drop must lie in [0, 1], got {self.drop}.")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        entries = classes_of(module.network)
        assert entries is not None
        dropped = torch.rand(len(images), generator=generator) < self.drop
        told = one_hot(torch.where(dropped.to(labels.device), entries - 1, labels), entries).to(images)
        return EpsLoss()(module.told(told), images, labels, generator)


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the velocity z - u0 on the straight path (Lipman et al. 2023; Liu et al. 2023, eq. 1).

    The module is a :class:`ScoreModel` of prediction ``velocity``, at the times that :class:`EpsLoss` trains at.
    """

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        u_t, t, u, z = noised(module, images, generator)
        return (module.output(u_t, t) - (z - u)).square().mean()


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy on images shifted by up to ``shift`` pixels."""

    shift: int = 0

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(module(shifted(images, self.shift, generator)), labels)


@dataclass(frozen=True)
class AdversarialCrossEntropy:
    """Cross-entropy at L_inf adversarial images (Madry et al. 2018): PGD of ``attack_steps`` from a random start."""

    eps: float
    attack_steps: int = 10
    shift: int = 0

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        images = shifted(images, self.shift, generator)
        adversarial = ascend(
            module, images, self.eps, self.attack_steps, generator, lambda x: cross_entropy(module(x), labels)
        )
        return cross_entropy(module(adversarial), labels)


@dataclass(frozen=True)
class Trades:
    """TRADES (Zhang et al. 2019, eq. 5): cross-entropy on x plus ``beta`` KL(p(x) || p(x')), L_inf.

    x' is the image within ``eps`` of x that raises that divergence: PGD of ``attack_steps`` from a random start.
    """

    eps: float
    beta: float = 6.0
    attack_steps: int = 10

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            target = log_softmax(module.eval()(images), 1)
        adversarial = ascend(
            module, images, self.eps, self.attack_steps, generator, lambda x: divergence(target, module(x))
        )
        logits = module(images)
        return cross_entropy(logits, labels) + self.beta * divergence(log_softmax(logits, 1), module(adversarial))


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean of KL(p || q) from log p (N, K) and the logits of q."""
    return kl_div(log_softmax(logits, 1), target, log_target=True, reduction="batchmean")


def ascend(
    module: nn.Module,
    x: Tensor,
    eps: float,
    steps: int,
    generator: torch.Generator,
    objective: Callable[[Tensor], Tensor],
) -> Tensor:
    """Images (N, C, H, W) in [0, 1], at most ``eps`` from x, that raise ``objective``; PGD, ``module`` in eval mode."""
    module.eval().requires_grad_(False)
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    adversarial = low + (high - low) * torch.rand(x.shape, generator=generator).to(x)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(adversarial), adversarial)
        step = 2.5 * eps / steps * gradient.sign()
        adversarial = torch.minimum(torch.maximum(adversarial.detach() + step, low), high)
    module.train().requires_grad_(True)
    return adversarial


SPLITTINGS = {"ssn": Splitting, "dssn": SplittingLevels}


@dataclass(frozen=True)
class SplittingLoss:
    """Cross-entropy on images under splitting noise, one random draw per image (Levine & Feizi 2021).

    Args:
        lam: half the width of a cell; certify with the same.
        noise: ``dssn`` (levels under fixed offsets, seed 0) or ``ssn``.
        stability: weight of KL(p(x1) || p(x2)) between two draws, which the papers set to 6; 0: one draw.
        shift: images are first moved by up to so many pixels.
    """

    lam: float
    noise: str = "dssn"
    stability: float = 0.0
    shift: int = 0

    def __post_init__(self) -> None:
        choose(self.noise, SPLITTINGS, "splitting noise")
        check_levels(self.lam)
        check_weight(self.stability, "stability")
        check_count(self.shift, "shift", 0)

    @property
    def perturb(self) -> Perturbation:
        """The noise."""
        return SPLITTINGS[self.noise](self.lam)

    def split(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (N, C, H, W), each under a random draw."""
        seed = int(torch.randint(2**62, (), generator=generator))
        draws = torch.randint(SplittingLevels(self.lam).levels, (len(images),), generator=generator)
        ids = torch.arange(len(images), device=images.device)
        return self.perturb(images, Noise.keyed(seed, ids, draws.to(images.device)))

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        images = shifted(images, self.shift, generator)
        first = module(self.split(images, generator))
        loss = cross_entropy(first, labels)
        if self.stability == 0:
            return loss
        second = module(self.split(images, generator))
        return loss + self.stability * divergence(log_softmax(first, 1), second)


@dataclass(frozen=True)
class DiffusionCalibration:
    """Fine-tunes a score model for denoised smoothing of a frozen classifier f (Jeong & Shin 2023, arXiv 2310.16779).

    With F(z) = softmax(f(denoise(x + z))) and two noises d1, d2 at one sigma of the scales, drawn for each image:
    L = L_eps + weight (L_brier + anti L_anti), L_brier = ||F(d1) - onehot(y)||^2,
    L_anti = 1[y1 != y] * -log(1 - F(d2)[y1]), y1 = argmax F(d1).

    Args:
        classifier: zoo name, or path of a classifier that purify saved.
        sigmas: the scales, in units of images in [0, 1].
        weight: lambda (ours; the published value was not available to us).
        anti: a (ours).
    """

    classifier: str
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0)
    weight: float = 0.1
    anti: float = 0.1

    def __post_init__(self) -> None:
        if not (self.sigmas and all(is_number(s) and s > 0 for s in self.sigmas)):
            raise ValueError(f"Diffusion calibration needs positive sigmas, got {self.sigmas}.")
        check_weight(self.weight, "weight")
        check_weight(self.anti, "anti")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        diffusion = EpsLoss()(module, images, labels, generator)
        choice = torch.randint(len(self.sigmas), (len(images),), generator=generator)
        brier, anti = self.terms(module, images, labels, choice, generator)
        return diffusion + self.weight * (brier + self.anti * anti)

    def terms(
        self, module: ScoreModel, images: Tensor, labels: Tensor, choice: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """L_brier and L_anti, means over images; ``choice`` (N,): which of the sigmas each image gets."""
        first, second = (self.log_shares(module, images, choice, generator) for _ in range(2))
        brier = (first.exp() - one_hot(labels, first.shape[1])).square().sum(1).mean()
        answer = first.detach().argmax(1)
        others = second.masked_fill(one_hot(answer, second.shape[1]).bool(), -torch.inf)
        anti = torch.where(answer != labels, -others.logsumexp(1), 0.0).mean()  # the others' share is 1 - F(d2)[y1]
        return brier, anti

    def log_shares(self, module: ScoreModel, images: Tensor, choice: Tensor, generator: torch.Generator) -> Tensor:
        """log F, (N, K), under fresh noise."""
        times = torch.tensor([module.schedule.time_of_sigma(2 * s) for s in self.sigmas], dtype=torch.float64)
        sigma = torch.tensor(self.sigmas)[choice].reshape(-1, 1, 1, 1).to(images)
        noisy = images + sigma * torch.randn(images.shape, generator=generator).to(images)
        frozen = self.frozen.to(images.device)
        return log_softmax(frozen(denoise(module, noisy, times[choice].to(images.device))), 1)

    @cached_property
    def frozen(self) -> nn.Module:
        """f."""
        return zoo.classifier(self.classifier)


@dataclass(frozen=True)
class BridgeLoss:
    """ADBM (Li et al. 2025, arXiv 2408.00315): fine-tunes a score model that predicts eps to end at the clean image.

    With delta = u_adv - u, a = abar(t) and A = abar(T), the network sees the bridge from the diffused attacked image at
    T to the clean one at 0 and is to say what makes its u0_hat the clean image:

        u_t = sqrt(a) u + sqrt(1 - a) z + A (1 - a) / ((1 - A) sqrt(a)) delta
        target = z + A / (1 - A) sqrt((1 - a) / a) delta

    u_adv is within ``eps`` of u in L_inf: PGD of ``attack_steps`` from a random start, up the cross-entropy of the
    frozen classifier on u0_hat, with the same t and z. T is uniform in (t_star / 2, t_star) and t in (T_MIN, T) for
    each image.

    Args:
        classifier: zoo name, or path of a classifier that purify saved.
        eps: in units of images in [0, 1].
        t_star: the noise level at which the network will purify.
    """

    classifier: str
    eps: float
    t_star: float = 0.2
    attack_steps: int = 3

    def __post_init__(self) -> None:
        check_weight(self.eps, "eps")
        check_count(self.attack_steps, "attack_steps", 0)
        if not (is_number(self.t_star) and 2 * T_MIN < self.t_star <= 1):
            raise ValueError(f"t_star must lie in ({2 * T_MIN:g}, 1], got {self.t_star}.")

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        assert isinstance(module, ScoreModel)
        share, within = torch.rand(2, len(images), generator=generator, dtype=torch.float64).to(images.device)
        top = self.t_star * (1 + share) / 2
        t = T_MIN + (top - T_MIN) * within
        z = torch.randn(images.shape, generator=generator).to(images)
        frozen = self.frozen.to(images.device)

        def misled(adversarial: Tensor) -> Tensor:
            u_t, _ = self.bridge(module, images, adversarial, t, top, z)
            return cross_entropy(frozen((module.denoise(u_t, t) + 1) / 2), labels)

        adversarial = ascend(module, images, self.eps, self.attack_steps, generator, misled)
        u_t, target = self.bridge(module, images, adversarial, t, top, z)
        return (module.eps(u_t, t) - target).square().mean()

    def bridge(
        self, module: ScoreModel, images: Tensor, adversarial: Tensor, t: Tensor, top: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u_t and the target, (N, C, H, W) each, of images in [0, 1] at times ``t`` under T = ``top``, (N,) each."""
        u, delta = 2 * images - 1, 2 * (adversarial - images)
        a, end = module.schedule.alpha_bar(t), module.schedule.alpha_bar(top)
        ratio = end / (1 - end)
        u_t = per_sample(a.sqrt(), u) * u + per_sample((1 - a).sqrt(), u) * z
        u_t = u_t + per_sample(ratio * (1 - a) / a.sqrt(), u) * delta
        return u_t, z + per_sample(ratio * ((1 - a) / a).sqrt(), u) * delta

    @cached_property
    def frozen(self) -> nn.Module:
        """The classifier."""
        return zoo.classifier(self.classifier)


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own random offset of up to ``shift`` pixels, edges filled with 0."""
    if shift == 0:
        return images
    n, _, height, width = images.shape
    padded = pad(images, (shift,) * 4)
    dy, dx = torch.randint(2 * shift + 1, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.arange(width)
    index = torch.arange(n)
    return padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
