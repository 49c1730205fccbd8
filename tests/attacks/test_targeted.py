"""Attacks at classes: optima of linear models, wrong classes ranked by brute force, counts, names and sentences."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn

from purify import AdversarialGuidance, DefendedClassifier, Purifier, SSNISigmoid, calibrate, diffpure
from purify.attacks import APGD, ATTACKS, PGD, MostLikely, OneClass, TargetedAPGD, TargetedPGD, kind_of
from purify.attacks.counting import heard
from purify.attacks.goals import find_goal, rank_seed
from purify.attacks.losses import PAIR_LOSSES
from purify.cli.attack import main
from purify.evaluate.metrics import aimed_success
from purify.leaderboard import read_run

IDS = torch.arange(7)


class Linear(nn.Module):
    """Five logits that are linear in 16 pixels."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), requires_grad=False)
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.w.T


class Ridge(nn.Module):
    """Of the first pixel: class 1 comes near class 0 and turns back, class 2 overtakes it only far away."""

    def forward(self, x):
        v = x[:, 0, 0, 0]
        return torch.stack([torch.ones_like(v), 0.9 - 20 * (v - 0.5) ** 2, -4 + 12 * (0.5 - v)], 1)


def defended(classifier=None, **options):
    return DefendedClassifier(classifier or TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"), **options)


def guided():
    """A purifier where every attack applies."""
    score = smooth_model()
    level = SSNISigmoid(0.4, calibrate(score, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))))
    guidance = AdversarialGuidance(20.0, auxiliary=TinyClassifier(), layer="layers.2")
    return DefendedClassifier(TinyClassifier(), Purifier(score, level, "ddpm", 4, guidance=guidance))


@pytest.mark.parametrize("kind", [PGD, APGD])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.3), ("L1", 0.15)])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_likeliest_in_turn_find_the_best_of_their_optima(kind, norm, eps, count, images, labels):
    """From y to t a linear model gains eps times the dual norm of w_t - w_y; the best t of the first ones wins."""
    model = Linear()
    steps = 200 if norm == "L1" else 40  # few pixels move at once in L1: after 40 steps rounding decides how far it is
    found = kind(norm, eps, steps=steps, eot=1, goal=MostLikely(count), sparsity=None)(model, images, labels)
    logits = model(images)
    order = logits.scatter(1, labels[:, None], -math.inf).argsort(1, descending=True)[:, :count]
    apart = model.w[order] - model.w[labels][:, None]
    dual = {"Linf": apart.abs().sum(2), "L2": apart.norm(dim=2), "L1": apart.abs().amax(2)}[norm]
    best = (logits.gather(1, order) - logits.gather(1, labels[:, None]) + eps * dual).amax(1)
    torch.testing.assert_close(found.loss, best, atol=0.03, rtol=0.01)
    assert (found.loss <= best + 1e-4).all()


def test_one_class_is_reached_where_it_can_be_and_its_own_images_are_left_alone(images, labels):
    model = Linear()
    for wanted in range(5):
        found = PGD("L2", 2.0, steps=60, eot=1, goal=wanted)(model, images, labels)
        own = labels == wanted
        assert torch.equal(found.images[own], images[own])
        assert torch.equal(found.loss.isnan(), own)
        answers = model(found.images).argmax(1)
        assert torch.equal(answers[~own] == wanted, found.loss[~own] > 0)
        assert (answers[~own] == wanted).any()
    alone = PGD("L2", 2.0, steps=1, eot=1, goal=2)(model, images[:2], torch.tensor([2, 2]))
    assert torch.equal(alone.images, images[:2])


def test_the_second_class_is_found_behind_the_ridge_of_the_first():
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    attacks = {goal: PGD("Linf", 0.5, steps=40, eot=1, step_size=0.05, goal=goal) for goal in ("any", "top-1", "top-2")}
    start = {"random_start": False}
    loss = {goal: replace(attack, **start)(Ridge().eval(), x, y).loss for goal, attack in attacks.items()}
    assert (loss["any"] < 0).all()
    assert (loss["top-1"] < 0).all()
    assert (loss["top-2"] > 0).all()


def test_classes_are_ranked_by_mean_logits_on_draws_of_their_own(images, labels):
    model = defended()
    attack = PGD("Linf", 0.1, steps=1, eot=6, goal="top-4", max_rows=5)
    asked = attack._asked(model, images, IDS, 3)
    alone = [model(images, sample_ids=IDS, draw=d, seed=rank_seed(3)) for d in range(6)]
    torch.testing.assert_close(asked, torch.stack(alone).mean(0))
    pairs = list(attack.aim.aims(labels, lambda: asked))
    assert len(pairs) == 4
    for i, y in enumerate(labels.tolist()):
        wrong = sorted((c for c in range(5) if c != y), key=lambda c: -asked[i, c])
        assert [pair[i].tolist() for pair in pairs] == [[y, c] for c in wrong]


def test_few_classes_are_all_aimed_at(images, labels):
    """top-40 of five classes is top-4, bit for bit."""
    few, many = (PGD("Linf", 0.1, steps=2, eot=2, goal=g)(defended(), images, labels) for g in ("top-4", "top-40"))
    assert torch.equal(few.images, many.images)


@pytest.mark.parametrize("goal", ["top-2", "3"])
def test_results_do_not_depend_on_the_batch(goal, images, labels):
    attack = APGD("Linf", 0.2, steps=3, eot=2, goal=goal)
    whole = attack(defended(), images, labels, sample_ids=IDS).images
    rows = torch.tensor([4, 1, 3])
    part = attack(defended(), images[rows], labels[rows], sample_ids=rows).images
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-4)


