"""Whatever a model returns is taken as logits, or refused in a sentence before any work."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn
from torch.testing import assert_close

from purify import DefendedClassifier, agdm, diffpure
from purify.answers import as_logits
from purify.attacks import PGD, GuideTransfer, Square, Transfer
from purify.certify import Draws, Smooth, denoised_smoothing
from purify.evaluate import Defence, Samples
from purify.evaluate.runner import check_together

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 2, 3])


class Returning(nn.Module):
    """``TinyClassifier`` in clothes."""

    def __init__(self, dress):
        super().__init__()
        self.inner, self.dress = TinyClassifier(), dress
        self.eval()

    def forward(self, x):
        return self.dress(self.inner(x))


class Output(dict):
    """As outputs of transformers: a mapping whose entries are attributes, too."""

    __getattr__ = dict.__getitem__


DRESSES = {
    "object": lambda z: SimpleNamespace(logits=z, loss=None),
    "dict": lambda z: {"loss": None, "logits": z},
    "transformers": lambda z: Output(logits=z),
}


def wrapped(classifier):
    return DefendedClassifier(classifier, diffpure(smooth_model(), 0.1, 2, "ddpm"))


@pytest.mark.parametrize("dress", DRESSES)
def test_logits_are_found(dress):
    plain, dressed = TinyClassifier(), Returning(DRESSES[dress])
    assert torch.equal(as_logits(dressed(X)), plain(X))
    keys = {"sample_ids": [0, 1, 2]}
    assert torch.equal(wrapped(dressed)(X, **keys), wrapped(plain)(X, **keys))
    for attack in (PGD("Linf", 0.1, steps=2, eot=1), Square("Linf", 0.1, queries=3)):
        assert torch.equal(attack(dressed, X, Y).images, attack(plain, X, Y).images)
    attack = Transfer("Linf", 0.1, steps=2)
    assert torch.equal(attack(wrapped(dressed), X, Y).images, attack(wrapped(plain), X, Y).images)
    for smooth in (lambda c: Smooth(c, 0.5), lambda c: denoised_smoothing(c, smooth_model(), 0.5)):
        assert torch.equal(*(smooth(c).certify(X, Draws(5, 20)).counts for c in (dressed, plain)))
    guided = [agdm(smooth_model(), 0.1, 2, auxiliary=c) for c in (dressed, plain)]
    assert torch.equal(*(purifier(X, **keys) for purifier in guided))
    attack = GuideTransfer("Linf", 0.1, steps=2)
    assert torch.equal(*(attack(DefendedClassifier(plain, p), X, Y).images for p in guided))


@pytest.mark.parametrize(
    ("dress", "returned"),
    [
        (lambda z: (z, z), "tuple for one image; wrap it in a module that returns the logits alone"),
        (lambda z: z.detach().numpy(), "ndarray for one image; wrap"),
        (lambda z: z[:, 0], r"shape \(1,\) for one image"),
        (lambda z: z[:, :1], r"shape \(1, 1\) for one image"),
        (lambda z: z[:, :, None], r"shape \(1, 5, 1\)"),
        (lambda z: SimpleNamespace(logits=(z, z)), "tuple for one image"),
    ],
)
@pytest.mark.parametrize("defended", [False, True])
def test_other_answers_are_refused_before_work(dress, returned, defended):
    model = wrapped(Returning(dress)) if defended else Returning(dress)
    with pytest.raises(ValueError, match=f"must return logits .* it returned {returned}"):
        PGD("Linf", 0.1, steps=2, eot=1)(model, X, Y)
    who = "The classifier" if defended else "this"
    with pytest.raises(ValueError, match=f"{who} must return logits .* it returned {returned}"):
        check_together([Defence("this", model, [], 1, {})], Samples(X, Y, torch.arange(3)))


def test_probabilities_are_taken_and_remarked_on():
    soft = Returning(lambda z: z.softmax(1))
    for model in (soft, wrapped(soft)):
        with pytest.warns(UserWarning, match="answers probabilities, not logits: .* the DLR loss needs logits"):
            PGD("Linf", 0.1, steps=1, eot=1)(model, X, Y)
    with pytest.warns(UserWarning, match="soft answers probabilities"):
        check_together([Defence("soft", soft, [], 1, {})], Samples(X, Y, torch.arange(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        purifier = diffpure(smooth_model(), 0.1, 2, "ddpm")
        PGD("Linf", 0.1, steps=1, eot=1)(DefendedClassifier(TinyClassifier(), purifier, 2, "votes"), X, Y)
    assert_close(soft(X).sum(1), torch.ones(3))


def test_the_number_of_classes_is_compared_with_the_data():
    samples, defence = Samples(X, Y, torch.arange(3)), Defence("five", TinyClassifier(), [], 1, {})
    check_together([defence], samples, classes=5)
    check_together([defence], samples)
    with pytest.raises(ValueError, match="five tells 5 classes apart, the data has 10; take a classifier of these"):
        check_together([defence], samples, classes=10)
    with pytest.warns(UserWarning, match="five tells 5 classes apart, the data has 4: an attack may end"):
        check_together([defence], samples, classes=4)
