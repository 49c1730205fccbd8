"""The diffusion classifier: its loss by hand and by Bayes' rule, exact gradients at bounded memory, under attack."""

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from torch import nn
from torch.testing import assert_close

from purify import ContinuousVP, DefendedClassifier, DiffusionClassifier, ScoreModel, diffpure, wrap, zoo
from purify.attacks import PGD, Adaptive
from purify.cli.list import main as list_main
from purify.data import load_dataset
from purify.diffusion.classes import Unconditional
from purify.diffusion.score import per_sample
from purify.purification.calls import Calls, calls
from purify.purification.gradients import BPDA, Checkpoint, Full, saved_bytes

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SCHEDULE = ContinuousVP()


class Conditional(SmoothNet):
    """Three classes and an entry for none, as diffusers' networks have them."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Embedding(4, 16)
        with torch.no_grad():
            self.class_embedding.weight.copy_(torch.linspace(-2, 2, 64).sin().reshape(4, 16))
        self.rows = 0

    def forward(self, u, labels, classes):
        self.rows += len(u)
        return super().forward(u, labels) + (u * self.class_embedding(classes).reshape(-1, 1, 4, 4)).sin()


def classifier(dtype=torch.float32, **options):
    model = ScoreModel(Conditional(), SCHEDULE, image_shape=(1, 4, 4), classes="unconditional").to(dtype)
    return DiffusionClassifier(model, **{"timesteps": 3, "t_min": 0.05, "t_max": 0.6, **options})


@pytest.mark.parametrize("weight", ["eps", "edm", "likelihood"])
def test_logits_are_minus_the_weighted_losses_under_shared_times_and_noise(weight):
    model = classifier(torch.float64, weight=weight)
    x, score, seen = X.double(), model.score_model, []
    hook = score.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    logits = model(x)
    hook.remove()
    assert logits.shape == (5, 3)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for u_t, labels, told in seen:
        t = labels / 1000
        assert len(set(t.tolist())) == 1  # one time for all images and classes
        alpha, sigma = SCHEDULE.alpha(t[0]), SCHEDULE.sigma(t[0])
        z = (u_t - alpha * (2 * x - 1).repeat(3, 1, 1, 1)) / sigma
        assert_close(z, z[:1].expand(15, -1, -1, -1))
        eps = score.network(u_t, labels, told)
        clean = (u_t - sigma * eps) / alpha - (2 * x - 1).repeat(3, 1, 1, 1)
        expected += by_hand(weight, eps - z, clean, t[0]).sum((1, 2, 3)).reshape(3, 5).T
    assert_close(logits, -0.55 / 3 * expected, rtol=1e-6, atol=0)


def by_hand(weight, error, clean, t):
    """The integrand over t, of errors of the noise, or as the EDM program has it of the clean image."""
    if weight == "eps":
        return error.square()
    if weight == "likelihood":
        return 0.5 * SCHEDULE.beta(t) / SCHEDULE.sigma(t) ** 2 * error.square()
    ratio = lambda s: SCHEDULE.sigma(s) / SCHEDULE.alpha(s)  # noqa: E731
    sigma, slope = ratio(t), (ratio(t + 1e-5) - ratio(t - 1e-5)) / 2e-5
    density = torch.distributions.LogNormal(-1.2, 1.2).log_prob(sigma).exp()
    return (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * density * slope * clean.square()


class TwoGaussians(nn.Module):
    """The exact denoiser of N(mean of the class, 0.3^2) for every pixel."""

    num_classes = 2
    means = torch.tensor([-0.5, 0.4], dtype=torch.float64)

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, u, labels, classes):
        t = labels / 1000
        alpha, sigma = (per_sample(c, u) for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        mean = self.means[classes].reshape(-1, 1, 1, 1)
        return sigma * (u - alpha * mean) / (0.09 * alpha**2 + sigma**2)


def test_under_the_likelihoods_weight_a_softmax_is_bayes_rule():
    score = ScoreModel(TwoGaussians(), SCHEDULE, classes=0)
    model = DiffusionClassifier(score, 300, t_min=1e-5, weight="likelihood")
    x = torch.tensor([0.3, 0.5, 0.62], dtype=torch.float64)[:, None, None, None].expand(3, 1, 2, 2).contiguous()
    found = model(x).diff(dim=1)[:, 0]
    log_p = [torch.distributions.Normal(m, 0.3).log_prob(2 * x - 1).sum((1, 2, 3)) for m in TwoGaussians.means]
    assert_close(found, log_p[1] - log_p[0], rtol=0.05, atol=0.5)


def weighted(model, x):
    return (model(x) * torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype)).sum()


@pytest.mark.parametrize("gradient", [Full(), Checkpoint(), Checkpoint(memory_budget=20_000)])
@pytest.mark.parametrize("rows", [256, 5])  # 5: one class at once
def test_the_gradient_is_exact(gradient, rows, monkeypatch):
    monkeypatch.setattr("purify.purification.classify.ROWS", rows)
    model, x = classifier(torch.float64, gradient=gradient), X.double().requires_grad_()
    (exact,) = torch.autograd.grad(weighted(model, x), x)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with torch.no_grad():
        slope = (weighted(model, x + 1e-5 * v) - weighted(model, x - 1e-5 * v)) / 2e-5
    assert (exact * v).sum().item() == pytest.approx(slope.item(), rel=1e-7)
    assert_close(exact, torch.autograd.grad(weighted(classifier(torch.float64), x), x)[0])


def test_what_a_gradient_holds_does_not_grow_with_the_timesteps():
    def held(gradient, timesteps):
        return saved_bytes(classifier(timesteps=timesteps, gradient=gradient), X.clone().requires_grad_())[1]

    assert held(Checkpoint(), 24) == held(Checkpoint(), 3) < held(Full(), 3) / 4
    assert held(Full(), 24) > 6 * held(Full(), 3)


def test_calls_are_counted():
    model = classifier()
    model(X)
    assert model.score_model.network.rows == len(X) * model.network_calls == 5 * 9
    assert calls(model) == Calls(9, 27, 9)
    behind = DefendedClassifier(model, diffpure(smooth_model(), 0.1, steps=4, reverse="ddpm"), purifications=2)
    assert calls(behind) == Calls(2 * (4 + 9), 2 * 3 * (4 + 9), 2 * 9)


def test_answers_are_those_of_the_image_alone():
    fixed, random, ids = classifier(), classifier(random=True), torch.arange(5)
    assert_close(fixed(X)[2:4], fixed(X[2:4]))
    assert not fixed.accepts_keys
    assert torch.equal(fixed(X, sample_ids=ids, seed=7), fixed(X))
    assert_close(
        random(X, sample_ids=ids, draw=3, seed=7)[[4, 1]], random(X[[4, 1]], sample_ids=[4, 1], draw=3, seed=7)
    )
    assert not torch.equal(random(X, sample_ids=ids, draw=3), random(X, sample_ids=ids, draw=4))
    assert not torch.equal(random(X), random(X))


def test_a_config_makes_it_again():
    model = classifier(weight="edm", seed=3)
    again = DiffusionClassifier.from_config(model.config(), model.score_model)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timesteps": 0}, "timesteps"),
        ({"t_min": 0.7}, "0 < t_min < t_max <= 1"),
        ({"num_classes": 9}, "at most the network's 4"),
        ({"weight": "elbo"}, "Unknown weight of a diffusion classifier"),
        ({"gradient": BPDA()}, "takes the gradient Full"),
    ],
)
def test_what_makes_no_classifier_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        classifier(**options)


def test_networks_that_know_no_classes_and_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="not class-conditional"):
        DiffusionClassifier(smooth_model())
    with pytest.raises(ValueError, match=r"takes a purify.ScoreModel"):
        DiffusionClassifier(TinyClassifier())
    with pytest.raises(ValueError, match=r"images of shape \(1, 4, 4\)"):
        classifier()(torch.rand(2, 1, 8, 8))


def test_the_entry_for_no_class_is_not_answered():
    model = ScoreModel(Conditional(), SCHEDULE, classes=Unconditional(3))
    assert DiffusionClassifier(model, 1).num_classes == 3
    assert DiffusionClassifier(model, 1, num_classes=4).num_classes == 4
    assert DiffusionClassifier(ScoreModel(Conditional(), SCHEDULE, classes=2), 1).num_classes == 4


def test_the_embedded_one_classifies_is_attacked_and_is_put_behind_a_purifier():
    images, labels = (part[:16] for part in load_dataset("digits", "test"))
    model = zoo.classifier("digits-classes")
    assert isinstance(model, DiffusionClassifier)
    assert (model(images).argmax(1) == labels).float().mean() >= 0.9
    few, y = images[:2], labels[:2]
    found = PGD("Linf", 0.3, steps=4, eot=1)(model, few, y)
    assert (model(found.images).gather(1, y[:, None]) < model(few).gather(1, y[:, None])).all()
    assert Adaptive("Linf", 0.3, calls=20)(model, few, y).calls.tolist()[0] % model.network_calls == 0
    defended = wrap(model, dataset="digits", purifier="likelihood", steps=1)
    assert defended(few, sample_ids=[0, 1]).shape == (2, 10)
    assert zoo.score_model("digits-classes").eps(2 * few - 1, torch.tensor([0.1, 0.2])).shape == few.shape


def test_the_command_line_knows_it(capsys):
    assert list_main(["models", "score-models"]) == 0
    assert capsys.readouterr().out.count("digits-classes  ") == 2
