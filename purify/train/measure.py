"""What a model card reports, measured on the test split under fixed seeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from purify.attacks import PGD
from purify.diffusion.score import ScoreModel, per_sample
from purify.train.defences import PurifiedCrossEntropy
from purify.train.losses import DiffusionCalibration, SplittingLoss

TIMES = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)


@torch.no_grad()
def eps_loss(model: ScoreModel, images: Tensor, t: Tensor, seed: int = 0) -> float:
    """Mean squared error of the predicted noise at times ``t`` (N,), with noise under ``seed``."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    u = 2 * images - 1
    u_t = per_sample(model.schedule.alpha(t), u) * u + per_sample(model.schedule.sigma(t), u) * z
    losses = [
        (model.eps(a, b) - c).square().flatten(1).mean(1)
        for a, b, c in zip(u_t.split(500), t.split(500), z.split(500), strict=True)
    ]
    return torch.cat(losses).mean().item()


def measure_score(model: ScoreModel, images: Tensor) -> dict[str, float]:
    """eps-loss at uniform times in (1e-3, 1) and at each of ``TIMES``."""
    uniform = 1e-3 + (1 - 1e-3) * torch.rand(
        len(images), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    fixed = {f"eps_loss_t{t}": eps_loss(model, images, torch.full((len(images),), t).double()) for t in TIMES}
    return {"eps_loss_uniform_t": eps_loss(model, images, uniform), **fixed}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified as their label."""
    predictions = torch.cat([model(x).argmax(1) for x in images.split(500)])
    return (predictions == labels).double().mean().item()


def measure_classifier(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, attacked: int = 500
) -> dict[str, float]:
    """Clean accuracy, and that of the first ``attacked`` images under L_inf PGD of radius ``eps``.

    The attack is the worst, image by image, of 100 steps with 3 restarts on cross-entropy and on the margin.
    """
    x, y = images[:attacked], labels[:attacked]
    held = torch.ones(len(x), dtype=torch.bool)
    for loss in ("ce", "margin"):
        adversarial = PGD("Linf", eps, steps=100, eot=1, restarts=3, loss=loss)(model, x, y).images
        held &= model(adversarial).argmax(1) == y
    return {
        "clean_accuracy": accuracy(model, images, labels),
        f"robust_accuracy_eps{eps:g}": held.double().mean().item(),
    }


@torch.no_grad()
def measure_purified(model: nn.Module, loss: PurifiedCrossEntropy, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on images as they are, and on one purification of each."""
    purified = torch.cat([loss.purifier(x, sample_ids=range(len(x)), seed=k) for k, x in enumerate(images.split(500))])
    return {
        "clean_accuracy": accuracy(model, images, labels),
        "purified_accuracy": accuracy(model, purified, labels),
    }


@torch.no_grad()
def measure_splitting(model: nn.Module, loss: SplittingLoss, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on images under the loss's splitting noise, one draw each."""
    return {"split_accuracy": accuracy(model, loss.split(images, torch.Generator().manual_seed(0)), labels)}


@torch.no_grad()
def measure_denoised(model: ScoreModel, loss: DiffusionCalibration, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the loss's classifier on the first 2000 images, denoised in one step, at each sigma."""
    found = {}
    for k, sigma in enumerate(loss.sigmas):
        generator, right = torch.Generator().manual_seed(0), []
        for x, y in zip(images[:2000].split(500), labels[:2000].split(500), strict=True):
            shares = loss.log_shares(model, x, torch.full((len(x),), k), generator)
            right.append(shares.argmax(1) == y)
        found[f"denoised_accuracy_sigma{sigma:g}"] = torch.cat(right).double().mean().item()
    return found
