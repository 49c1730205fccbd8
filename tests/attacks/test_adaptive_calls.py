"""Network calls of the adaptive attack: those that it takes are those that it states, and no more than it was given."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from climbed import IDS, MODELS
from conftest import TinyClassifier, smooth_model
from metered import Meter

from purify import DefendedClassifier, Evaluation, diffpure
from purify.attacks import Adaptive
from purify.attacks.adaptive import State, phases
from purify.attacks.adaptive.climb import Climb
from purify.attacks.adaptive.phases import Stage
from purify.attacks.adaptive.select import ENOUGH, Race
from purify.attacks.base import keyed
from purify.attacks.losses import margin_loss
from purify.attacks.norms import BALLS
from purify.diffusion.noise import Noise, derive_seed
from purify.evaluate import Defence, Samples
from purify.evaluate.attacking import prepare
from purify.evaluate.progress import cost, weight
from purify.evaluate.runner import judge
from purify.evaluate.selfchecks import convergence_checks
from purify.purification.calls import GRADIENT, calls


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
    attack = replace(attack, calls=max(budget, attack.least(model)))
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


def test_behind_a_guide_in_l2_tries_begin_apart(images, labels, monkeypatch):
    """At random, each with its own seed; calls counted by hooks."""
    model, attack = DefendedClassifier(TinyClassifier(), MODELS["network"]()), Adaptive("L2", 0.5, calls=2500)
    monkeypatch.setattr(phases, "TRY", 2500 / calls(model).gradient / 3.5)
    begun, path = [], Climb.path

    def begin(self, target, start, *rest):
        begun.append(start.clone())
        return path(self, target, start, *rest)

    monkeypatch.setattr(Climb, "path", begin)
    meter = Meter(model, monkeypatch)
    found = attack.run(model, images, labels, IDS, 0)
    assert found.calls.sum() == meter.total
    assert (found.calls <= 2500).all()
    assert [len(start) for start in begun] == [len(images)] * 9  # none breaks; three climbs in each of three tries
    for start, seed in zip(begun[::3], (0, derive_seed(0, "try 1"), derive_seed(0, "try 2")), strict=True):
        uniform = Noise.keyed(seed, IDS).stream("attack").uniform(0, images.shape[1:], images.dtype)
        assert torch.equal(start, BALLS["L2"].start(images, 0.5, uniform))
    for one, other in combinations(begun[::3], 2):
        assert (one != other).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["network", "both"])
def test_behind_a_guide_in_l2_climbs_have_no_memory(name):
    """One draw in each step, no momentum, no warm start; in L_inf as elsewhere."""
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    for norm in ("L2", "Linf"):
        attack = Adaptive(norm, 0.5, calls=9000)
        plan = attack.plan(model)
        assert bool(plan.fallen) == (name == "both")
        climbs = [p.climb for stage in (*plan.stages, *plan.fallen) for p in stage.phases]
        assert {climb.momentum for climb in climbs} == {0.0 if norm == "L2" else 0.9}
        assert plan.probe is None or plan.probe.climb.momentum == climbs[0].momentum
        assert (max(climb.eot for climb in climbs) == 1) == (norm == "L2")
        assert attack.warm(model) == (0 if norm == "L2" else 61)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_budget_is_kept_down_to_a_step_of_every_climb_and_fewer_are_refused(norm, name, images, labels):
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    with pytest.warns(UserWarning, match=r"takes at least (\d+) network calls .* in place of 1\.") as said:
        least = Adaptive(norm, 0.1, calls=1).fitted(model).calls
    assert f" {least} " in str(said[0].message)
    for budget in range(least, 5 * least, max(1, least // 7)):
        attack = Adaptive(norm, 0.1, calls=budget)
        assert attack.fitted(model) is attack
        plan = attack.plan(model)
        for stages in filter(None, (plan.stages, plan.fallen)):
            assert attack.warm(model) + plan.probing + sum(stage.calls for stage in stages) <= budget
    attack = Adaptive(norm, 0.1, calls=least)
    assert all(phase.climb.steps == phase.climb.eot == 1 for stage in attack.stages(model) for phase in stage.phases)
    with pytest.raises(ValueError, match=f"at least {least} network calls .* got {least - 1}; give as many"):
        replace(attack, calls=least - 1)(model, images, labels)


def test_the_best_of_several_tries_is_kept_and_all_are_counted(images, labels, monkeypatch):
    """Behind a guide; on draws that all tries are judged by, and within the calls that are allowed."""
    model, attack = DefendedClassifier(TinyClassifier(), MODELS["network"]()), Adaptive("Linf", 0.1, calls=2500)
    monkeypatch.setattr(phases, "TRY", 2500 / calls(model).gradient / 3.5)
    taken, take = [], State.take
    monkeypatch.setattr(State, "take", lambda self, other, rows: [taken.append((other, rows)), take(self, other, rows)])
    meter = Meter(model, monkeypatch)
    found = attack.run(model, images, labels, IDS, 0)
    assert found.calls.sum() == meter.total
    assert (found.calls <= 2500).all()
    assert attack.tries(model) == len(taken) == 3
    gradients, forwards = attack.passes(model)
    assert gradients * calls(model).gradient + forwards * calls(model).forward == pytest.approx(
        found.calls.max().item()
    )
    scores = torch.stack([other.score for other, _ in taken]).nan_to_num(-1)
    assert len(scores.argmax(0).unique()) > 1
    for i, best in enumerate(scores.argmax(0)):
        assert torch.equal(found.images[i], taken[best][0].best[i])
        assert found.loss[i] == taken[best][0].loss[i]
    call, race = keyed(model, derive_seed(0, "select")), attack.stages(model)[-1].race
    for other, rows in taken:
        draws = [call(other.best[rows], IDS[rows], torch.full_like(rows, race.first + d)) for d in range(race.draws)]
        margins = torch.stack([margin_loss(answer, labels[rows]) for answer in draws])
        torch.testing.assert_close(margins.mean(0), other.loss[rows])


def test_tries_are_for_guides_and_for_many_calls():
    guided, plain = (DefendedClassifier(TinyClassifier(), MODELS[name]()) for name in ("network", "plain"))
    gradient = calls(guided).gradient
    assert [phases.tries(guided, int(n * phases.TRY * gradient) + 1) for n in (0.1, 1, 1.9, 2, 3.5)] == [1, 1, 1, 2, 3]
    assert phases.tries(plain, 10**9) == 1


class Counted(TinyClassifier):
    """Counts its calls, forward and backward as gradients are counted; draws noise if asked to."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise, self.total = noise, 0

    def forward(self, x):
        self.total += len(x) * (GRADIENT if x.requires_grad else 1)
        return super().forward(x + self.noise * torch.randn_like(x))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("budget", [10, 13, 30, 100])
