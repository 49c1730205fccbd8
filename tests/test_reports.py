"""What people reported elsewhere, tried here: see docs/reports.md, whose rows name these tests."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model

from purify import ContinuousVP, DefendedClassifier, Evaluation, Purifier, ScoreModel, diffpure, wrap
from purify.attacks import APGD, PGD, Adaptive, AutoAttack, Square
from purify.certify import Draws, Smooth
from purify.data import load_dataset
from purify.evaluate.attacking import prepare
from purify.evaluate.plausible import check_clean

X = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = TinyClassifier()(X).argmax(1)
PAGE = Path(__file__).parents[1] / "docs" / "reports.md"


def defended(**options):
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.1, 2, "ddpm", **options))


class Kill(torch.autograd.Function):
    """Identity, with a gradient of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Killed(TinyClassifier):
    def forward(self, x):
        return super().forward(Kill.apply(x))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("attack", [PGD, APGD, Adaptive])
def test_a_killed_gradient_is_remarked_on(attack, norm):
    budget = {"calls": 100} if attack is Adaptive else {"steps": 3, "eot": 1}
    with pytest.warns(UserWarning, match="gradient is zero at every pixel of every image"):
        found = attack(norm, 0.1, **budget)(Killed(), X, Y).images
    assert found.isfinite().all()  # nothing is divided by its length
    assert (found >= 0).all()
    assert (found <= 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(norm, 0.1, **budget)(TinyClassifier(), X, Y)


def test_nan_in_a_gradient_is_an_error_and_not_zero():
    class Root(TinyClassifier):
        def forward(self, x):
            return super().forward(x) + 0 * (x - x.detach()).abs().sqrt().flatten(1)[:, :5]

    with pytest.raises(ValueError, match="loss or gradient that is not finite for sample 0"):
        PGD("Linf", 0.1, steps=2, eot=1)(Root(), X, Y)


def test_a_label_that_is_ruled_out_is_named_among_the_causes():
    """Minus infinity is an answer, but the loss of its label is no number; no purifier is here to be blamed."""

    class Ruled(TinyClassifier):
        def forward(self, x):
            return super().forward(x).index_fill(1, Y[:1], -torch.inf)

    with pytest.raises(ValueError, match="not finite for sample 0; check that the logit of its label is finite, and"):
        PGD("Linf", 0.1, steps=2, eot=1)(Ruled(), X, Y)


def test_no_attack_changes_the_mode_of_a_model():
    """One that trains in between is refused, and left as it is."""
    model = defended()
    model.classifier.train()
    for attack in (PGD("Linf", 0.1, steps=1, eot=1), Square("Linf", 0.1, queries=2)):
        with pytest.raises(ValueError, match=r"train mode; call classifier.eval\(\)"):
            attack(model, X, Y)
        assert model.classifier.training
    model.classifier.eval()
    AutoAttack(model, eps=0.1, seed=0, verbose=False, version="custom", attacks_to_run=["square"])
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_rounding_beyond_the_range_is_taken_and_not_returned(norm):
    z = X.clone()
    z[0, 0, 0, 0], z[1, 0, 0, 0] = -2.98e-8, 1 + 1.2e-7
    found = PGD(norm, 0.1, steps=2, eot=1)(defended(), z, Y).images
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_normalised_images_and_8_bit_ones_are_refused():
    for images, message in (((X - 0.5) / 0.25, r"must lie in \[0, 1\]"), (255 * X, r"must lie in \[0, 1\]")):
        for call in (
            defended(),
            lambda x: PGD("Linf", 0.1)(TinyClassifier(), x, Y),
            Smooth(TinyClassifier(), 0.5).certify,
        ):
            with pytest.raises(ValueError, match=message):
                call(images)


NET = """
import torch
from torch import nn
from purify import zoo

class Expecting(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.network, self.other = zoo.classifier("digits-standard"), other
    def forward(self, x):
        return self.network((x + 0.5 * x.flip(2) - 1).roll(3, 3) if self.other else x)

def other():
    return Expecting(True).eval()

def own():
    return Expecting(False).eval()
"""


def test_a_classifier_that_guesses_is_remarked_on(tmp_path):
    """It expects other images than it gets: nothing else would tell."""
    (tmp_path / "net.py").write_text(NET)
    few = {"attacks": "pgd-eot", "n_examples": 64, "noise_level": "constant", "steps": 2}
    with pytest.warns(UserWarning, match=r"undefended is right on \d of 64 clean images, hardly more than guessing"):
        prepare(Evaluation(model=f"{tmp_path}/net.py:other", **few))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(Evaluation(model=f"{tmp_path}/net.py:own", **few))


@pytest.mark.parametrize(
    ("classes", "right", "images", "guesses"),
    [(2, 21, 24, False), (2, 32, 64, True), (10, 12, 12, False), (10, 8, 64, False), (10, 6, 64, True)],
)
def test_guessing_is_by_the_classes_that_the_model_answers_with(classes, right, images, guesses):
    """Not by those among the labels: here there is one."""
    answers = torch.eye(classes)[(torch.arange(images) >= right).long()]  # class 0 as often as it is right
    x, y, ids = torch.zeros(images, 1, 4, 4), torch.zeros(images).long(), torch.arange(images)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_clean("net", lambda x: answers, x, y, ids)
    assert bool(said) == guesses


def test_a_classifier_of_many_classes_that_is_never_right_is_remarked_on():
    x, y, ids = torch.zeros(64, 1, 4, 4), torch.arange(64) % 10, torch.arange(64)
    with pytest.warns(UserWarning, match="right on 0 of 64 clean images, hardly more than guessing"):
        check_clean("net", lambda x: torch.eye(1000)[ids + 500], x, y, ids)


def test_a_noise_level_in_steps_is_named():
    with pytest.raises(ValueError, match=re.escape("(0, 1], got 100.0; of 1000 diffusion steps, 100 are 0.1.")):
        diffpure(smooth_model(), 100)
    with pytest.raises(ValueError, match=re.escape("got 2000.0.")):
        diffpure(smooth_model(), 2000)


def test_gradients_do_not_depend_on_the_batch():
    """Of a summed loss under mixed precision."""
    model = DefendedClassifier(
        TinyClassifier(), Purifier(smooth_model().with_settings(autocast="float16"), 0.1, "ddpm", 2)
    )
    attack = PGD("Linf", 0.1, steps=2, eot=2)
    whole = attack(model, X, Y, sample_ids=torch.arange(4)).images
    for i in range(4):
        assert torch.equal(attack(model, X[i : i + 1], Y[i : i + 1], sample_ids=torch.tensor([i])).images[0], whole[i])


def test_ten_draws_that_can_never_certify_are_refused():
    with pytest.raises(ValueError, match="abstain"):
        Smooth(TinyClassifier(), 0.5).certify(X, Draws(10, 9, 0.001))
    assert Smooth(TinyClassifier(), 0.5).certify(X, Draws(10, 20, 0.001)).radii.max() > 0


def test_noise_of_a_certificate_is_fresh_in_every_draw():
    seen = []

    class Spy(TinyClassifier):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    Smooth(Spy(), 0.5).certify(X[:1], Draws(5, 20))
    rows = torch.cat(seen).flatten(1)
    assert len(rows) == 25
    assert len(rows.unique(dim=0)) == 25


def test_black_pictures_of_half_precision_are_errors():
    network = SmoothNet()
    with torch.no_grad():
        network.last.weight *= 1e7
    model = ScoreModel(network, ContinuousVP(), image_shape=(1, 4, 4), autocast="float16")
    with pytest.raises(
        ValueError, match=re.escape("'last' (Conv2d), which overflows float16; use bfloat16 or float32.")
    ):
        diffpure(model, 0.1, 2, "ddpm")(X)


def test_one_image_is_purified_as_well_as_many():
    images = load_dataset("digits", "test")[0][:2]
    model = wrap("digits-standard", dataset="digits", steps=2)
    together = model.purifier(images, sample_ids=[0, 1])
    assert torch.allclose(model.purifier(images[:1], sample_ids=[0]), together[:1], atol=1e-6)


def test_every_row_of_the_page_names_a_test_that_exists():
    here = Path(__file__).parents[1]
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text()))
    assert len(named) > 8
    for file, test in named:
        text = (here / file).read_text()
        assert not test or f"def {test}(" in text, (file, test)
