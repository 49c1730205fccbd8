"""Classifiers without a gradient: refused in a sentence, and attacked by what still works."""

import json

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model

from purify import BlackBox, BPDAClassifier, ContinuousVP, DefendedClassifier, ScoreModel, diffpure, zoo
from purify.attacks import PGD, AutoAttack, RandomNoise, Square, Transfer
from purify.cli.attack import main
from purify.data import load_dataset
from purify.evaluate import Defence
from purify.evaluate.differentiable import check_gradient

X = 0.2 + 0.6 * torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = TinyClassifier()(X).argmax(1)


class Numpy(TinyClassifier):
    """Leaves autograd, as an ONNX session does."""

    def forward(self, x):
        return torch.from_numpy(super().forward(torch.from_numpy(x.numpy())).detach().numpy())


class NoGrad(TinyClassifier):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Inference(TinyClassifier):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


class Quantised(TinyClassifier):
    def forward(self, x):
        return super().forward((4 * x).round() / 4)


LEAVING = {"numpy": Numpy, "no_grad": NoGrad, "inference": Inference}


def behind(classifier, score_model=None, **options):
    return DefendedClassifier(classifier, diffpure(score_model or smooth_model(), 0.1, 2, "ddpm", **options))


@pytest.mark.parametrize("kind", LEAVING)
@pytest.mark.parametrize("defended", [False, True])
def test_a_model_that_leaves_autograd_is_named(kind, defended):
    model = behind(LEAVING[kind]()) if defended else LEAVING[kind]()
    attack = PGD("Linf", 0.1, steps=1, eot=1)
    with pytest.raises(ValueError, match=r"leaves autograd .* use square, or purify.BPDAClassifier"):
        attack(model, X, Y)
    with pytest.raises(ValueError, match=r"his leaves autograd .*--model-gradient none or bpda"):
        check_gradient(Defence("this", model, [attack], 1, {}), X)
    check_gradient(Defence("this", model, [Square("Linf", 0.1), RandomNoise("Linf", 0.1)], 1, {}), X)
    assert Square("Linf", 0.1, queries=5)(model, X, Y).images.shape == X.shape


def test_a_gradient_of_zero_is_remarked_on():
    for model in (Quantised(), behind(Quantised())):
        with pytest.warns(UserWarning, match="has a gradient of zero at every pixel .* --model-gradient bpda"):
            check_gradient(Defence("this", model, [PGD("Linf", 0.1)], 1, {}), X)


def test_a_score_network_that_leaves_autograd_is_named():
    class Cut(SmoothNet):
        def forward(self, u, labels):
            return super().forward(u.detach(), labels)

    model = ScoreModel(Cut(), ContinuousVP(), image_shape=(1, 4, 4))
    defence = Defence("this", behind(TinyClassifier(), model), [PGD("Linf", 0.1)], 1, {})
    with pytest.raises(ValueError, match=r"The score network of this leaves autograd .* use --gradient bpda"):
        check_gradient(defence, X)
    check_gradient(Defence("this", behind(TinyClassifier(), model, gradient="bpda"), [PGD("Linf", 0.1)], 1, {}), X)


@pytest.mark.parametrize("kind", [*LEAVING, "quantised"])
def test_bpda_has_the_values_of_one_and_the_gradient_of_the_other(kind):
    classifier, surrogate = LEAVING.get(kind, Quantised)(), TinyClassifier()
    model = BPDAClassifier(classifier, surrogate)
    assert torch.equal(model(X), classifier(X))
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    weights = torch.arange(20.0).reshape(4, 5)
    assert torch.equal(model(x), classifier(X))
    (own,) = torch.autograd.grad((weights * model(x)).sum(), x)
    (expected,) = torch.autograd.grad((weights * surrogate(other)).sum(), other)
    assert torch.equal(own, expected)
    attack = PGD("Linf", 0.2, steps=3, eot=2)
    for attacked in (model, behind(model)):
        found = attack(attacked, X, Y)
        assert (found.images - X).abs().max() > 0.1
    with pytest.raises(ValueError, match="leaves autograd"):
        attack(BlackBox(classifier), X, Y)
    with pytest.raises(ValueError, match="surrogate answers 3 classes and the classifier 5"):
        attack(BPDAClassifier(classifier, TinyClassifier(3)), X, Y)


