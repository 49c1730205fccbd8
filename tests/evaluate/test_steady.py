"""Records must not depend on what shares a batch: models that mix samples are refused before a run."""

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn

from purify import DefendedClassifier, diffpure
from purify.evaluate.steady import check_steady

IMAGES, IDS = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4)


class Mixing(nn.Module):
    """A classifier behind a layer that may mix samples."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.classifier = layer, TinyClassifier()

    def forward(self, x):
        return self.classifier(self.layer(x))


class Leak(nn.Module):
    def forward(self, x):
        return x + 0.5 * x.roll(1, 0)


class Random(nn.Module):
    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


LAYERS = {
    "layer normalises over the batch: track_running_stats=False": nn.BatchNorm2d(1, track_running_stats=False),
    "another": Leak(),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("defended", [False, True])
def test_a_model_that_mixes_samples_is_refused(name, defended):
    model = Mixing(LAYERS[name]).eval()
    model = DefendedClassifier(model, diffpure(smooth_model(), 0.1, 2, "ddpm")) if defended else model
    message = name if "layer" in name else "answers an image differently when others share its batch"
    with pytest.raises(ValueError, match=message):
        check_steady("this", model, IMAGES, IDS)


def test_good_models_pass_and_random_ones_are_named(recwarn):
    plain = Mixing(nn.BatchNorm2d(1)).eval()
    check_steady("plain", plain, IMAGES, IDS)
    check_steady("behind", DefendedClassifier(plain, diffpure(smooth_model(), 0.2, 3, "ddpm")), IMAGES, IDS, seed=3)
    check_steady("one image", Mixing(Leak()).eval(), IMAGES[:1], IDS[:1])
    assert not recwarn.list
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="random answers the same images differently each time"):
        check_steady("random", Mixing(Random()).eval(), IMAGES, IDS)
    assert torch.equal(torch.random.get_rng_state(), state)
