"""The adaptive attack: what it counts, which draws it uses, where it stays and what it reaches."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import Linear, TinyClassifier, TinyConvolutions, smooth_model
from torch import nn

from purify import DefendedClassifier, FixedDt, Purifier, SSNISigmoid, calibrate, diffpure
from purify.attacks import PGD, Adaptive
from purify.attacks.adaptive import phases
from purify.attacks.adaptive.climb import Climb, Mix
from purify.attacks.adaptive.phases import Stage
from purify.attacks.adaptive.select import ENOUGH, Race, score
from purify.attacks.norms import BALLS, unit
from purify.attacks.pgd import LOSSES, STEP_SCHEDULES
from purify.diffusion.noise import derive_seed
from purify.evaluate import Defence, Samples
from purify.evaluate.progress import cost, weight
from purify.evaluate.runner import judge
from purify.evaluate.selfchecks import convergence_checks
from purify.presets import PURIFIERS
from purify.purification.calls import GRADIENT, calls
from purify.purification.gradients import Surrogate
from purify.purification.guidance import AdversarialGuidance, MSEGuidance
from purify.purification.levels import LEVELS
from purify.purification.plans import Held

IDS = torch.arange(7)


@pytest.fixture
def labels():
    return torch.arange(7) % 5


def guided(**options):
    guidance = AdversarialGuidance(20.0, auxiliary=TinyClassifier(size=4), layer="layers.2", **options)
    return Purifier(smooth_model(), 0.3, "ddpm", 8, guidance=guidance)


def varying():
    score_model = smooth_model()
    found = calibrate(score_model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    return Purifier(score_model, SSNISigmoid(0.4, found), "ddpm", 6)


MODELS = {
    "plain": lambda: diffpure(smooth_model(), 0.3, 8, "ddpm"),
    "rounds": lambda: Purifier(smooth_model(), 0.3, "ddpm", 6, rounds=(0.5, 1.0)),
    "level": varying,
    "mse": lambda: Purifier(smooth_model(), 0.3, "ddpm", 6, guidance=MSEGuidance(1.0)),
    "network": guided,
    "diffused": lambda: guided(reference="diffused"),
    "packed": lambda: diffpure(smooth_model(), 0.3, FixedDt(0.05), "ddpm"),
}


class Meter:
    """Network calls by hooks: rows of every network's forward passes, with what is differentiated at its price."""

    def __init__(self, model, monkeypatch):
        self.total, self.passes, self.inside = 0, 0, None
        details = DefendedClassifier.details

        def metered(model, x, **keys):
            self.enter(model, x)
            found = details(model, x, **keys)
            self.inside = None
            return found

        monkeypatch.setattr(DefendedClassifier, "details", metered)
        for network in (model.purifier.score_model.network, model.classifier):
            network.register_forward_hook(self.network)
        if model.purifier.auxiliary is not None:
            model.purifier.auxiliary.register_forward_hook(self.auxiliary)

    def enter(self, model, x):
        guidance = model.purifier.guidance
        asked = torch.is_grad_enabled() and x.requires_grad
        held = guidance is not None and not guidance.second_order
        self.inside = (GRADIENT, GRADIENT - held) if asked else (1, 1)
        self.once = guidance is not None and guidance.reference == "input"
        self.reference = True

    def network(self, network, inputs, output):
        if torch._C._current_graph_task_id() == -1:  # what is recomputed is in the price
            self.total += len(inputs[0]) * self.inside[0]

    def auxiliary(self, network, inputs, output):
        if torch._C._current_graph_task_id() != -1:
            return
        if self.inside is None:
            self.total += len(inputs[0]) * (GRADIENT if output.requires_grad else 1)
            return
        # The state's way through the network is gone back at once; that of a reference, which comes first, is not.
        self.total += len(inputs[0]) * self.inside[1] * (1 if self.reference else 2)
        self.reference = not self.once and not self.reference


