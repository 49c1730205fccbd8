"""Purifier and DefendedClassifier: keyed results, configs, votes, and clear errors before any network call."""

import json

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from torch import nn
from torch.nn.functional import one_hot

from purify import ContinuousVP, DefendedClassifier, FixedDt, Purifier, ScoreModel, diffpure
from purify.diffusion.reverse import DDIM
from purify.purification.cost import most_steps
from purify.purification.gradients import BPDA
from purify.purification.levels import Constant

IDS = torch.arange(64)


@pytest.fixture
def many():
    return torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reverse", ["sde", "ddpm", "ddim", "ode"])
def test_results_do_not_depend_on_the_batch(many, reverse):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 5, reverse))
    whole = model.purifier(many, sample_ids=IDS, draw=3, seed=9)
    logits = model(many, sample_ids=IDS, draw=3, seed=9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    for size in (1, 7, 64):
        parts = [model.purifier(many[i], sample_ids=i, draw=3, seed=9) for i in order.split(size)]
        torch.testing.assert_close(torch.cat(parts), whole[order], rtol=0, atol=1e-5)
        answers = torch.cat([model(many[i], sample_ids=i, draw=3, seed=9).argmax(1) for i in order.split(size)])
        assert torch.equal(answers, logits.argmax(1)[order])


def test_draws_and_seeds_differ_and_can_be_mixed_in_a_batch(many):
    purifier = diffpure(smooth_model(), 0.3, 5)
    x = many[:2].repeat_interleave(2, 0)
    mixed = purifier(x, sample_ids=[0, 0, 1, 1], draw=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(mixed[::2], purifier(many[:2], sample_ids=[0, 1], draw=0))
    assert torch.equal(mixed[1::2], purifier(many[:2], sample_ids=[0, 1], draw=1))
    assert not torch.allclose(mixed[0], mixed[1])
    assert not torch.allclose(purifier(many[:2], sample_ids=[0, 1], seed=1), mixed[::2])


def test_fresh_noise_differs_at_each_call_and_follows_the_global_seed(many):
    purifier = diffpure(smooth_model(), 0.3, 5)
    torch.manual_seed(0)
    first, second = purifier(many), purifier(many)
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(purifier(many), first)


def test_output_is_clamped_only_if_asked(many):
    loose = Purifier(smooth_model(), 0.5, "sde", 5, clip=False)(many, sample_ids=IDS)
    tight = Purifier(smooth_model(), 0.5, "sde", 5)(many, sample_ids=IDS)
    assert loose.min() < 0
    assert torch.equal(loose.clamp(0, 1), tight)


@pytest.mark.parametrize(
    "purifier",
    [
        diffpure(smooth_model(), 0.1, 10),
        diffpure(smooth_model(), 0.1, 100, variant="published"),
        Purifier(smooth_model(), Constant(0.2), DDIM(0.3), 7, t_end=0.01, gradient=BPDA(), clip=False),
        Purifier(smooth_model(), 0.2, {"kind": "ode", "solver": "rk4"}, 3),
    ],
)
def test_config_round_trip(purifier, many):
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model())
    assert again.config() == purifier.config()
    assert torch.equal(again(many, sample_ids=IDS), purifier(many, sample_ids=IDS))


def test_network_calls_are_as_announced(many):
    for reverse, steps in (("sde", 6), ({"kind": "ode", "solver": "rk4"}, 3), ("one-shot", 1)):
        purifier = diffpure(smooth_model(), 0.2, steps, reverse)
        calls = []
        purifier.score_model.network.register_forward_pre_hook(lambda m, a, calls=calls: calls.append(len(a[0])))
        announced = purifier.purify(many, sample_ids=IDS).network_calls
        assert sum(calls) == announced.sum() == 64 * announced[0]
    adaptive = diffpure(smooth_model(), 0.2, 1, {"kind": "ode", "solver": "dopri5"})
    assert adaptive.purify(many).network_calls is None


def draws_by_hand(model, x, m, draw):
    """Logits (N, m, K) of the purifications that a draw of a DefendedClassifier stands for."""
    logits = [model.classifier(model.purifier(x, sample_ids=IDS, draw=draw * m + k)) for k in range(m)]
    return torch.stack(logits, 1)


def test_aggregates_against_a_loop(many):
    purifier = diffpure(smooth_model(), 0.4, 4)
    for aggregate in ("logits", "softmax", "votes"):
        model = DefendedClassifier(TinyClassifier(), purifier).with_purifications(5, aggregate)
        logits = draws_by_hand(model, many, 5, draw=2)
        expected = logits.softmax(-1).mean(1).log() if aggregate == "softmax" else logits.mean(1)
        assert (model.purifications, model.config()["aggregate"]) == (5, aggregate)
        if aggregate == "votes":
            expected = one_hot(logits.argmax(-1), 5).float().mean(1)
            assert ((expected > 0) & (expected < 1)).any()  # purifications disagree somewhere
        torch.testing.assert_close(model(many, sample_ids=IDS, draw=2), expected, rtol=1e-5, atol=1e-5)


def test_votes_have_the_gradient_of_the_mean_softmax(many):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.4, 4), 3, "votes")
    x = many.clone().requires_grad_()
    weight = torch.randn(64, 5)
    (g,) = torch.autograd.grad((model(x, sample_ids=IDS) * weight).sum(), x)
    y = many.clone().requires_grad_()
    soft = draws_by_hand(model, y, 3, 0).softmax(-1).mean(1)
    torch.testing.assert_close(g, torch.autograd.grad((soft * weight).sum(), y)[0], rtol=1e-4, atol=1e-6)


