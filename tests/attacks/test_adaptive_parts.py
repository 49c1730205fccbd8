"""What the adaptive attack is made of: the shorter process, its climbs, mixtures and races."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from climbed import IDS, varying
from conftest import TinyClassifier, TinyConvolutions, smooth_model
from torch import nn

from purify import DefendedClassifier, Purifier
from purify.attacks import Adaptive
from purify.attacks.adaptive import phases
from purify.attacks.adaptive.climb import Climb, Mix
from purify.attacks.adaptive.select import Race, score
from purify.attacks.norms import unit
from purify.attacks.pgd import LOSSES, STEP_SCHEDULES
from purify.presets import PURIFIERS
from purify.purification.gradients import Surrogate
from purify.purification.plans import Held


def test_the_shorter_process_ends_as_the_whole_one(images):
    """One of three rounds: its last two, a step in each, whatever engine differentiates the whole."""
    model = DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.3, "ddpm", 6, rounds=(0.4, 0.5, 1.0)))
    by_hand = Purifier(smooth_model(), 0.3, "ddpm", 1, rounds=(0.5, 1.0), gradient="checkpoint")
    expected = gradient_of(DefendedClassifier(TinyClassifier(), by_hand), images)
    for engine in ("full", Surrogate(rounds=(0, 2), steps=(2, 2))):
        assert torch.equal(gradient_of(phases.shorter(model.with_gradient(engine)), images), expected)


def test_where_time_stands_still_the_shorter_process_has_half_the_steps(images):
    def held(steps):
        return DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.1, "langevin", Held(steps)))

    assert torch.equal(gradient_of(phases.shorter(held(9)), images), gradient_of(held(5), images))


def gradient_of(model, images):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(model(x, sample_ids=IDS).sum(), x)[0]


def test_guidance_is_held_constant_only_where_a_network_is_differentiated_for_it():
    """GDMP's distance of pixels and the corrections lead the input into every step, which an attack must see."""
    held = {}
    for name, preset in PURIFIERS.items():
        options = {"auxiliary": TinyConvolutions()} if name in ("agdm", "heterogeneous") else {}
        model = DefendedClassifier(TinyClassifier(), preset(smooth_model(), 0.3, 3, "ddpm", **options))
        attack = Adaptive("Linf", 0.1, calls=2000)
        guidances = [phase.model.purifier.guidance for stage in attack.stages(model) for phase in stage.phases]
        held[name] = any(guidance is not None and not guidance.second_order for guidance in guidances)
        mixed = any(phase.mix is not None for stage in attack.stages(model) for phase in stage.phases)
        assert held[name] == mixed == (attack.warm(model) > 0)
    assert [name for name, one in held.items() if one] == ["agdm"]


def test_the_gradient_goes_through_the_level(images, labels):
    """The whole process is climbed with t*(x) as it is, not held constant."""
    model = DefendedClassifier(TinyClassifier(), varying())
    plan = Adaptive("Linf", 0.1, calls=2000).plan(model)
    for stage in (*plan.stages, *plan.fallen):
        for phase in stage.phases:
            assert phase.model.purifier.through_level
            assert phase.model.purifier.exact


def test_where_the_level_falls_climbs_lower_it(images, labels):
    """By hand: momentum of the two terms, mixed at unit length, in steps of L2 length; from the clean image."""
    model = DefendedClassifier(TinyClassifier(), varying())
    first, second = Adaptive("Linf", 0.1, calls=2000).plan(model).fallen
    (level,) = first.phases
    assert (level.clean, second.phases[-1].clean) == (True, False)
    assert level.model.purifier.level.highest == pytest.approx(0.7 * model.purifier.level.highest)
    climb = replace(level.climb, steps=2, eot=1)
    path = list(climb.path(climb.target(level.model, images, labels, IDS, 5), images))
    z, past = images, [0.0, 0.0]
    for step in range(2):
        v = z.clone().requires_grad_()
        found = level.model.details(v, sample_ids=IDS, draw=torch.full_like(IDS, step), seed=5)
        terms = LOSSES["margin"](found.logits, labels), found.statistic.mean(1)
        gradients = [torch.autograd.grad(t.sum(), v, retain_graph=True)[0] for t in terms]
        past = [0.9 * p + g for p, g in zip(past, gradients, strict=True)]
        size = 0.1 * 4 / 6 * STEP_SCHEDULES["cosine"](step / 2)
        z = (z + size * unit(unit(past[0]) - unit(past[1]))).clamp(images - 0.1, images + 0.1).clamp(0, 1)
        torch.testing.assert_close(path[step], z)


