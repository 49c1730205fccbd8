"""Losses of training-side defences: noise that stays Gaussian, attacks that climb, targets by hand."""

import pytest
import torch
from conftest import SmoothNet
from torch.testing import assert_close

from purify import ContinuousVP, ScoreModel, diffpure, zoo
from purify.data import load_dataset
from purify.diffusion.reverse import DDIM
from purify.train.__main__ import build
from purify.train.defences import ADDTLoss, ConsistencyDistillation, PurifiedCrossEntropy, gaussian_by_rank
from purify.train.losses import training_times
from purify.train.recipes import RECIPES

IMAGES, LABELS = (part[:6] for part in load_dataset("digits", "train"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    return ScoreModel(SmoothNet(), ContinuousVP(), image_shape=(1, 8, 8))


def test_ranks_are_kept_and_the_numbers_are_those_of_the_noise():
    values, normal = torch.rand(3, 1, 4, 4, generator=seeded()) ** 5, torch.randn(3, 1, 4, 4, generator=seeded(1))
    mapped = gaussian_by_rank(values, normal)
    assert_close(mapped.flatten(1).sort(1).values, normal.flatten(1).sort(1).values)
    assert torch.equal(mapped.flatten(1).argsort(1), values.flatten(1).argsort(1))
    assert torch.equal(gaussian_by_rank(normal, normal), normal)


def test_addt_without_adversarial_noise_is_the_noise_loss():
    t = training_times(6, (generator := seeded(3)))
    z, u = torch.randn(IMAGES.shape, generator=generator), 2 * IMAGES - 1
    model = network()
    alpha, sigma = (c(t).float().reshape(-1, 1, 1, 1) for c in (model.schedule.alpha, model.schedule.sigma))
    expected = (model.eps(alpha * u + sigma * z, t) - z).square().mean()
    assert_close(ADDTLoss("digits-standard", unit=0, attack_steps=0)(model, IMAGES, LABELS, seeded(3)), expected)


def test_addt_adds_noise_that_deceives_the_classifier_at_the_levels_it_says():
    model, t = zoo.score_model("digits"), torch.full((6,), 0.1).double()
    loss = ADDTLoss("digits-standard", unit=0.3, most=0.7)
    z, g = (torch.randn(IMAGES.shape, generator=seeded(k)) for k in (1, 2))
    u_t, noise = loss.noised(model, IMAGES, t, z, g)
    alpha, sigma = model.schedule.alpha(t[:1]).item(), model.schedule.sigma(t[:1]).item()
    share = min(0.3 * alpha / sigma, 0.7)
    assert_close(noise, (1 - share**2) ** 0.5 * z + share * g)
    assert_close(u_t, alpha * (2 * IMAGES - 1) + sigma * noise)
    first, last = (misled(model, ADDTLoss("digits-standard", 0.6, 0.9, steps), seeded(5)) for steps in (0, 4))
    assert last > first + 0.5
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def misled(model, loss, generator):
    """The classifier's cross-entropy at the estimate from the noise that the network is trained at."""
    seen = []
    hook = model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss(model, IMAGES, LABELS, generator)
    hook.remove()
    u_t, labels = seen[-1]
    estimate = model.denoise(u_t, labels.double() / 1000)
    return torch.nn.functional.cross_entropy(loss.frozen((estimate + 1) / 2), LABELS)


def test_what_purifies_is_frozen_and_the_classifier_is_trained_on_what_it_lets_through():
    loss, model = PurifiedCrossEntropy("digits", 0.1, 2), build(RECIPES["digits-standard"])
    value = loss(model, IMAGES, LABELS, seeded())
    seed = int(torch.randint(2**62, (), generator=seeded()))
    purified = diffpure(zoo.score_model("digits"), 0.1, 2, "ddpm")(IMAGES, sample_ids=range(6), seed=seed)
    assert_close(value, torch.nn.functional.cross_entropy(model(purified), LABELS))
    value.backward()
    assert all(p.grad is None for p in loss.purifier.parameters())


def test_an_attack_through_the_purification_raises_its_loss():
    model = zoo.classifier("digits-standard").requires_grad_(True)
    plain, attacked = (
        PurifiedCrossEntropy("digits", 0.1, 1, "one-shot", eps=eps, attack_steps=steps)(model, IMAGES, LABELS, seeded())
        for eps, steps in ((0.0, 0), (0.3, 3))
    )
    assert attacked > plain + 1


def test_distillation_asks_for_what_it_says_one_teacher_step_nearer():
    loss, model, teacher = ConsistencyDistillation("digits", 0.5, 0.1), network(), zoo.score_model("digits")
    t = 1e-3 + 0.499 * torch.rand(6, generator=(generator := seeded(2)), dtype=torch.float64)
    s, u = (t - 0.1).clamp_min(0), 2 * IMAGES - 1
    z, shape = torch.randn(IMAGES.shape, generator=generator), (-1, 1, 1, 1)
    u_t = model.schedule.alpha(t).float().reshape(shape) * u + model.schedule.sigma(t).float().reshape(shape) * z
    target = model.denoise(DDIM()(teacher, u_t, t, s, None), s)
    c = 0.00054 * 8
    distance = ((model.denoise(u_t, t) - target).square().sum((1, 2, 3)) + c**2).sqrt() - c
    assert_close(loss(model, IMAGES, LABELS, seeded(2)), distance.mean())


def test_a_teacher_of_exact_steps_leaves_nothing_to_learn_at_the_end():
    """Where the teacher's step ends at 0, the target is its own estimate, whatever the network is."""
    loss = ConsistencyDistillation("digits", 0.02, 0.05)
    assert loss(zoo.score_model("digits"), IMAGES, LABELS, seeded()).item() == pytest.approx(0, abs=1e-4)
    assert loss(network(), IMAGES, LABELS, seeded()) > 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ADDTLoss("digits-standard", most=1), r"most must lie in \[0, 1\)"),
        (lambda: ADDTLoss("digits-standard", unit=-1), "unit must be a number of at least 0"),
        (lambda: PurifiedCrossEntropy("digits", 0.1, 0), "steps must be"),
        (lambda: ConsistencyDistillation("digits", t_max=2), r"t_max in \(0.001, 1\]"),
    ],
)
def test_parameters_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_classifiers_are_fine_tuned_from_classifiers():
    start = build(RECIPES["digits-purified"])
    own = zoo.classifier("digits-standard").state_dict()
    assert all(torch.equal(w, own[k]) for k, w in start.state_dict().items())
    assert all(p.requires_grad for p in start.parameters())