def test_weights_are_frozen_and_shared_between_engines(many):
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.4, 4))
    assert not any(p.requires_grad for p in model.parameters())
    twin = model.with_gradient("bpda")
    assert twin.purifier.engine == BPDA()
    assert model.purifier.engine != BPDA()
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert torch.equal(twin(many, sample_ids=IDS), model(many, sample_ids=IDS))


class Untouchable(SmoothNet):
    def forward(self, u, labels):
        raise AssertionError("the network ran before the input was checked")


GOOD = torch.rand(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD * 3, r"lie in \[0, 1\]"),
        (GOOD - 0.5, r"lie in \[0, 1\]"),
        ((GOOD * 255).to(torch.uint8), "floating point"),
        (GOOD.clone().fill_(float("nan")), "NaN"),
        (GOOD.repeat(1, 3, 1, 1), r"shape \(1, 4, 4\)"),
        (torch.rand(2, 1, 8, 8), r"shape \(1, 4, 4\)"),
        (GOOD.double(), "torch.float64 but the score network is torch.float32"),
        (GOOD[0], r"\(N, C, H, W\)"),
        (GOOD.numpy(), "torch tensor"),
    ],
)
@pytest.mark.parametrize("purifications", [1, 2])
def test_bad_images(x, message, purifications):
    score = ScoreModel(Untouchable(), ContinuousVP(), image_shape=(1, 4, 4))
    model = DefendedClassifier(TinyClassifier(), diffpure(score), purifications)
    with pytest.raises(ValueError, match=message):
        model(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffpure(smooth_model(), 0.0), r"t_star must lie in \(0, 1\]"),
        (lambda: diffpure(smooth_model(), 1.1), r"t_star must lie in \(0, 1\]"),
        (lambda: diffpure(smooth_model(), 0.1, 0), "steps must be a whole number"),
        (lambda: diffpure(smooth_model(), 0.1, 2.5), "steps must be a whole number"),
        (
            lambda: diffpure(smooth_model(), reverse="heun"),
            "Unknown reverse rule 'heun'; known: consistency, ddim, ddpm",
        ),
        (lambda: diffpure(smooth_model(), variant="mine"), "Unknown DiffPure variant"),
        (lambda: diffpure(smooth_model(), reverse="one-shot"), "steps=1"),
        (lambda: Purifier(smooth_model(), 0.1, t_end=0.2), "t_end = 0.2 must be smaller than a step"),
        (lambda: Purifier(smooth_model(), 0.2, steps=10, t_end=0.05), "smaller than a step, 0.02"),
        (lambda: Purifier(smooth_model(), "constant"), "noise level 'constant' lacks t_star"),
        (lambda: Purifier(SmoothNet()), "wrap this SmoothNet"),
        (lambda: Purifier.from_config({"stride": 3}, smooth_model()), "Unknown purifier setting stride"),
        (lambda: Purifier(smooth_model(), 0.1, t_end=1.0), "t_end must lie"),
        (lambda: Purifier(smooth_model(), None), "is not a noise level"),
        (lambda: DefendedClassifier(TinyClassifier().train(), diffpure(smooth_model())), "train mode"),
        (lambda: DefendedClassifier(TinyClassifier(), diffpure(smooth_model()), 0), "purifications must be"),
        (lambda: DefendedClassifier(TinyClassifier(), diffpure(smooth_model()), 1, "max"), "logits, softmax, votes"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TINY_END = {"score_model": smooth_model(), "level": 0.1, "steps": 10, "t_end": 0.005}
TINY_STEPS = {"score_model": smooth_model(), "level": 0.9, "steps": FixedDt(1e-4), "rounds": (1.0, 0.01)}


@pytest.mark.parametrize(
    ("twin", "changed", "message"),
    [
        (lambda: Purifier(smooth_model(), 0.1, "one-shot", 1).with_steps(5), {}, "one-shot rule denoises in one step"),
        (lambda: Purifier(**TINY_END).with_steps(50), {"steps": 50}, "t_end = 0.005 must be smaller than a step"),
        (lambda: Purifier(**TINY_END).with_level(0.04), {"level": 0.04}, "t_end = 0.005 must be smaller than a step"),
        (lambda: Purifier(**TINY_END).at_share(0.4), {"level": 0.04}, "t_end = 0.005 must be smaller than a step"),
        (
            lambda: Purifier(**TINY_STEPS).with_steps(FixedDt(1e-5)),
            {"steps": FixedDt(1e-5)},  # 90000 steps and 900: fewer on average than indices of a round
            "rounds of 65535 steps at most",
        ),
        (lambda: Purifier(**TINY_STEPS).with_gradient("adjoint"), {"gradient": "adjoint"}, "plan fixed_steps"),
        (lambda: Purifier(ScoreModel(SmoothNet(), ContinuousVP())).with_resize(), {}, "resize needs to know"),
    ],
)
def test_twins_are_held_to_what_the_constructor_is(twin, changed, message):
    with pytest.raises(ValueError, match=message):
        twin()
    if changed:
        parts = TINY_END if "t_end" in message else TINY_STEPS
        with pytest.raises(ValueError, match=message):
            Purifier(**{**parts, **changed})


def test_rounds_with_the_most_steps_share_no_noise_and_longer_ones_are_refused():
    """Noise indices of all steps are distinct up to the bound."""
    purifier = Purifier(smooth_model(), 0.65535, "ddpm", FixedDt(1e-5), rounds=(1.0, 0.01))
    assert most_steps(purifier) == 65535 + 655
    found = purifier.process(torch.tensor([0.65535], dtype=torch.float64), purifier.noise(1, None, [0], 0, 0)).rounds
    first, second = (one.reverse[-1].index for one in found)
    assert int(first) < found[1].diffuse.index < int(second)
    with pytest.raises(ValueError, match="rounds of 65535 steps at most"):
        purifier.with_level(0.65536)


def test_bad_keys_and_a_classifier_put_back_into_train_mode():
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model()))
    with pytest.raises(ValueError, match="give one per image"):
        model(GOOD, sample_ids=[1])
    model.train()
    with pytest.raises(ValueError, match="train mode"):
        model(GOOD)


def test_a_part_of_the_classifier_in_train_mode_is_noticed():
    classifier = nn.Sequential(TinyClassifier(), nn.Dropout()).eval()
    classifier[1].train()
    with pytest.raises(ValueError, match="train mode"):
        DefendedClassifier(classifier, diffpure(smooth_model()))


def test_the_score_model_stays_in_eval_mode():
    purifier = diffpure(smooth_model())
    assert purifier.train().training
    assert not purifier.score_model.network.training


def test_bpda_passes_through_the_clamp(many):
    """The identity, also where the purified image is clamped."""
    purifier = Purifier(smooth_model(), 0.5, "sde", 5, gradient=BPDA())
    x = many.clone().requires_grad_()
    x_hat = purifier(x, sample_ids=IDS)
    assert (x_hat == 0).any()
    weight = torch.randn(many.shape)
    torch.testing.assert_close(torch.autograd.grad((x_hat * weight).sum(), x)[0], weight)
