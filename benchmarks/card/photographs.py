"""Networks of CIFAR-10's size that have seen natural images: crops of scikit-learn's two photographs."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import resnet18

from card.bench import Size, score_model
from purify.diffusion.schedule import DiscreteVP
from purify.diffusion.score import ScoreModel
from purify.train.loop import Hyper, train
from purify.train.losses import CrossEntropy, EpsLoss

CPU = torch.device("cpu")
SHRUNK = 2  # photographs are 427 x 640; at half of that a crop holds more than a texture
TRAINED_ON = 0.6  # the left part of each photograph; the right one is attacked
CLASSIFIER_STEPS = 200  # at most


def crops(side: int, count: int, seen: bool) -> tuple[Tensor, Tensor]:
    """``count`` images (N, 3, side, side) in [0, 1], and which photograph each is from, (N,); the same ones each time.

    ``seen``: from the part that networks are trained on.
    """
    generator = torch.Generator().manual_seed(int(seen))
    parts = []
    for photograph in load_sample_images().images:
        whole = torch.from_numpy(photograph / 255).float().permute(2, 0, 1)
        small = nn.functional.avg_pool2d(whole, SHRUNK)
        middle = round(TRAINED_ON * small.shape[2])
        parts.append(small[:, :, :middle] if seen else small[:, :, middle:])
    images = []
    for i in range(count):
        part = parts[i % 2]
        top, left = (int(torch.randint(part.shape[d] - side + 1, (), generator=generator)) for d in (1, 2))
        images.append(part[:, top : top + side, left : left + side])
    return torch.stack(images), torch.arange(count) % 2


def trained(
    size: Size, steps: int, folder: Path, device: torch.device = CPU, save_every: int = 20
) -> tuple[nn.Module, ScoreModel]:
    """The classifier and the score model after training; a run that was stopped goes on from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = (part.to(device) for part in crops(size.image, 2000, True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier: nn.Module = resnet18(num_classes=2).to(device)
    hyper = Hyper(min(CLASSIFIER_STEPS, steps), batch_size=32, lr=1e-3, warmup=20)
    classifier = train(
        classifier, CrossEntropy(), images, labels, hyper, folder / "classifier.pt", vars(size), save_every
    )
    score = score_model(size, DiscreteVP.linear(1000)).to(device).train()
    hyper = Hyper(steps, batch_size=8, lr=4e-4, warmup=20)
    score = train(score, EpsLoss(), images, labels, hyper, folder / "score.pt", vars(size), save_every)
    assert isinstance(score, ScoreModel)
    return classifier, score
