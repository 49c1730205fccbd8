"""Images of two pixels, so few that attacks on a randomized defence can be held against every point of a grid."""

import torch
from conftest import SmoothNet
from torch import Tensor, nn

from purify import ContinuousVP, DefendedClassifier, ScoreModel, diffpure
from purify.evaluate import Samples


class Pair(nn.Module):
    """A sharp random classifier of two pixels."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.last(torch.sin(6 * self.first(2 * x.flatten(1) - 1)))


def two_pixels(n: int) -> tuple[Pair, DefendedClassifier, Samples]:
    """A classifier, the same behind a smooth random purifier, and ``n`` images, some of them near a boundary."""
    classifier = Pair()
    score = ScoreModel(SmoothNet(), ContinuousVP(), image_shape=(1, 1, 2))
    images = 0.2 + 0.6 * torch.rand(n, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    samples = Samples(images, classifier(images).argmax(1), torch.arange(n))
    return classifier, DefendedClassifier(classifier, diffpure(score, 0.004, 3, "ddpm")), samples
