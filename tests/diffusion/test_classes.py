"""What class-conditional networks are told, and that attacks see through it."""

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from torch import nn
from torch.testing import assert_close

from purify import ContinuousVP, DefendedClassifier, EDMDenoiser, Purifier, ScoreModel, diffpure, gdmp
from purify.diffusion.classes import Fixed, Predicted, Unconditional, as_rule, classes_of
from purify.purification.plans import FixedDt

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(5)


class Conditional(SmoothNet):
    """As diffusers' networks: a table of six, the last for no class."""

    def __init__(self, classes=6):
        super().__init__()
        self.config = {"num_class_embeds": classes}
        self.class_embedding = nn.Embedding(classes, 16)
        with torch.no_grad():
            self.class_embedding.weight.copy_(torch.linspace(-2, 2, 16 * classes).sin().reshape(classes, 16))

    def forward(self, u, labels, class_labels):
        assert class_labels.dtype == torch.int64
        return super().forward(u, labels) + self.class_embedding(class_labels).reshape(-1, 1, 4, 4)


class Vivid(TinyClassifier):
    """Says which of the first five pixels is brightest."""

    def forward(self, x):
        return 4 * x.flatten(1)[:, :5]


class Told(SmoothNet):
    """The same network, told one class for good."""

    def __init__(self, index):
        super().__init__()
        self.network, self.index = Conditional(), index

    def forward(self, u, labels):
        return self.network(u, labels, torch.full((len(u),), self.index))


def model(classes, network=None, dtype=torch.float32):
    return ScoreModel(network or Conditional(), ContinuousVP(), image_shape=(1, 4, 4), classes=classes).to(dtype)


@pytest.mark.parametrize(
    ("rule", "index"), [("unconditional", 5), (Unconditional(2), 2), (3, 3), ("1", 1), (Fixed(0), 0)]
)
def test_a_class_for_all_is_the_network_told_that_class(rule, index):
    told = ScoreModel(Told(index), ContinuousVP(), image_shape=(1, 4, 4))
    for options in ({}, {"steps": FixedDt(0.03, batch=2)}):
        own, other = (Purifier(m, 0.1, "sde", **{"steps": 3, **options}) for m in (model(rule), told))
        assert torch.equal(own(X, sample_ids=IDS), other(X, sample_ids=IDS))


@pytest.mark.parametrize("plan", [3, FixedDt(0.03, batch=2)], ids=str)
def test_each_image_is_told_what_the_classifier_says_of_it(plan):
    classifier = Vivid()
    purifier = Purifier(model(Predicted(classifier)), 0.1, "sde", plan)
    own = purifier(X, sample_ids=IDS)
    said = classifier(X).argmax(1)
    assert len(said.unique()) > 1
    for i, k in enumerate(said.tolist()):
        alone = Purifier(model(k), 0.1, "sde", plan)(X[i : i + 1], sample_ids=IDS[i : i + 1])
        assert_close(own[i : i + 1], alone)


def slope(purifier, x):
    z = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)
    return torch.autograd.grad((weights * purifier(z, sample_ids=IDS)).sum(), z)[0]


@pytest.mark.parametrize("autocast", [None, "float16"])
def test_the_gradient_goes_through_the_softmax_of_the_prediction(autocast):
    """Against a network whose mean entry is worked out by hand, from the image outside of the purifier."""
    classifier = TinyClassifier()
    purifiers = {
        engine: diffpure(model(Predicted(classifier)).with_settings(autocast=autocast), 0.1, 3, "ddpm", engine)
        for engine in ("full", "checkpoint")
    }
    x = X.double() if autocast is None else X
    if autocast is None:
        purifiers = {name: p.double() for name, p in purifiers.items()}
    found = {name: slope(p, x) for name, p in purifiers.items()}
    assert_close(found["full"], found["checkpoint"])
    held = purifiers["full"].score_model.classes.classifier(x).argmax(1)
    constant = torch.cat([slope_of(model(int(k)), x[i : i + 1], i, autocast) for i, k in enumerate(held)])
    through = found["full"] - constant
    z = x.clone().requires_grad_()
    soft = purifiers["full"].score_model.classes.classifier(z).softmax(1)
    table = purifiers["full"].score_model.network.class_embedding.weight[:5]
    by_hand = torch.cat([entry_slope(model(int(k)), x[i : i + 1], i, autocast) for i, k in enumerate(held)])
    (expected,) = torch.autograd.grad(((soft @ table).reshape(z.shape) * by_hand).sum(), z)
    tolerance = {"rtol": 1e-6, "atol": 1e-10} if autocast is None else {"rtol": 0.05, "atol": 1e-3}
    assert through.abs().max() > 1e-3
    assert_close(through, expected, **tolerance)


