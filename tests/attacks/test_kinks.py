"""Models whose slope is 0 at exactly 0 or 1 are attacked like those that have one."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import hardtanh, relu, relu6

from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, PGD, AutoAttack, AutoAttackRand, Transfer
from purify.attacks.kinks import Inside, Watched, blind, moved
from purify.data import load_dataset

IMAGES, LABELS = (t[:64] for t in load_dataset("digits", "test"))
KINKS = {
    "clamp": lambda x: x.clamp(0, 1),
    "hardtanh": lambda x: hardtanh(x, 0, 1),
    "two relus": lambda x: 1 - relu(1 - relu(x)),
    "relu of 1 - x": lambda x: 1 - relu(1 - x),
    "relu6": lambda x: relu6(6 * x) / 6,
}
RADII = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}


class Behind(nn.Module):
    """The embedded classifier behind something that does nothing to images in [0, 1]."""

    def __init__(self, first=lambda x: x):
        super().__init__()
        self.first, self.inner = first, zoo.classifier("digits-standard")
        self.eval()

    def forward(self, x):
        return self.inner(self.first(x))


def vanishes(kink):
    """Whether the slope at 0 is 0 in the torch that runs: a clamp's is from 2.14 on, in 2.10 it was 1."""
    x = torch.zeros(1, requires_grad=True)
    return float(torch.autograd.grad(KINKS[kink](x).sum(), x)[0]) == 0