def test_a_budget_is_kept_on_models_without_a_purifier(noise, budget, images, labels):
    model = Counted(noise).eval()
    found = Adaptive("Linf", 0.1, calls=budget).run(model, images, labels, IDS, 0)
    assert model.total == found.calls.sum() <= budget * len(images)


def test_fewer_calls_than_a_step_are_refused_on_models_without_a_purifier(images, labels):
    model, attack = Counted().eval(), Adaptive("Linf", 0.1, calls=9)
    with pytest.raises(ValueError, match="at least 10 network calls for an image of any model, got 9; give as many"):
        attack.run(model, images, labels, IDS, 0)
    with pytest.warns(UserWarning, match=r"takes at least 10 network calls .* in place of 9\."):
        assert attack.fitted(model).calls == 10


def test_several_purifications_cost_as_many(images, labels, monkeypatch):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"), purifications=3)
    meter = Meter(model, monkeypatch)
    found = Adaptive("Linf", 0.1, calls=2000).run(model, images, labels, IDS, 0)
    assert found.calls.sum() == meter.total
    assert calls(model).forward == 3 * 5


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


def test_a_run_fits_the_calls_of_every_defence(recwarn):
    asked = Evaluation(attacks="adaptive", calls=5, noise_level="constant", steps=2, n_examples=2, judge_draws=2)
    found = {d.name: [a.calls for a in d.attacks] for d in prepare(asked).defences}
    assert found == {"undefended": [10], "diffpure": [18], "adversarial training": [10]}
    said = [str(w.message) for w in recwarn]
    assert any("an image of undefended; it gets these in place of 5" in text for text in said)
