"""--dry-run: what attacks say they cost against what they ask for, and the arithmetic."""

import re

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, Purifier, diffpure
from purify.__main__ import main as purify_main
from purify.attacks import ATTACKS, PGD, AutoAttackRand, RandomNoise, Square, Transfer
from purify.cli.attack import main
from purify.evaluate import Defence, Samples, dryrun
from purify.evaluate.drawtimes import DrawCost
from purify.purification.cost import graph_bytes, held_bytes, linear
from purify.purification.gradients import Adjoint, Checkpoint, Full, Surrogate, saved_bytes

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
    """A step takes 2 ms of a forward row and 5 ms of a gradient row, the classifier 1 and 3 ms; 12 steps."""

    def measured(model, samples, rows, with_gradient=True):
        steps = model.purifier.plan.steps
        return 0.001 + 0.002 * steps, 0.003 + 0.005 * steps

    monkeypatch.setattr(dryrun, "times", measured)
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.2, 12, "ddpm"))
    defence = Defence("d", model, [PGD("Linf", 0.1, steps=3, eot=2)], 4, {})
    cost = dryrun.estimate(defence, Samples(images, torch.zeros(7).long(), torch.arange(7)), 10)
    assert cost.forward == pytest.approx(0.025)
    assert cost.gradient == pytest.approx(0.063)
    assert cost.seconds == pytest.approx(7 * (6 * 0.063 + 2 * 0.025 + 2 * 4 * 0.025))


@pytest.mark.parametrize(("steps", "rounds"), [(2, 1), (1, 1), (5, 3)])
def test_few_steps_and_several_rounds_add_up(steps, rounds, images, monkeypatch):
    def measured(model, samples, rows, with_gradient=True):
        n = len(model.purifier.rounds) * model.purifier.plan.steps
        return 0.001 + 0.002 * n, 0.003 + 0.005 * n

    monkeypatch.setattr(dryrun, "times", measured)
    purifier = Purifier(smooth_model(), 0.2, "ddpm", steps, rounds=rounds)
    samples = Samples(images, torch.zeros(7).long(), torch.arange(7))
    found = dryrun.purified_times(DefendedClassifier(TinyClassifier(), purifier), samples, 10)
    assert found == pytest.approx((0.001 + 0.002 * steps * rounds, 0.003 + 0.005 * steps * rounds))


@pytest.mark.parametrize("kept", [12, 5, 3, 2, 1, 0])
def test_steps_that_a_budget_recomputes_take_longer(kept, images, monkeypatch):
    """A forward pass of the step, 2 ms, more; also in the few steps that are timed, where not even these are kept."""

    def measured(model, samples, rows, with_gradient):
        n = model.purifier.plan.steps
        return 0.001 + 0.002 * n, 0.003 + 0.005 * n + 0.002 * max(0, n - kept)

    monkeypatch.setattr(dryrun, "times", measured)
    purifier = diffpure(smooth_model(), 0.2, 12, "ddpm")
    budget = kept * linear(lambda x: graph_bytes(purifier, x), images[:1], 10)
    model = DefendedClassifier(TinyClassifier(), purifier).with_gradient(Full(memory_budget=budget))
    samples = Samples(images, torch.zeros(7).long(), torch.arange(7))
    assert dryrun.purified_times(model, samples, 10) == pytest.approx((0.025, 0.063 + 0.002 * (12 - kept)))


def test_batches_grow_until_they_take_long(images, monkeypatch):
    sizes = []

    def measured(work, device):
        x, *_ = work.__defaults__
        sizes.append(len(x))
        return 0.2 * len(x)

    monkeypatch.setattr(dryrun, "seconds", measured)
    samples = Samples(images, torch.zeros(7).long(), torch.arange(7))
    assert dryrun.times(defended(), samples, 100) == pytest.approx((0.2, 0.2))
    assert sizes[::4] == [1, 2, 4, 8]  # 8 rows take 3.2 seconds
    sizes.clear()
    dryrun.times(defended(), samples, 3)
    assert sizes[::4] == [1, 2, 3]


@pytest.mark.parametrize(
    ("engine", "rows"),
    [(Full(), 6), (Checkpoint(), 1), (Checkpoint(memory_budget=1), 1), (Full(memory_budget=10**9), 6)],
)
def test_memory_is_that_of_the_graphs_held(engine, rows, images):
    """Six steps; measured on the whole chain under `full`."""
    purifier = Purifier(smooth_model(), 0.2, "ddpm", 6, gradient="full", clip=False)
    t = torch.full((7,), 0.2, dtype=torch.float64)
    noise = purifier.noise(7, t.device, range(7), 0, 0)
    u = (2 * images - 1).requires_grad_()
    whole = saved_bytes(lambda v: purifier.engine(lambda n: purifier.process(t, noise, n), v), u)[1]
    one = graph_bytes(purifier, images)
    assert engine.held(one, 6) == pytest.approx(rows * one, abs=1)
    assert whole == pytest.approx(6 * one, rel=0.1)