def left(model, attack):
    """Which images the attack leaves right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attack(model, IMAGES, LABELS).images
    return model(found).argmax(1) == LABELS


@pytest.mark.parametrize("kink", KINKS)
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("kind", [PGD, APGD, AutoAttackRand])
def test_a_model_that_clamps_its_input_is_judged_as_the_plain_one(kind, norm, kink):
    attack = kind(norm, RADII[norm], steps=20, eot=1).on_deterministic()
    plain, kinked = left(Behind(), attack), left(Behind(KINKS[kink]), attack)
    assert (plain != kinked).sum() <= 2  # of 64; 14 and more without a step inside


def test_from_the_clean_image_too():
    """Where no random start leads inside."""
    attack = PGD("Linf", 0.1, steps=20, random_start=False).on_deterministic()
    assert (left(Behind(), attack) != left(Behind(KINKS["clamp"]), attack)).sum() <= 2


def test_binary_images_have_no_pixels_inside():
    binary = (IMAGES > 0.4).float()
    labels = Behind()(binary).argmax(1)
    attack = PGD("Linf", 0.3, steps=10, random_start=False).on_deterministic()
    with pytest.warns(UserWarning, match="vanishes at pixels of exactly 0 or 1"):
        kinked = attack(Behind(KINKS["two relus"]), binary, labels).images
    assert (kinked - attack(Behind(), binary, labels).images).abs().max() < 0.05


@pytest.mark.parametrize("kink", ["clamp", "two relus"])
def test_a_purifier_behind_a_clamp(kink):
    purifier = diffpure(zoo.score_model("digits"), 0.1, 2, "ddpm")

    class Clamped(DefendedClassifier):
        def forward(self, x, **keys):
            return super().forward(KINKS[kink](x), **keys)

    images, labels = IMAGES[:8], LABELS[:8]
    attack = PGD("Linf", 0.2, steps=3, eot=2)
    plain = attack(DefendedClassifier(zoo.classifier("digits-standard"), purifier), images, labels)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        clamped = attack(Clamped(zoo.classifier("digits-standard"), purifier), images, labels)
    assert any("as if it clamped its input" in str(w.message) for w in said) is vanishes(kink)
    torch.testing.assert_close(clamped.loss, plain.loss, rtol=0.02, atol=0.02)


def test_the_bare_classifier_of_transfer_may_clamp():
    purifier = diffpure(zoo.score_model("digits"), 0.1, 1, "ddpm")
    found = [
        Transfer("Linf", 0.1, steps=10)(DefendedClassifier(Behind(first), purifier), IMAGES[:16], LABELS[:16]).loss
        for first in (KINKS["clamp"], lambda x: x)
    ]
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


class Cropped(nn.Module):
    """Does not look at the frame, where pixels may well be 0; or at anything."""

    def __init__(self, dead=False):
        super().__init__()
        self.inner, self.dead, self.calls = nn.Linear(16, 3), dead, 0
        self.requires_grad_(False).eval()

    def forward(self, x):
        self.calls += torch.is_grad_enabled()
        logits = self.inner(x[:, :, 2:6, 2:6].flatten(1))
        return 0 * logits + torch.arange(3.0) if self.dead else logits


@pytest.mark.parametrize("dead", [False, True])
def test_models_without_kinks_are_left_alone(dead, monkeypatch):
    """To the bit, and asked in vain a few times at most."""
    model, g = Cropped(dead), torch.Generator().manual_seed(0)
    x = nn.functional.pad(0.4 + 0.2 * torch.rand(4, 1, 4, 4, generator=g), (2, 2, 2, 2))
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = PGD("L2", 0.1, steps=8, eot=1, random_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The gradient is zero")
        found = attack(model, x, y).images
    assert model.calls <= 8 + 3
    monkeypatch.setattr(Inside, "ask", lambda self, z, gradient: torch.empty(0, dtype=torch.int64))
    assert torch.equal(found, attack(model, x, y).images)


def test_a_sample_does_not_depend_on_its_batch_mates():
    model, attack = Behind(KINKS["two relus"]), PGD("Linf", 0.1, steps=5, eot=1)
    with pytest.warns(UserWarning, match="clamped"):
        whole = attack(model, IMAGES[:16], LABELS[:16]).images
    with pytest.warns(UserWarning, match="clamped"):
        part = attack(model, IMAGES[4:8], LABELS[4:8], sample_ids=torch.arange(4, 8)).images
    torch.testing.assert_close(part, whole[4:8], rtol=0, atol=1e-5)


def test_blind_samples():
    z = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0], [0.2, 0.3, 0.5, 0.6], [0.0, 0.0, 0.5, 1.0]])
    gradient = torch.tensor([[0.0, 0, 1, 1], [0.0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    shaped = z.reshape(4, 1, 2, 2), gradient.reshape(4, 1, 2, 2)
    assert blind(*shaped).tolist() == [True, False, False, False]
    one_sided = torch.tensor([[1.0, 1, 1, 0]]).reshape(1, 1, 2, 2)
    assert blind(shaped[0][:1], one_sided).tolist() == [True]
    for dtype in (torch.float16, torch.float32, torch.float64):
        inner = moved(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
        assert 0 < inner[0] < 0.01
        assert inner[1] == 0.5
        assert 0.99 < inner[2] < 1


def test_library_attacks_see_the_same_values_until_they_move():
    model = Watched(Behind())
    x = IMAGES[:4].clone().requires_grad_()
    state = torch.get_rng_state()
    model.look(IMAGES[:4])
    assert not model.inside
    assert torch.equal(model(x), Behind()(x))
    clamped = Watched(Behind(KINKS["two relus"]))
    with pytest.warns(UserWarning, match="clamped"):
        clamped.look(IMAGES[:4])
    assert clamped.inside
    assert torch.equal(state, torch.get_rng_state())
    (gradient,) = torch.autograd.grad(clamped(x).sum(), x)
    (plain,) = torch.autograd.grad(Behind()(x).sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(clamped(x), Behind(KINKS["two relus"])(x))


FEW = {
    (2, "standard"): ["apgd-ce", "fab-t", "square"],
    (3, "standard"): ["apgd-ce", "fab-t", "square"],
    (4, "standard"): ["apgd-ce", "apgd-t", "fab-t", "square"],
    (2, "rand"): ["apgd-ce"],
    (3, "rand"): ["apgd-ce", "apgd-dlr"],
    (3, "plus"): ["apgd-ce", "apgd-dlr", "fab", "square", "fab-t"],
}


@pytest.mark.parametrize(("classes", "version"), FEW)
def test_autoattack_on_few_classes(classes, version):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval().requires_grad_(False)
        x = torch.rand(8, 1, 4, 4)
    attack = AutoAttack(model, "Linf", 0.02, seed=0, verbose=False, version=version)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = 5
    attack.square.n_queries = 20
    whole = attack.attacks_to_run
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = attack.run_standard_evaluation(x, model(x).argmax(1))
    assert (found - x).abs().max() <= 0.02 + 1e-6
    assert attack.attacks_to_run == FEW[classes, version]
    sentences = [str(w.message) for w in said if "left out" in str(w.message)]
    lost = [name for name in whole if name not in FEW[classes, version]]
    assert sentences == [f"{', '.join(lost)} needs more classes than the {classes} of this model and is left out."] * (
        len(lost) > 0
    )


def test_autoattack_without_an_attack_for_so_few_classes_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval().requires_grad_(False)
    attack = AutoAttack(model, verbose=False, version="custom", attacks_to_run=["apgd-t"])
    with pytest.raises(ValueError, match=r"^apgd-t needs more classes than the 3 of this model; use apgd-ce"):
        attack.run_standard_evaluation(torch.rand(2, 1, 4, 4), torch.zeros(2).long())
