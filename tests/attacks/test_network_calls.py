"""Network calls that attacks state, against passes counted by hooks while every step is recomputed."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
from climbed import IDS, MODELS
from conftest import TinyClassifier
from metered import Meter, Passes
from torch import nn

from purify import DefendedClassifier
from purify.attacks import ATTACKS, PGD
from purify.attacks.protocols import IN_STEP, PURIFIER
from purify.evaluate import Defence
from purify.evaluate.progress import Progress, cost, weight
from purify.purification.calls import GRADIENT, Calls, calls
from purify.purification.gradients import Checkpoint

SMALL = {"steps": 3, "eot": 2, "surrogate_steps": 2}


class Free(TinyClassifier):
    """Whose calls do not count: what is left are those of the score network."""

    network_calls = 0


def small(kind):
    return kind("Linf", 0.1, **{f.name: SMALL[f.name] for f in fields(kind) if f.name in SMALL})


def climbing():
    """Attacks that climb the purified classifier, whatever purifies."""
    kinds = {name: kind for name, kind in ATTACKS.items() if issubclass(kind, PGD) and "Linf" in kind.threats}
    return [name for name, kind in kinds.items() if kind.needs in (None, PURIFIER, IN_STEP)]


def counted(attack, model, images, labels):
    model = model.with_gradient(Checkpoint(memory_budget=None))
    passes = Passes(model.purifier.score_model.network)
    attack.run(model, images[:2], labels[:2], IDS[:2], 0)
    return passes.total / 2, attack.network_calls(model)


@pytest.mark.parametrize("name", climbing())
@pytest.mark.parametrize("purifier", ["plain", "rounds"])
def test_every_attack_states_its_calls_of_the_score_network(purifier, name, images, labels):
    model, attack = DefendedClassifier(Free(), MODELS[purifier]()), small(ATTACKS[name])
    found, stated = counted(attack, model, images, labels)
    assert found == stated > 0


@pytest.mark.parametrize("name", ["pgd-eot", "pgd-eot-targeted", "pgd-eot-steps", "bpda-eot", "low-frequency-eot"])
def test_the_statistic_behind_t_star_counts_as_the_steps_do(name, images, labels):
    found, stated = counted(small(ATTACKS[name]), DefendedClassifier(Free(), MODELS["level"]()), images, labels)
    assert found == stated


@pytest.mark.parametrize("name", ["pgd-eot-norm", "pgd-eot-low-level"])
def test_a_statistic_that_is_lowered_counts_once_more_for_its_own_way_back(name, images, labels):
    """Its graph is counted as kept for that; here it is recomputed."""
    model, attack = DefendedClassifier(Free(), MODELS["level"]()), small(ATTACKS[name])
    found, stated = counted(attack, model, images, labels)
    assert found == stated + attack.gradients * model.purifier.level.calls


@pytest.mark.parametrize("name", ["pgd-eot", "pgd-eot-first-order", "pgd-eot-guide", "guide-transfer", "transfer"])
@pytest.mark.parametrize("goal", ["any", "top-2"])
def test_calls_of_guides_and_classifiers_are_stated_too(name, goal, images, labels, monkeypatch):
    model = DefendedClassifier(TinyClassifier(), MODELS["network"]())
    attack = replace(small(ATTACKS[name]), goal=goal)
    meter = Meter(model, monkeypatch)
    attack.run(model, images[:2], labels[:2], IDS[:2], 0)
    assert meter.total / 2 == attack.network_calls(model)


class Foreign(nn.Module):
    """Somebody else's defence, which calls something of its own a purifier."""

    def __init__(self):
        super().__init__()
        self.purifier, self.classifier = nn.Identity(), TinyClassifier()
        self.eval()

    def forward(self, x):
        return self.classifier(self.purifier(x))


@pytest.mark.parametrize("name", ["pgd-eot", "adaptive", "transfer"])
def test_a_model_may_call_a_part_of_its_own_a_purifier(name, images, labels):
    model, attack = Foreign(), small(ATTACKS[name])
    assert calls(model) == Calls(1, GRADIENT, 1)
    passes = Passes(model.classifier)
    attack(model, images, labels)
    assert passes.total > 0
    assert weight(defence := Defence("own", model, [attack], 4, {}), attack) > 4 * cost(defence) == 4


def test_passes_are_the_calls_in_gradients_and_answers():
    """What a dry run times."""
    for name, kind in ATTACKS.items():
        for model in (DefendedClassifier(TinyClassifier(), MODELS[m]()) for m in ("plain", "both")):
            attack = small(kind) if "Linf" in kind.threats else None
            if attack is None or not attack.applies_to(model):
                continue
            (gradients, forwards), own = attack.passes(model), calls(model)
            assert gradients * own.gradient + forwards * own.forward == pytest.approx(attack.network_calls(model)), name


class Halved(nn.Module):
    """Somebody else's wrapper around the whole."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x, **keys):
        return self.model(x, **keys) / 2


@dataclass(frozen=True)
class HalvedPGD(PGD):
    name: ClassVar[str] = "pgd-eot-halved"

    def attacked(self, model):
        return Halved(model)


def test_a_wrapper_around_the_model_costs_what_it_wraps():
    model = DefendedClassifier(TinyClassifier(), MODELS["plain"]())
    attack = small(HalvedPGD)
    assert attack.network_calls(model) == small(PGD).network_calls(model)
    assert attack.passes(model) == small(PGD).passes(model)


@pytest.mark.parametrize("name", ["pgd-eot", "bpda-eot", "surrogate-eot", "pgd-eot-steps", "pgd-eot-guide"])
@pytest.mark.parametrize("rows", [4, 2048])
def test_the_bar_has_told_all_calls_when_the_attack_ends(name, rows, images, labels, monkeypatch):
    """Whatever its hooks see: twins of the model at another price, or nothing."""
    model = DefendedClassifier(TinyClassifier(), MODELS["network"]())
    attack = replace(small(ATTACKS[name]), max_rows=rows)
    one, seen = Defence("d", model, [attack], 2, {}), []
    monkeypatch.setattr(
        "purify.evaluate.progress.tqdm.update", lambda bar, n: setattr(bar, "n", seen.append(n) or bar.n + n)
    )
    amount = len(images) * weight(one, attack)
    with Progress(amount, shown=True).work(one, amount):
        attack(model, images, labels)
    taken = len(images) * attack.network_calls(model)
    told = sum(seen[:-1])  # the last is what the judges would take
    assert 0.9 * taken <= told <= taken + cost(one)  # one image is asked for the number of classes
