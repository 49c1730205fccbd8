"""Attacks that know what guides a purifier: what they differentiate, where they begin, and what they need."""

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, Purifier
from purify.attacks import PGD, FirstOrderPGD, GuidePGD, GuideTransfer
from purify.purification.guidance import AdversarialGuidance, MSEGuidance


def test_the_first_order_attack_climbs_without_the_second_order_term(images):
    labels = torch.zeros(7, dtype=torch.long)
    model = DefendedClassifier(TinyClassifier(), guided_in_float32())
    options = {"norm": "L2", "eps": 0.5, "steps": 3, "eot": 1}
    found = FirstOrderPGD(**options)(model, images, labels, sample_ids=torch.arange(7)).images

    class Renamed(PGD):
        name = FirstOrderPGD.name  # the same randomness

    same = Renamed(**options)(model.with_gradient(second_order=False), images, labels).images
    whole = Renamed(**options)(model, images, labels).images
    assert torch.equal(found, same)
    assert (found - whole).abs().max() > 1e-3
    assert model.purifier.exact
    assert not model.with_gradient(second_order=False).purifier.exact


def test_guide_transfer_is_pgd_on_the_auxiliary_network(images):
    labels = torch.zeros(7, dtype=torch.long)
    model = DefendedClassifier(TinyClassifier(), guided_in_float32())

    class Renamed(PGD):
        name = GuideTransfer.name

    found = GuideTransfer("Linf", 0.1, steps=3)(model, images, labels).images
    assert torch.equal(found, Renamed("Linf", 0.1, steps=3, eot=1)(model.purifier.auxiliary, images, labels).images)


def test_the_guide_attack_begins_with_what_deceives_the_auxiliary_network(images):
    labels, ids = torch.zeros(7, dtype=torch.long), torch.arange(7)
    model = DefendedClassifier(TinyClassifier(), guided_in_float32())
    attack = GuidePGD("Linf", 0.1, steps=3, eot=2)
    start = attack.first(model, images, labels, ids, 5)
    assert torch.equal(start, GuideTransfer("Linf", 0.1, steps=3).run(model, images, labels, ids, 5).images)
    found = attack.run(model, images, labels, ids, 5)
    assert (found.images - images).abs().max() <= 0.1 + 1e-6
    whole, auxiliary = attack.evaluator(model, 5)(start.repeat_interleave(2, 0), *rows(labels, ids))
    assert (found.loss >= whole.reshape(7, 2).mean(1) - 1e-5).all()  # the start is one of its iterates
    other = model.auxiliary(start)
    torch.testing.assert_close(auxiliary[::2], other[:, 1:].amax(1) - other[:, 0])
    with pytest.raises(ValueError, match="guide_weight must be a finite number"):
        GuidePGD("Linf", 0.1, guide_weight=float("nan"))


def test_the_guide_is_attacked_at_the_size_that_it_sees(images):
    """With resizing, the auxiliary network gets images of the score model's size."""
    guidance = AdversarialGuidance(5.0, auxiliary=TinyClassifier())
    purifier = Purifier(smooth_model(), 0.3, "ddpm", 2, guidance=guidance, resize=True)
    model = DefendedClassifier(TinyClassifier(size=6), purifier)
    large = torch.rand(2, 1, 6, 6)
    found = GuideTransfer("Linf", 0.1, steps=2)(model, large, torch.zeros(2).long()).images
    assert found.shape == large.shape
    assert (found - large).abs().amax((1, 2, 3)).min() > 0.05


def rows(labels, ids):
    """Labels, ids and the first two draws, two rows each."""
    return labels.repeat_interleave(2), ids.repeat_interleave(2), torch.arange(2).repeat(7)


def test_attacks_about_guidance_say_what_they_need(images):
    plain = DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.3, "ddpm", 4))
    gdmp = DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=MSEGuidance(1.0)))
    assert FirstOrderPGD("Linf", 0.1).applies_to(gdmp)
    assert not GuideTransfer("Linf", 0.1).applies_to(gdmp)  # no network
    assert not GuidePGD("Linf", 0.1).applies_to(gdmp)
    with pytest.raises(ValueError, match="for a model that is guided by an auxiliary network"):
        GuidePGD("Linf", 0.1)(gdmp, images, torch.zeros(7).long())
    for attack in (FirstOrderPGD("Linf", 0.1), GuideTransfer("Linf", 0.1), GuidePGD("Linf", 0.1)):
        assert not attack.applies_to(plain)
        with pytest.raises(ValueError, match=r"for a model that (guides its reverse steps|is guided by)"):
            attack(plain, images, torch.zeros(7).long())


def guided_in_float32():
    guidance = AdversarialGuidance(20.0, auxiliary=TinyClassifier(size=4), layer="layers.2")
    return Purifier(smooth_model(), 0.3, "ddpm", 4, guidance=guidance)
