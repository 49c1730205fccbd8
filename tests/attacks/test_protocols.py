"""What attacks ask of a model: any with the members of a protocol will do, and who lacks some is told which."""

from dataclasses import dataclass
from typing import Protocol

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn

from purify import DefendedClassifier, Purifier, diffpure
from purify.attacks import ATTACKS, BPDA, PGD, LowLevelPGD, StepsPGD, Transfer
from purify.attacks.base import keyed
from purify.attacks.protocols import FEATURES, PURIFIER, AcceptsKeys, Feature
from purify.checks import has

LABELS = torch.arange(7) % 5


def defended():
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"))


class Passing(nn.Module):
    """Passes everything on, as compiled models do; its own class has none of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)

    def forward(self, *arguments, **options):
        return self.model(*arguments, **options)


@pytest.mark.parametrize("name", ["pgd-eot", "bpda-eot", "transfer", "pgd-eot-steps"])
def test_members_that_a_model_passes_on_count(name, images):
    attack, model = ATTACKS[name]("Linf", 0.2, steps=2, eot=2), defended()
    assert has(Passing(model), AcceptsKeys)
    assert torch.equal(attack(Passing(model), images, LABELS).images, attack(model, images, LABELS).images)


def test_a_model_without_keys_is_called_without(images):
    call = keyed(TinyClassifier(), 0)
    assert torch.equal(call(images, LABELS, LABELS), TinyClassifier()(images))


def test_who_lacks_part_of_what_is_used_is_told_what(images):
    class Half(TinyClassifier):
        level_varies = True

        def details(self, x, **keys):
            raise AssertionError

    with pytest.raises(ValueError, match="each image; this one lacks at_share, with_gradient, use pgd-eot"):
        LowLevelPGD("Linf", 0.1)(Half(), images, LABELS)
    with pytest.raises(ValueError, match=r"steps all samples together .*; this one lacks in_step, use pgd-eot"):
        StepsPGD("Linf", 0.1)(Half(), images, LABELS)
    with pytest.raises(ValueError, match="has a purifier; this one does not, use pgd-eot"):
        Transfer("Linf", 0.1)(TinyClassifier(), images, LABELS)
    with pytest.raises(ValueError, match="TinyClassifier is no model that has a purifier: it lacks"):
        BPDA("Linf", 0.1).attacked(TinyClassifier())


def test_an_attack_may_name_what_it_needs(images):
    @dataclass(frozen=True)
    class Named(BPDA):
        needs = "purifier"

    for kind in (BPDA, Named):
        assert kind("Linf", 0.1).feature is PURIFIER
        assert kind("Linf", 0.1).applies_to(defended())
        assert not kind("Linf", 0.1).applies_to(TinyClassifier())
    Named.needs = "purifer"
    with pytest.raises(ValueError, match=r"Unknown feature of models 'purifer' \(did you mean 'purifier'\?\)"):
        Named("Linf", 0.1)(defended(), images, LABELS)


def test_an_attack_may_bring_a_feature_of_its_own(images):
    class Cautious(Protocol):
        @property
        def caution(self) -> float: ...

    class CautiousClassifier(TinyClassifier):
        caution = 0.5

    @dataclass(frozen=True)
    class Own(PGD):
        needs = Feature(Cautious, "is cautious", lambda model: model.caution > 0)

    attack = Own("Linf", 0.1, steps=1, eot=1)
    assert attack(CautiousClassifier(), images, LABELS).images.shape == images.shape
    with pytest.raises(ValueError, match="is for a model that is cautious; this one does not"):
        attack(TinyClassifier(), images, LABELS)


def test_every_feature_is_that_of_some_purifier_and_of_no_bare_classifier():
    assert not any(feature.is_of(TinyClassifier()) for feature in FEATURES.values())
    assert {name for name, feature in FEATURES.items() if feature.is_of(defended())} == {
        "purifier",
        "classifier",
        "in_step",
    }


def test_a_twin_shares_weights_and_hooks_but_not_its_parts(images):
    purifier = Purifier(smooth_model(), 0.3, "ddpm", 4)
    calls = []
    purifier.register_forward_hook(lambda *_: calls.append(1))
    twin = purifier.with_steps(2)
    twin(images)
    assert calls == [1]
    assert twin.score_model is purifier.score_model
    twin.score_model = smooth_model()
    assert twin.score_model is not purifier.score_model
    assert (twin.plan.steps, purifier.plan.steps) == (2, 4)