def test_momentum_survives_a_zero_gradient(images):
    class Flat(nn.Module):
        """No gradient at all where the mean is above a half."""

        def forward(self, x):
            value = x.flatten(1).mean(1).clamp_max(0.5)
            return torch.stack([torch.zeros_like(value), value], 1)

    x, y = torch.full((1, 1, 4, 4), 0.45), torch.zeros(1, dtype=torch.long)
    means = {}
    for momentum in (0.0, 0.75):
        climb = Climb("Linf", 0.3, steps=6, eot=1, momentum=momentum, schedule="constant", step_size=0.06)
        means[momentum] = list(climb.path(climb.target(Flat(), x, y, IDS[:1], 0), x))[-1].mean().item()
    assert means[0.0] == pytest.approx(0.51, abs=1e-6)
    assert means[0.75] == pytest.approx(0.75, abs=1e-6)


def test_scaled_draws_weigh_the_same():
    g = torch.randn(1, 2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    g[0, 0, 0] *= 1e6
    found = Climb("Linf", 0.1, scaled=True).average(g)
    expected = torch.stack([torch.stack([unit(d[None])[0] for d in image]).mean(0) for image in g[0]])[None]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Climb("Linf", 0.1).average(g), g.mean(2))


def test_the_mixture_by_hand(images, labels):
    network, g = TinyClassifier(), torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    v = images.clone().requires_grad_()
    logits = network(v)
    own = nn.functional.one_hot(labels, logits.shape[1]).bool()
    margin = logits.masked_fill(own, -math.inf).amax(1) - logits[own]
    (a,) = torch.autograd.grad(margin.sum(), v)
    torch.testing.assert_close(Mix(network, 0.3)(g, images, labels), unit(g) + 0.3 * unit(a))


def test_a_race_finds_the_best_and_counts_its_draws():
    """Candidates whose pixel is the chance of a wrong answer; every draw is counted."""
    chances = torch.tensor([0.1, 0.9, 0.3, 0.5, 0.2])
    candidates = chances[:, None, None, None, None].expand(5, 6, 1, 1, 1)
    asked = Counter()

    def call(images, ids, draws):
        generator = [torch.Generator().manual_seed(int(i) * 1000 + int(d)) for i, d in zip(ids, draws, strict=True)]
        coin = torch.stack([torch.rand((), generator=g) for g in generator])
        asked.update(ids.tolist())
        wrong = (coin < images.flatten(1)[:, 0]).float()
        return torch.stack([1 - wrong, wrong], 1)

    race = Race(5, 200)
    won = race.run(call, candidates, torch.zeros(6, dtype=torch.long), torch.arange(6), 64)
    assert (won.images == 0.9).all()
    assert set(asked.values()) == {race.used}
    assert race.used <= 200
    assert won.margins.shape == (6, race.draws)
    assert Race(1, 50).rounds() == []
    assert Race(9, 18).rounds() == [(9, 1), (5, 1)]
    few = Race(5, 4)
    assert few.rounds() == []
    last = few.run(call, candidates, torch.zeros(6, dtype=torch.long), torch.arange(6), 64)
    assert (last.images == candidates[-1]).all()


def test_what_wins_is_the_share_of_wrong_answers():
    """One answer that is very wrong counts less than two that are wrong; among equals the more wrong wins."""
    margins = torch.tensor([[90.0, -9.0, -9.0], [9.0, 9.0, -90.0], [9.0, 10.0, -90.0]])
    assert score(margins).argsort(descending=True).tolist() == [2, 1, 0]