def uncounted(plan, used):
    """Calls of the statistics' own way back, which hooks on forward passes do not see, of images that took these."""
    if plan.probe is None:
        return 0
    stages = (Stage((plan.probe,), Race(1, 0), 0), *plan.longest)
    total, before = 0, 0
    for stage in stages:
        climbs = [p for p in stage.phases if p.lowers]
        each = sum(p.climb.steps * p.climb.eot * p.model.purifier.level.calls for p in climbs)
        total += each * int((used > before).sum())
        before += stage.climbs + stage.race.used * calls(plan.stages[-1].phases[0].model).forward
    return total


@pytest.mark.parametrize("name", [*MODELS, "falling"])
@pytest.mark.parametrize("budget", [400, 1000])
def test_calls_counted_by_hooks_are_those_stated(name, budget, images, labels, monkeypatch):
    """``falling``: where the probe says that t* of every image falls; ``level``: of none."""
    images, labels, ids = images[:3], labels[:3], IDS[:3]
    monkeypatch.setattr(phases, "FALLEN", 2.0 if name == "falling" else 0.0)
    model = DefendedClassifier(TinyClassifier(), MODELS[{"falling": "level"}.get(name, name)]())
    attack, meter = Adaptive("Linf", 0.1, calls=budget), Meter(model, monkeypatch)
    found = attack.run(model, images, labels, ids, 0)
    plan = attack.plan(model)
    taken = plan.fallen if name == "falling" else plan.stages
    counted = meter.total + uncounted(replace(plan, stages=taken, fallen=taken), found.calls)
    assert found.calls.sum() == counted if name != "packed" else found.calls.sum() >= counted
    longest = sum(stage.climbs + stage.race.used * calls(model).forward for stage in plan.longest)
    full = longest + plan.probing + (61 if model.auxiliary is not None else 0)
    assert (found.calls <= full).all()
    gradients, forwards = attack.passes(model)
    assert gradients * calls(model).gradient + forwards * calls(model).forward == pytest.approx(full)
    if budget == 1000:
        assert full <= budget