def test_bpda_of_the_same_network_is_the_exact_gradient():
    """So what PGD finds is the same, defended or not, and by transfer."""
    plain = TinyClassifier()
    model = BPDAClassifier(Numpy(), TinyClassifier())
    for attack, a, b in (
        (PGD("Linf", 0.2, steps=3, eot=2), plain, model),
        (PGD("Linf", 0.2, steps=3, eot=2), behind(plain), behind(model)),
        (Transfer("Linf", 0.2, steps=3), behind(plain), behind(model)),
    ):
        assert torch.equal(attack(a, X, Y).images, attack(b, X, Y).images)


@pytest.mark.parametrize("defended", [False, True])
def test_attacks_take_gradients_where_the_caller_has_switched_them_off(defended):
    model = behind(TinyClassifier()) if defended else TinyClassifier()
    attack = PGD("Linf", 0.2, steps=2, eot=1)
    library = AutoAttack(model, eps=0.1, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"])
    library.apgd.n_iter = 2
    torch.manual_seed(0)
    expected = library.run_standard_evaluation(X, Y)
    with torch.no_grad():
        assert torch.equal(attack(model, X, Y).images, attack(model, X, Y).images)
        torch.manual_seed(0)
        assert torch.equal(library.run_standard_evaluation(X, Y), expected)
    with torch.inference_mode():
        for call in (lambda: attack(model, X, Y), lambda: library.run_standard_evaluation(X, Y)):
            with pytest.raises(ValueError, match=r"Attacks take gradients, which torch.inference_mode\(\) forbids"):
                call()


CLASSIFIER = """
import torch
from torch import nn
from purify import zoo

class Numpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = zoo.classifier("digits-standard")
    def forward(self, x):
        return torch.from_numpy(self.inner(torch.from_numpy(x.numpy())).numpy())

def net():
    return Numpy().eval()
"""


@pytest.mark.parametrize("gradient", ["none", "bpda"])
def test_a_run_on_a_model_without_gradient(gradient, tmp_path, capsys):
    (tmp_path / "net.py").write_text(CLASSIFIER)
    words = ["--model", f"{tmp_path}/net.py:net", "--model-gradient", gradient, "--n-examples", "8", "--eps", "0.3"]
    words += ["--attacks", "pgd-eot,transfer", "--attack-steps", "4", "--eot", "1", "--judge-draws", "2"]
    words += ["--steps", "2", "--noise-level", "constant", "--out", str(tmp_path / "run")]
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    config = result["config"]["defences"]["undefended"]
    assert config["exact"] is False
    assert (config["model_surrogate"] is None) == (gradient == "none")
    attacked = {a["attack"] for d in result["config"]["attacks"].values() for a in d}
    assert attacked == ({"square"} if gradient == "none" else {"pgd-eot", "transfer"})
    meanings = {c["meaning"] for c in result["self_checks"]}
    if gradient == "none":
        assert "No attack with a gradient was run: the accuracy is an upper bound of what holds." in meanings
        said = capsys.readouterr().out
        assert "no gradient attack was run on it" in said
        assert "(quick); no gradient." in said
        return
    assert "checkpoint gradient, APPROXIMATE: a stronger attack exists" in capsys.readouterr().out
    assert "The classifier's backward pass is that of another network; its own may lead further." in meanings
    images, labels = (t[:8] for t in load_dataset("digits", "test"))
    clean = (zoo.classifier("digits-standard")(images).argmax(1) == labels).double().mean()
    assert result["results"]["undefended"]["clean"]["mean"]["value"] == clean
    assert result["results"]["undefended"]["pgd-eot"]["mean"]["value"] < clean  # as strong as on the network itself
