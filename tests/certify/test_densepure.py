"""DensePure: its vote against a plain loop, one step against the one-shot denoiser, keys, gradient, the command."""

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from kills import lines

from purify import ContinuousVP, ScoreModel, zoo
from purify.attacks.base import keyed
from purify.certify import DensePure, Draws, OneShotDenoised, Smooth, dense_smoothing
from purify.cli.certify import main
from purify.data import load_dataset
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import DDIM, Ancestral
from purify.leaderboard import read_certified
from purify.purification.plans import reverse_times

SIGMA = 0.5


def test_the_vote_is_that_of_reverse_processes_run_one_by_one(images):
    """votes processes from the noisy state, each image and vote by itself with noise under keys of its own."""
    model, classifier, votes, steps = smooth_model(), TinyClassifier(), 3, 4
    ids, draws = torch.arange(7) + 10, torch.tensor([4, 0, 2, 9, 1, 1, 5])
    got = DensePure(classifier, model, SIGMA, votes, steps)(images, sample_ids=ids, draw=draws, seed=6)
    expected, rule = torch.full((7, 5), 0.5), Ancestral()
    time = torch.tensor([model.schedule.time_of_sigma(2 * SIGMA)]).double()
    for i in range(7):
        for k in range(votes):
            noise = Noise.keyed(6, ids[i : i + 1], int(draws[i]) * votes + k)
            u = model.schedule.alpha(time).float() * (2 * images[i : i + 1] - 1)
            times = reverse_times(time, steps, 0.0)
            for j in range(steps):
                u = rule(model, u, times[j], times[j + 1], noise.normal(1 + j, u.shape[1:]))
            expected[i, classifier((u.clamp(-1, 1) + 1) / 2).argmax()] += 1
    torch.testing.assert_close(got, (expected / (votes + 2.5)).log(), rtol=0, atol=1e-6)


def test_one_deterministic_step_is_the_one_shot_denoiser(images):
    """DDIM from t to 0 in one step gives u0_hat, so the votes are all its class."""
    model, classifier = smooth_model(), TinyClassifier()
    one_shot = Smooth(OneShotDenoised(classifier, model, SIGMA), SIGMA).certify(images, Draws(10, 60), seed=2)
    smooth = dense_smoothing(classifier, model, SIGMA, votes=3, steps=1, rule=DDIM())
    dense = smooth.certify(images, Draws(10, 60), seed=2)
    assert torch.equal(dense.counts, one_shot.counts)


def test_certificates_do_not_depend_on_batch_or_order(images):
    model, classifier, ids = smooth_model(), TinyClassifier(), torch.arange(7)
    whole = dense_smoothing(classifier, model, SIGMA, 3, 2).certify(images, Draws(10, 40), sample_ids=ids, seed=4)
    order = torch.tensor([5, 0, 3])
    part = dense_smoothing(classifier, model, SIGMA, 3, 2, max_rows=9)
    found = part.certify(images[order], Draws(10, 40), sample_ids=ids[order], seed=4)
    assert torch.equal(found.counts, whole.counts[order])
    assert torch.equal(part.predict(images, 20, sample_ids=ids), part.predict(images, 20, sample_ids=ids))


def test_attacks_see_the_gradient_of_the_log_of_the_mean_softmax(images):
    """Against finite differences in float64: votes themselves have none."""
    model, classifier = smooth_model().double(), TinyClassifier().double()
    dense, x = DensePure(classifier, model, SIGMA, 2, 3), images[:2].double().requires_grad_(True)
    keys = {"sample_ids": torch.arange(2), "draw": 3, "seed": 1}

    def soft(y):
        """The log of class 1's mean softmax, summed over the images."""
        noise = Noise.keyed(1, torch.arange(2), 3)
        logits = [dense._vote(y, noise, k) for k in range(2)]
        return torch.stack(logits).softmax(-1).mean(0)[:, 1].log().sum()

    (gradient,) = torch.autograd.grad(dense(x, **keys)[:, 1].sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        slope = (soft(x + 1e-5 * direction) - soft(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_the_command_certifies_and_attacks_it(tmp_path, capsys):
    run = ["--method", "densepure", "--sigma", "0.25", "--votes", "3", "--reverse-steps", "2", "--n-examples", "3"]
    run += ["--selection-draws", "10", "--draws", "40", "--attack-examples", "1", "--attack-steps", "2", "--eot", "2"]
    assert main([*run, "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    assert "densepure 0.25" in capsys.readouterr().out
    found = lines(tmp_path / "run")
    assert [r["attack"] for r in found].count("certificate") == 3
    assert not any(r.get("refuted") for r in found)
    assert main([*run, "--votes", "2", "--out", str(tmp_path / "run")]) == 2
    assert "differs in systems.densepure 0.25.votes" in capsys.readouterr().err


def test_few_steps_by_the_command_are_those_of_the_rule(tmp_path, capsys):
    """Two DDIM steps of a flow network and no vote, certified with the same draws in Python."""
    run = ["--method", "few-step", "--sigma", "0.25", "--score-model", "digits-flow", "--n-examples", "2"]
    run += ["--selection-draws", "10", "--draws", "40", "--attack-examples", "1", "--attack-steps", "2", "--eot", "2"]
    assert main([*run, "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    records = [r for r in lines(tmp_path / "run") if r["attack"] == "certificate"]
    smooth = dense_smoothing(zoo.classifier("digits-standard"), zoo.score_model("digits-flow"), 0.25, 1, 2, DDIM())
    expected = smooth.certify(load_dataset("digits", "test")[0][:2], Draws(10, 40))
    assert [r["counts"] for r in records] == expected.counts.tolist()
    assert main([*run, "--reverse", "consistency", "--out", str(tmp_path / "run")]) == 2
    assert "differs in systems.few-step 0.25.reverse" in capsys.readouterr().err
    (row,) = read_certified(tmp_path / "run")
    assert "each 2 network calls" in row.budget


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_network_that_answers_no_number_gives_no_vote(value, images):
    """Clamping would make a pixel of infinity, and a vote of NaN is for the first class."""

    class Failing(SmoothNet):
        def forward(self, u, labels):
            return torch.where((labels < 300)[:, None, None, None], value, super().forward(u, labels))

    model = ScoreModel(Failing(), ContinuousVP(), image_shape=(1, 4, 4))
    with pytest.raises(ValueError, match="On noise draw 0 the classifier answers NaN or infinity for sample 0"):
        dense_smoothing(TinyClassifier(), model, SIGMA, 2, 3).certify(images, Draws(2, 20))


def test_an_even_vote_of_two_classes_is_an_answer(images):
    class Bright(TinyClassifier):
        def forward(self, x):
            return torch.stack([x.flatten(1)[:, 0], 1 - x.flatten(1)[:, 0]], 1)

    model = DensePure(Bright(), smooth_model(), SIGMA, 2, 2)
    found = [keyed(model, seed)(images, torch.arange(7), torch.zeros(7).long()) for seed in range(6)]
    assert any((logits[:, 0] == logits[:, 1]).any() for logits in found)