def test_the_probe_tells_whose_level_falls(images, labels, monkeypatch):
    """By the level of its last iterate, image by image; only those go on towards smaller t*."""
    model, attack = DefendedClassifier(TinyClassifier(), varying()), Adaptive("Linf", 0.1, calls=1000)
    probe = attack.plan(model).probe
    target = probe.climb.target(probe.model, images, labels, IDS, derive_seed(0, "probe"))
    *_, last = probe.climb.path(target, images)
    asked = {"sample_ids": IDS, "draw": torch.zeros_like(IDS), "seed": derive_seed(0, "asked")}
    share = probe.model.details(last, **asked).t_star[:, 0] / probe.model.purifier.level.highest
    middle = share.sort().values[2:4].mean().item()
    monkeypatch.setattr(phases, "FALLEN", middle)
    found = attack.run(model, images, labels, IDS, 0)
    for fallen in (False, True):
        mine = (share < middle) == fallen
        assert mine.any()
        monkeypatch.setattr(phases, "FALLEN", 2.0 if fallen else 0.0)
        alone = attack.run(model, images[mine], labels[mine], IDS[mine], 0)
        assert torch.equal(found.images[mine], alone.images)


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_kept_down_to_a_step_of_every_climb_and_fewer_are_refused(name, images, labels):
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    with pytest.warns(UserWarning, match=r"takes at least (\d+) network calls .* in place of 1\.") as said:
        least = Adaptive("Linf", 0.1, calls=1).fitted(model).calls
    assert f" {least} " in str(said[0].message)
    for budget in range(least, 5 * least, max(1, least // 7)):
        attack = Adaptive("Linf", 0.1, calls=budget)
        assert attack.fitted(model) is attack
        plan = attack.plan(model)
        for stages in filter(None, (plan.stages, plan.fallen)):
            assert attack.warm(model) + plan.probing + sum(stage.calls for stage in stages) <= budget
    attack = Adaptive("Linf", 0.1, calls=least)
    assert all(phase.climb.steps == phase.climb.eot == 1 for stage in attack.stages(model) for phase in stage.phases)
    with pytest.raises(ValueError, match=f"at least {least} network calls .* got {least - 1}; give as many"):
        replace(attack, calls=least - 1)(model, images, labels)


def test_several_purifications_cost_as_many(images, labels, monkeypatch):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"), purifications=3)
    meter = Meter(model, monkeypatch)
    found = Adaptive("Linf", 0.1, calls=2000).run(model, images, labels, IDS, 0)
    assert found.calls.sum() == meter.total
    assert calls(model).forward == 3 * 5


def test_draws_of_gradients_selection_and_judges_are_apart(images, labels):
    """By the keys that the model sees: no (seed, draw) of one kind is one of another's, and none is chosen twice."""
    model, seen = DefendedClassifier(TinyClassifier(), guided()), []

    def spy(module, arguments, options):
        draws = options["draw"].tolist()
        seen.append((torch.is_grad_enabled() and arguments[0].requires_grad, options["seed"], set(draws)))

    model.register_forward_pre_hook(spy, with_kwargs=True)
    seed = derive_seed(derive_seed(0, "attack"), "adaptive")
    Adaptive("Linf", 0.1, calls=3000).run(model, images, labels, IDS, seed)
    gradients = {(s, d) for g, s, draws in seen if g for d in draws}
    chosen = {(s, d) for g, s, draws in seen if not g for d in draws}
    seen.clear()
    judge(Defence("d", model, [], 5, {}), images, IDS, 0)
    assert gradients
    assert chosen
    assert not gradients & chosen
    judges = derive_seed(0, "judge")
    assert judges not in {s for s, _ in gradients | chosen}
    first, last = Adaptive("Linf", 0.1, calls=3000).stages(model)
    assert last.race.first == first.race.draws  # the second race's draws begin after the first's


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [("plain", "L2", 0.5), ("level", "Linf", 0.1), ("mse", "L1", 1.5), ("network", "Linf", 0.1), ("packed", "L2", 0.5)],
)
def test_images_stay_in_the_ball(name, norm, eps, images, labels):
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    found = Adaptive(norm, eps, calls=400)(model, images, labels).images
    assert (BALLS[norm].distance(found - images) <= eps + 1e-5).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found != images).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["plain", "network", "level"])
def test_an_image_does_not_depend_on_its_batch(name, images, labels):
    model, attack = DefendedClassifier(TinyClassifier(), MODELS[name]()), Adaptive("Linf", 0.2, calls=500)
    whole = attack(model, images, labels, sample_ids=IDS)
    again = attack(model, images, labels, sample_ids=IDS)
    assert torch.equal(whole.images, again.images)
    rows = torch.tensor([4, 1])
    part = attack(model, images[rows], labels[rows], sample_ids=rows)
    torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-4)
    small = Adaptive("Linf", 0.2, calls=500, max_rows=3)(model, images, labels, sample_ids=IDS)
    torch.testing.assert_close(small.images, whole.images, rtol=0, atol=1e-4)


def test_at_equal_calls_it_leaves_no_more_than_pgd(images):
    """On a purifier with much noise and few calls; labels are what the purified images mostly are."""
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.6, 10, "ddpm"))
    images = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(24)
    labels = judge(Defence("d", model, [], 20, {}), images, ids, 3).predictions.mode(1).values
    pgd = PGD("Linf", 0.1, steps=12, eot=4)
    budget = pgd.gradients * calls(model).gradient + pgd.forwards * calls(model).forward
    left = {}
    for attack in (pgd, Adaptive("Linf", 0.1, calls=budget)):
        found = attack(model, images, labels, sample_ids=ids).images
        judged = judge(Defence("d", model, [], 60, {}), found, ids, 0).predictions
        left[attack.name] = (judged == labels[:, None]).double().mean().item()
    assert left["adaptive"] <= left["pgd-eot"] + 0.01


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_it_reaches_the_optimum_of_a_linear_model(norm, images):
    model, eps, target = Linear(), {"Linf": 0.1, "L2": 0.2}[norm], torch.ones(7, dtype=torch.long)
    attack = Adaptive(norm, eps, calls=400)
    found = attack(model, images, target)
    w = model.w.reshape(1, 4, 4)
    delta = -eps * (w.sign() if norm == "Linf" else w / w.norm())
    torch.testing.assert_close(found.loss, -2 * ((images + delta).flatten(1) @ model.w), atol=1e-3, rtol=1e-3)
    assert (found.calls <= 400).all()
    asked = []
    model.register_forward_hook(lambda m, i, o: asked.append(len(i[0]) * (3 if o.requires_grad else 1)))
    attack.run(model, images, target, IDS, 0)
    assert sum(asked) == found.calls.sum()


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