@pytest.mark.parametrize(("budget", "steps"), [(10**9, 6), (1, 1), (None, 1)])
def test_memory_of_a_surrogate_is_that_of_its_rounds_and_steps(budget, steps, images):
    """Two of three rounds, of 2 and 4 steps; measured on that process under `full`."""
    engine = Surrogate((2, 4), rounds=(0, 2), memory_budget=budget)
    purifier = Purifier(smooth_model(), 0.2, "ddpm", 9, gradient=engine, rounds=3, clip=False)
    t = torch.full((7,), 0.2, dtype=torch.float64)
    noise = purifier.noise(7, t.device, range(7), 0, 0)
    short = purifier.process(t, noise, engine.shorter(3))
    u = (2 * images - 1).requires_grad_()
    whole = saved_bytes(lambda v: Full()(lambda _: short, v), u)[1]
    states = 0 if steps == 6 else 6 * images.nbytes  # before the steps that are recomputed
    assert held_bytes(purifier, images[:1], 7) == pytest.approx(steps / 6 * whole + states, rel=0.1)


def test_memory_is_that_of_the_attack_that_takes_most(images):
    samples, score = Samples(images, torch.zeros(7).long(), torch.arange(7)), smooth_model()
    model = DefendedClassifier(TinyClassifier(), diffpure(score, 0.2, 9, "ddpm", Adjoint()), purifications=3)
    step = graph_bytes(model.purifier, images[:1])

    def memory(*attacks):
        return dryrun.estimate(Defence("d", model, attacks, 1, {}), samples, 4).memory

    own, surrogate = PGD("Linf", 0.1), ATTACKS["surrogate-eot"]("Linf", 0.1, surrogate_steps=5)
    assert memory() == memory(own, Transfer("Linf", 0.1)) == 4 * 3 * step
    behind = saved_bytes(model.classifier, images[:1].clone().requires_grad_())[1]  # beside the steps that are kept
    assert memory(own, surrogate) == 4 * 3 * (5 * step + behind)
    assert held_bytes(diffpure(score, 0.2, 9, gradient="bpda"), images[:1], 4) == 0


def test_rows_and_memory_of_the_adaptive_attack_are_those_of_its_climbs(images, monkeypatch):
    """As its gradients meet the purifiers: fewer draws go through the whole process than through the shorter one."""
    samples = Samples(images, torch.zeros(7).long(), torch.arange(7))
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 8, "ddpm", "full"))
    attack = ATTACKS["adaptive"]("Linf", 0.1, calls=20_000)
    seen, details = {}, DefendedClassifier.details

    def noted(defended, x, **keys):
        if torch.is_grad_enabled() and x.requires_grad:
            held = held_bytes(defended.purifier, images[:1], len(x), model.classifier)
            seen[len(x)] = max(held, seen.get(len(x), 0))
        return details(defended, x, **keys)

    monkeypatch.setattr(DefendedClassifier, "details", noted)
    attack(model, images, samples.labels, sample_ids=samples.ids)
    defence = Defence("d", model, [attack], 1, {})
    rows = dryrun.rows_at_once(defence, 7, 64, 2048)
    assert rows == max(seen) > 7
    assert dryrun.estimate(defence, samples, rows, 7).memory == max(seen.values())
    assert dryrun.rows_at_once(defence, 7, 64, 20) == 20


def test_memory_is_that_of_a_classifier_that_takes_more_than_a_step(images):
    class Wide(TinyClassifier):
        def forward(self, x):
            return super().forward(x * torch.sin(x.repeat(1, 40, 1, 1) * 100).mean(1, keepdim=True))

    wide = Wide()
    behind = saved_bytes(wide, images[:1].clone().requires_grad_())[1]
    purifier = diffpure(smooth_model(), 0.2, 9, "ddpm", "checkpoint")
    step = graph_bytes(purifier, images[:1])
    assert behind > 2 * step
    assert held_bytes(purifier, images[:1], 4, wide) == 4 * (behind + 9 * images[:1].nbytes)
    half = purifier.with_gradient(Full(memory_budget=4 * 5 * step))
    assert held_bytes(half, images[:1], 4, wide) == 4 * (behind + 5 * step + 4 * images[:1].nbytes)


def test_a_surrogate_attack_keeps_to_the_memory_budget_of_the_run():
    for engine, budget in ((Checkpoint(), None), (Full(memory_budget=7), 7), (Adjoint(), 2**30)):
        model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.2, 3, gradient=engine))
        attacked = ATTACKS["surrogate-eot"]("Linf", 0.1).attacked(model)
        assert attacked.purifier.engine == Surrogate(5, memory_budget=budget)