def test_gradients_and_forward_passes_are_counted(images, labels):
    """As planned, against what hooks see; one class is no more than the attack itself."""
    model, calls, rows = defended(), [], []
    model.register_forward_hook(lambda m, inputs, output: calls.append((len(inputs[0]), output.requires_grad)))
    for goal, factor in (("top-3", 3), (4, 1), ("any", 1)):
        attack = PGD("Linf", 0.2, steps=4, eot=2, restarts=2, goal=goal)
        calls.clear(), rows.clear()
        with heard(lambda n, each: rows.append(n)):
            found = attack.run(model, images[:4], labels[:4], IDS[:4], 0)
        assert attack.gradients == factor * 2 * 4 * 2
        assert sum(n for n, grad in calls if grad) == sum(rows) == 4 * attack.gradients
        assert sum(n for n, grad in calls if not grad) == 4 * attack.forwards
        assert (found.submitted is None) == (goal != "any")  # its losses do not say which answers were wrong


@pytest.mark.parametrize("name", [name for name, kind in ATTACKS.items() if issubclass(kind, PGD)])
@pytest.mark.parametrize("goal", ["top-2", 1])
def test_every_pgd_attack_takes_a_goal(name, goal, images, labels):
    kind = ATTACKS[name]
    attack = kind(kind.threats[0], 0.3, steps=2, eot=1, goal=goal)
    assert attack.label.endswith(f"@{goal}") or "(" in attack.label
    assert kind_of(attack.label) is type(attack)
    assert attack.budget()["goal"] == str(goal)
    model = guided()
    found = attack(model, images, labels, sample_ids=IDS)
    if attack.norm == "Linf":
        assert (found.images - images).abs().max() <= 0.3 + 1e-6
    rows = labels != goal
    assert found.loss[rows].isfinite().all()
    assert not torch.equal(found.images[rows], images[rows])


def test_names_and_budgets_of_untargeted_attacks_are_as_ever():
    assert PGD("Linf", 0.1).label == "pgd-eot"
    assert "goal" not in PGD("Linf", 0.1).budget()
    assert TargetedPGD("Linf", 0.1).label == "pgd-eot-targeted"
    assert TargetedPGD("Linf", 0.1).budget()["goal"] == "top-3"
    assert TargetedAPGD("Linf", 0.1, goal=MostLikely(9)).label == "apgd-targeted@top-9"
    assert ATTACKS["pgd-eot-norm"]("Linf", 0.1, goal="7").label == "pgd-eot-norm@7(0.3)"
    assert find_goal("any").turns == 1
    assert find_goal(7) == find_goal("7") == OneClass(7)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pairs_by_hand(loss):
    logits = torch.tensor([[1.0, 3.0, -2.0, 0.5]])
    pair = torch.tensor([[1, 0]])
    by_hand = {"margin": -2.0, "ce": logits.log_softmax(1)[0, 0].item(), "dlr": -2.0 / (3.0 - (0.5 - 2.0) / 2)}
    assert PAIR_LOSSES[loss](logits, pair).item() == pytest.approx(by_hand[loss])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD("Linf", 0.1, goal="top-0"), "classes to aim at must be"),
        (lambda: PGD("Linf", 0.1, goal="the next"), "a goal is any, a class"),
        (lambda: PGD("Linf", 0.1, goal=-1), "Unknown goal -1"),
        (lambda: PGD("Linf", 0.1, goal=True), "Unknown goal True"),
        (lambda: PGD("Linf", 0.1, goal=5)(TinyClassifier(), torch.rand(1, 1, 4, 4), torch.tensor([0])), "no class 5"),
        (
            lambda: PGD("Linf", 0.1, goal="top-1", loss="dlr", eot=1)(Ridge().eval(), torch.rand(1, 1, 2, 2),
                                                                      torch.tensor([0])),
            "needs at least four classes",
        ),
    ],
)  # fmt: skip
def test_bad_goals_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- on the command line ------------------------------------------------------------------------------------------

RUN = [
    *("--n-examples", "8", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2", "--threads", "1"),
    *("--noise-level", "constant", "--attacks", "pgd-eot-targeted,apgd-targeted@top-2,bpda-eot@3"),
]


def test_the_command_line_reports_how_often_the_class_was_reached(tmp_path, capsys):
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert "diffpure, bpda-eot@3: " in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    own = [r for r in records if r["attack"] == "bpda-eot@3" and r["defence"] == "diffpure" and r["label"] != 3]
    share = sum(p == 3 for r in own for p in r["predictions"]) / (2 * len(own))
    assert result["results"]["diffpure"]["bpda-eot@3"]["targeted"]["value"] == pytest.approx(share)
    assert "targeted" not in result["results"]["diffpure"]["pgd-eot-targeted"]
    assert result["budgets"]["diffpure"]["apgd-targeted@top-2"]["goal"] == "top-2"
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[: len(lines) // 2]))  # as a kill leaves it
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    again = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in records]
    assert {row.name for row in read_run(tmp_path)} >= {"diffpure", "undefended"}


def test_success_leaves_images_of_the_class_out():
    import numpy as np

    predictions, labels = np.array([[3, 3], [3, 1], [0, 0]]), np.array([3, 1, 0])
    assert aimed_success(predictions, labels, 3).value == pytest.approx(0.25)
    assert aimed_success(predictions[:1], labels[:1], 3) is None
