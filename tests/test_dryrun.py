"""--dry-run: what attacks say they cost against what they ask for, and the arithmetic."""

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, diffpure
from purify.attacks import ATTACKS, PGD, AutoAttackRand, RandomNoise, Square, Transfer
from purify.evaluate import Defence, Samples, dryrun
from purify.evaluate.command import main

PLAIN = {
    "pgd-eot": lambda: PGD("Linf", 0.1, steps=3, eot=2, restarts=2),
    "apgd": lambda: ATTACKS["apgd-margin-eot"]("Linf", 0.1, steps=3, eot=2),
    "steps": lambda: ATTACKS["pgd-eot-steps"]("Linf", 0.1, steps=3, eot=2),
    "transfer": lambda: Transfer("Linf", 0.1, steps=3),
    "random-noise": lambda: RandomNoise("Linf", 0.1),
}


def defended():
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.2, 3, "ddpm"))


def asked(attack, images):
    """Rows that reach the purifier's score network, per step, with and without a gradient."""
    model, rows = defended(), {True: 0, False: 0}

    def count(module, arguments):
        rows[torch.is_grad_enabled()] += len(arguments[0])

    labels = model.classifier(images).argmax(1)
    model.purifier.score_model.network.register_forward_pre_hook(count)
    attack(model.with_gradient("full"), images, labels)
    rows[False] -= 3  # the question how many classes there are, on one image
    return rows[True] / 3, rows[False] / 3


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_attacks_ask_for_as_many_rows_as_they_say(make, images):
    attack = make()
    assert asked(attack, images) == (attack.gradients * 7, attack.forwards * 7)


def test_library_attacks_ask_for_at_most_what_they_say(images):
    attack = AutoAttackRand("Linf", 0.01, steps=5, eot=2)
    gradients, _ = asked(attack, images)
    assert 0.5 * attack.gradients * 7 <= gradients <= attack.gradients * 7
    attack = Square("Linf", 0.001, queries=20)
    gradients, forwards = asked(attack, images)
    assert gradients <= 7  # its first look at the images
    assert 0.3 * attack.forwards * 7 <= forwards <= attack.forwards * 7 + 3 * 7


def test_the_estimate_adds_up(images, monkeypatch):
    """2 ms a forward row and 5 ms a gradient row: 3 steps x 2 draws, then 2 draws; 2 stages judged by 4 draws."""
    times = iter([0.02, 0.05])
    monkeypatch.setattr(dryrun, "seconds", lambda work, x: next(times))
    defence = Defence("d", defended(), [PGD("Linf", 0.1, steps=3, eot=2)], 4, {})
    cost = dryrun.estimate(defence, Samples(images, torch.zeros(7).long(), torch.arange(7)), 10)
    assert (cost.forward, cost.gradient) == (0.002, 0.005)
    assert cost.seconds == pytest.approx(7 * (6 * 0.005 + 2 * 0.002 + 2 * 4 * 0.002))
    assert cost.peak > 10**7


def test_a_batch_that_does_not_fit_is_one_sentence(images, monkeypatch):
    def full(work, x):
        raise torch.OutOfMemoryError("no memory left\nand more")

    monkeypatch.setattr(dryrun, "seconds", full)
    defence = Defence("d", defended(), [], 1, {})
    with pytest.raises(ValueError, match=r"gradient of 10 rows \(no memory left\); lower --max-rows"):
        dryrun.estimate(defence, Samples(images, torch.zeros(7).long(), torch.arange(7)), 10)


def test_the_command_stops_before_any_attack(tmp_path, capsys):
    assert main(["--n-examples", "4", "--steps", "2", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "files, models and shapes are in order" in out
    assert "diffpure ssni-l" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "text"), [(7200.0, "2.0 h"), (300.0, "5.0 min"), (1.26, "1.3 s")])
def test_durations(value, text):
    assert dryrun.duration(value) == text