def slope_of(score_model, x, i, autocast):
    purifier = diffpure(score_model.with_settings(autocast=autocast), 0.1, 3, "ddpm", "full").to(x.dtype)
    z = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, X.numel(), dtype=z.dtype).reshape(X.shape)[i : i + 1]
    return torch.autograd.grad((weights * purifier(z, sample_ids=IDS[i : i + 1])).sum(), z)[0]


def entry_slope(score_model, x, i, autocast):
    """The gradient with respect to the entry that is added to the network's output, summed over steps."""
    purifier = diffpure(score_model, 0.1, 3, "ddpm", "full").to(x.dtype)
    table = purifier.score_model.network.class_embedding
    row = table.weight[score_model.classes.index].detach().clone().requires_grad_()
    handle = table.register_forward_hook(lambda m, a, out: row[None])
    weights = torch.linspace(-1, 1, X.numel(), dtype=x.dtype).reshape(X.shape)[i : i + 1]
    (found,) = torch.autograd.grad((weights * purifier(x, sample_ids=IDS[i : i + 1])).sum(), row)
    handle.remove()
    return found.reshape(1, 1, 4, 4)


def test_guidance_and_attacks_take_it():
    purifier = gdmp(model(Predicted(TinyClassifier())), 0.1, 2, rounds=2)
    defended = DefendedClassifier(TinyClassifier(), purifier)
    assert slope(purifier, X).isfinite().all()
    assert defended(X, sample_ids=IDS).shape == (5, 5)


class Denoiser(nn.Module):
    """As EDM's: weights of classes, or none."""

    label_dim = 5

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(5, 16)

    def forward(self, x, sigma, class_labels=None):
        told = torch.zeros(len(x), 5, dtype=x.dtype) if class_labels is None else class_labels
        return 0.5 * x + self.table(told).reshape(-1, 1, 4, 4)


def test_edm_networks_are_told_weights_or_nothing():
    network = EDMDenoiser(Denoiser())
    options = {"prediction": "x0", "image_shape": (1, 4, 4)}
    plain, none, one, said = (
        ScoreModel(network, ContinuousVP(), classes=c, **options)
        for c in (None, "unconditional", 3, Predicted(TinyClassifier()))
    )
    t = torch.full((5,), 0.1, dtype=torch.float64)
    assert torch.equal(plain.eps(X, t), none.eps(X, t))
    assert not torch.equal(plain.eps(X, t), one.eps(X, t))
    x = X.clone().requires_grad_()
    bound = said.bind(2 * x - 1)
    (gradient,) = torch.autograd.grad(bound.eps(X, t).sum(), x)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, r"conditional on 6 classes; say which it is told: classes='unconditional'"),
        (6, "must be below the network's 6, got 6"),
        (Unconditional(6), "token must be below the network's 6"),
        ("none", "Unknown class rule 'none'"),
        ("predicted", "needs a classifier"),
        (-1, "class must be a whole number of at least 0"),
    ],
)
def test_what_a_network_cannot_be_told_is_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        model(classes)


def test_a_table_without_an_entry_for_no_class():
    with pytest.raises(ValueError, match="knows 10 classes and no entry for none is known"):
        model("unconditional", Conditional(10))
    assert model(Unconditional(9), Conditional(10)).classes_for(X).tolist() == [9] * 5
    few = model(Predicted(TinyClassifier()), Conditional(4))
    with pytest.raises(ValueError, match="The network knows 4 classes, the classifier 5"):
        diffpure(few, 0.1, 2)(X)
    with pytest.raises(ValueError, match="Predicted takes a classifier"):
        Predicted(3)
    assert classes_of(SmoothNet()) is None
    assert as_rule("2") == Fixed(2)


def test_rules_tell_models_apart_and_others_keep_their_fingerprint():
    other = TinyClassifier(3)
    rules = [1, 2, "unconditional", Predicted(TinyClassifier()), Predicted(other)]
    digests = {model(rule).fingerprint() for rule in rules}
    assert len(digests) == len(rules)
    assert "classes" not in smooth_model().config()
    said = model(Predicted(other))
    assert said.with_settings(prediction="v").classes is said.classes


@pytest.mark.parametrize("around", [lambda network: network, torch.nn.DataParallel], ids=["alone", "parallel"])
def test_a_compiled_network_keeps_the_way_through_its_table(around):
    """Also one that was compiled while it was told plain classes, whose graph knows no hook."""
    torch._dynamo.reset()
    plain = model(Predicted(TinyClassifier()))
    network = around(torch.compile(plain.network, backend="aot_eager"))
    u, labels = torch.randn(3, 1, 4, 4), torch.full((3,), 50.0)
    for requires_grad in (False, True):
        network(u.clone().requires_grad_(requires_grad), labels, torch.tensor([1, 2, 3]))
    compiled = ScoreModel(network, plain.schedule, image_shape=(1, 4, 4), classes=Predicted(TinyClassifier()))
    assert_close(*(slope(diffpure(m, 0.1, 3, "ddpm"), X) for m in (compiled, plain)))
