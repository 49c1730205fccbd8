"""ART and foolbox take a DefendedClassifier as it is (extra: interop)."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from purify import DefendedClassifier, diffpure, zoo
from purify.data import load_dataset

EPS, N, CLASSES = 0.3, 24, 10
ENGINES = ["full", "checkpoint", {"kind": "checkpoint", "memory_budget": 2**30}]


def build(gradient="full"):
    purifier = diffpure(zoo.score_model("digits"), 0.18, 5, "ddpm", gradient=gradient)
    return DefendedClassifier(zoo.classifier("digits-standard"), purifier)


@pytest.fixture(scope="module")
def data():
    images, labels = load_dataset("digits", "test")
    return images[:N], labels[:N]


@pytest.fixture
def art():
    estimators = pytest.importorskip("art.estimators.classification")
    return lambda model: estimators.PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), (1, 8, 8), CLASSES, clip_values=(0, 1), device_type="cpu"
    )


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox")


def loss_gradient(model, images, labels):
    """Gradient of the summed cross-entropy."""
    x = images.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(model(x), labels, reduction="sum"), x)[0]


def accuracy(model, images, labels):
    """Mean over ten purifications that no attack has seen."""
    found = [model(images, sample_ids=range(len(images)), draw=k, seed=1) for k in range(10)]
    return torch.stack([logits.argmax(1) == labels for logits in found]).float().mean().item()


def check_broken(model, images, labels, adversarial):
    """In the ball and in [0, 1], much worse than the clean and than random noise; the model as it was."""
    assert adversarial.shape == images.shape
    assert (adversarial - images).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    sign = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    noisy = (images + EPS * sign).clamp(0, 1)
    assert accuracy(model, adversarial, labels) < accuracy(model, noisy, labels) - 0.2
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_art_gets_our_loss_gradient(art, data, engine):
    images, labels = data
    model = build(engine)
    torch.manual_seed(0)
    expected = loss_gradient(model, images, labels) / N  # ART's loss is a mean
    torch.manual_seed(0)
    one_hot = torch.eye(CLASSES)[labels].numpy()
    found = torch.as_tensor(art(model).loss_gradient(images.numpy(), one_hot))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # CPUs round differently
    torch.manual_seed(1)
    other = torch.as_tensor(art(model).loss_gradient(images.numpy(), one_hot))
    assert (other - found).norm() > 0.1 * found.norm()  # each call purifies anew


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_art_gets_our_class_gradients(art, data, engine):
    """It goes back through one graph once for each class."""
    images = data[0][:5]
    model = build(engine)
    torch.manual_seed(0)
    x = images.clone().requires_grad_()
    logits = model(x)
    rows = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(CLASSES)]
    torch.manual_seed(0)
    found = torch.as_tensor(art(model).class_gradient(images.numpy()))
    torch.testing.assert_close(found, torch.stack(rows, 1), rtol=1e-5, atol=1e-6)


def test_art_predicts_and_attacks(art, data):
    evasion = pytest.importorskip("art.attacks.evasion")
    images, labels = data
    model = build()
    wrapped = art(model)
    torch.manual_seed(0)
    answers = torch.stack([torch.as_tensor(wrapped.predict(images.numpy())).argmax(1) for _ in range(10)])
    assert (answers == labels).float().mean() == pytest.approx(accuracy(model, images, labels), abs=0.1)
    torch.manual_seed(0)
    attack = evasion.ProjectedGradientDescent(wrapped, eps=EPS, eps_step=0.08, max_iter=15, verbose=False)
    adversarial = torch.as_tensor(attack.generate(images.numpy(), torch.eye(CLASSES)[labels].numpy()))
    check_broken(model, images, labels, adversarial)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_foolbox_gets_our_loss_gradient(foolbox, data, engine):
    eagerpy = pytest.importorskip("eagerpy")
    images, labels = data
    model = build(engine)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD()
    torch.manual_seed(0)
    expected = loss_gradient(model, images, labels)
    torch.manual_seed(0)
    loss = attack.get_loss_fn(wrapped, eagerpy.astensor(labels))
    found = attack.value_and_grad(loss, eagerpy.astensor(images))[1].raw
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_foolbox_attacks(foolbox, data):
    images, labels = data
    model = build()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    attack = foolbox.attacks.LinfPGD(steps=15, abs_stepsize=0.08)
    _, adversarial, success = attack(wrapped, images, labels, epsilons=EPS)
    assert success.shape == (N,)
    check_broken(model, images, labels, adversarial)