def test_a_batch_that_does_not_fit_is_one_sentence(images, monkeypatch):
    samples = Samples(images, torch.zeros(7).long(), torch.arange(7))
    defence = Defence("d", defended(), [], 1, {})
    monkeypatch.setattr(dryrun, "free_bytes", lambda x: 1000)
    with pytest.raises(ValueError, match=r"d needs about .* the graphs of 10 rows, .* lower --max-rows, to 1 say"):
        dryrun.estimate(defence, samples, 10)

    def full(work, x):
        raise torch.OutOfMemoryError("no memory left\nand more")

    monkeypatch.setattr(dryrun, "seconds", full)
    with pytest.raises(ValueError, match=r"cannot take a gradient \(no memory left\); lower --max-rows"):
        dryrun.estimate(defence, samples, 10)


def test_the_command_stops_before_any_attack(tmp_path, capsys):
    assert main(["--n-examples", "4", "--steps", "2", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "files, models and shapes are in order" in out
    assert "diffpure ssni-l" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["attack", "attack --eps 0.1,0.2"])
def test_a_check_asks_neither_for_memory_nor_for_time(command, tmp_path, capsys, monkeypatch):
    """As on the login node of a cluster, which may have a small part of what the nodes have."""

    def refuse(*given):
        raise AssertionError("measured")

    monkeypatch.setattr(dryrun, "free_bytes", lambda device: 0)
    monkeypatch.setattr(dryrun, "seconds", refuse)
    words = f"{command} --n-examples 4 --shard 1/2 --out {tmp_path / 'run'}".split()
    assert purify_main([*words, "--check"]) == 0
    assert capsys.readouterr().out == "digits, 4 samples; files, models and shapes are in order.\n"
    assert not (tmp_path / "run").exists()
    assert purify_main([*words, "--check", "--seed", "-1"]) == 2


def test_a_check_looks_at_the_folder(tmp_path, capsys):
    words = "attack --n-examples 1 --steps 1 --judge-draws 2 --attacks random-noise --noise-level constant"
    words = f"{words} --out {tmp_path / 'run'}"
    assert purify_main(words.split()) == 0
    assert purify_main(f"{words} --check".split()) == 0
    assert purify_main(f"{words} --check --seed 1".split()) == 2
    assert "seed" in capsys.readouterr().err


@pytest.fixture
def in_seconds(monkeypatch):
    """Durations in full."""
    for module in ("attack", "certify", "distortion", "shell"):
        monkeypatch.setattr(f"purify.cli.{module}.duration", repr)


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("attack --attacks random-noise", 1),
        ("attack --attacks random-noise --eps 0.1,0.2", 2),
        ("attack --attacks random-noise --noise-level constant --protocol deterministic", 1),
        ("distortion", 1),
    ],
)
def test_a_shard_takes_what_its_samples_take(command, runs, tmp_path, capsys, in_seconds):
    """Whole batches, 4 + 4 + 1 of 9 samples; protocols wait until all are merged."""
    words = f"{command} --n-examples 9 --batch-size 4 --steps 1 --shard 3/3 --dry-run --out {tmp_path / 'run'}"
    assert purify_main(words.split()) == 0
    out = capsys.readouterr().out
    whole = float(re.search("bout ([0-9.e+-]+) in one process", out)[1])
    own, samples, part = re.search(r"Shard 3/3 has (\d+) of (\d+) samples: about ([0-9.e+-]+)\.\n", out).groups()
    assert (own, samples) == ("1", "9")
    assert float(part) == pytest.approx(runs * whole / 9)


@pytest.mark.parametrize(("shard", "own", "seconds"), [("1/3", 4, 240.0), ("2/3", 4, 40.0), ("3/3", 1, 10.0)])
def test_a_shard_attacks_only_what_is_attacked(shard, own, seconds, monkeypatch, tmp_path, capsys, in_seconds):
    """The first two samples, at 100 s each beside 10 s for the certificate of each of 9."""
    monkeypatch.setattr("purify.evaluate.systems.estimate", lambda *given: DrawCost(100, 0.1, 10.0, 100.0, 290.0))
    words = f"certify --method cohen --sigma 0.25 --n-examples 9 --batch-size 4 --attack-examples 2 --shard {shard}"
    assert purify_main([*words.split(), "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert f"Shard {shard} has {own} of 9 samples: about {seconds}." in capsys.readouterr().out


def test_a_dry_run_warns_of_shards_without_samples(tmp_path, capsys):
    words = f"attack --n-examples 4 --batch-size 4 --steps 1 --shard 2/2 --dry-run --out {tmp_path / 'run'}"
    with pytest.warns(UserWarning, match="1 of 2 processes have nothing to do"):
        assert purify_main(words.split()) == 0
    assert "Shard 2/2 has 0 of 4 samples: about 0.0 s." in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(7200.0, "2.0 h"), (300.0, "5.0 min"), (1.26, "1.3 s")])
def test_durations(value, text):
    assert dryrun.duration(value) == text