def test_it_applies_to_every_purifier_and_level_of_the_registry(images, labels):
    score_model = smooth_model()
    found = calibrate(score_model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    for name, preset in PURIFIERS.items():
        for level in ("constant", "ssni-l") if name in ("diffpure", "agdm") else ("constant",):
            rule = 0.3 if level == "constant" else LEVELS[level](0.3, found)
            options = {"auxiliary": TinyConvolutions()} if name in ("agdm", "heterogeneous") else {}
            options |= {"scale": 1.0} if name == "gdmp" else {}
            model = DefendedClassifier(TinyClassifier(), preset(score_model, rule, 3, "ddpm", **options))
            result = Adaptive("Linf", 0.1, calls=700)(model, images[:2], labels[:2])
            assert result.images.shape == images[:2].shape
            assert (result.calls > 0).all()


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


# --- parts --------------------------------------------------------------------------------------------------------


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


def test_broken_images_stop(images):
    """A label that no purified image has is broken at once; nothing more is spent on it."""
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"))
    images, ids = images[:3], IDS[:3]
    answers = judge(Defence("d", model, [], 200, {}), images, ids, 1).predictions
    never = next(k for k in range(5) if not (answers == k).any())
    attack = Adaptive("Linf", 1e-3, calls=6000)
    assert attack.stages(model)[0].race.draws >= ENOUGH
    found = attack.run(model, images, torch.full((3,), never), ids, 0)
    assert (found.calls < 0.8 * 6000).all()
    assert (found.loss > 0).all()


def test_progress_and_convergence_know_it(images, labels):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"))
    attack = Adaptive("Linf", 0.1, calls=600)
    defence = Defence("d", model, [attack], 4, {})
    assert weight(defence, attack) <= 600 + 4 * cost(defence)
    (check,) = convergence_checks(defence, Samples(images, labels, IDS), 0)
    assert "twice the network calls" in check.name
    assert attack.budget() == {"attack": "adaptive", "norm": "Linf", "eps": 0.1, "calls": 600}
    with pytest.raises(ValueError, match="network calls"):
        Adaptive("Linf", 0.1, calls=0)


@pytest.mark.parametrize("name", ["plain", "mse", "rounds"])
def test_answers_of_the_whole_process_are_counted(name, images, labels):
    """Against a hook that sees every model's answers, those of the shorter process among them."""
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    seen = torch.zeros(7, 2, dtype=torch.long)

    def see(module, args, kwargs, logits):
        if module.purifier.plan == model.purifier.plan:
            for i, answer in zip(kwargs["sample_ids"].tolist(), logits.argmax(1).tolist(), strict=True):
                seen[i] += torch.tensor([1, int(answer != labels[i])])

    model.register_forward_hook(see, with_kwargs=True)
    attack = Adaptive("Linf", 0.2, calls=2500)
    found = attack.run(model, images, labels, IDS, 3).submitted
    assert found.asked.tolist() == seen[:, 0].tolist()
    assert found.wrong.tolist() == seen[:, 1].tolist()
    assert 0 < found.asked.max() <= attack.answers(model)
