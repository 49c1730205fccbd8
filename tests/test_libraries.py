"""Attack libraries and RobustBench take our models as they are."""

import base64
import hashlib
import json
import subprocess
import sys
import types

import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, PGD, AutoAttack, AutoAttackRand, Square
from purify.attacks import autoattack as adapter
from purify.compat import import_robustbench, replaced
from purify.data import load_dataset


@pytest.fixture
def model():
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.1, 3, "ddpm"))


@pytest.fixture
def y(model, images):
    return torch.stack([model(images, sample_ids=range(7), draw=k) for k in range(9)]).mean(0).argmax(1)


@pytest.mark.parametrize("name", ["EOTPGD", "APGD", "Square"])
def test_torchattacks(name, model, images, y):
    import torchattacks

    torch.manual_seed(0)
    make = {
        "EOTPGD": lambda: torchattacks.EOTPGD(model, eps=0.3, alpha=0.08, steps=8, eot_iter=3),
        "APGD": lambda: torchattacks.APGD(model, eps=0.3, steps=8, eot_iter=2),
        "Square": lambda: torchattacks.Square(model, eps=0.3, n_queries=200),
    }[name]
    adversarial = make()(images, y)
    assert (adversarial - images).abs().max() <= 0.3 + 1e-5
    accuracy = torch.stack([model(adversarial, sample_ids=range(7), draw=k).argmax(1) == y for k in range(9)])
    assert accuracy.float().mean() < (0.9 if name == "Square" else 0.7)
    model(images)  # still usable: the library put modes back


def test_robustbench_imports_on_a_plain_install():
    """In a fresh process, after `import purify`, without the original autoattack."""
    code = (
        "import purify, robustbench, autoattack; from autoattack.state import EvaluationState;"
        "from robustbench.eval import benchmark; print(autoattack.AutoAttack.__module__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    expected = "autoattack.autoattack" if adapter.is_original_installed() else "purify.attacks.autoattack"
    assert done.stdout.strip() == expected


@pytest.fixture
def robustbench(monkeypatch):
    """RobustBench, which loads random images of CIFAR's shape in place of CIFAR-10 and whose AutoAttack is brief.

    ``attacks`` collects the attacks that it makes, ``found`` what they return.
    """
    from purify.compat import import_robustbench

    package = import_robustbench()
    import robustbench.data
    import robustbench.eval
    from robustbench.model_zoo.enums import BenchmarkDataset

    images = 0.2 + 0.6 * torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = cifar_classifier()(images).argmax(1)

    def load(n_examples, data_dir, transform):
        return images[:n_examples], labels[:n_examples]

    monkeypatch.setitem(robustbench.data._clean_dataset_loaders, BenchmarkDataset.cifar_10, load)
    attacks, found = [], []

    class Brief(robustbench.eval.AutoAttack):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"seed": 0, **kwargs})
            self.apgd.n_iter = self.apgd_targeted.n_iter = 4
            self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 2
            self.fab.n_iter, self.square.n_queries = 2, 10
            attacks.append(self)

        def run_standard_evaluation(self, *args, **kwargs):
            found.append(super().run_standard_evaluation(*args, **kwargs))
            return found[-1]

    monkeypatch.setattr(robustbench.eval, "AutoAttack", Brief)
    return types.SimpleNamespace(benchmark=package.benchmark, images=images, attacks=attacks, found=found)


def cifar_classifier():
    return TinyClassifier(channels=3, size=32)


def cifar_model():
    return DefendedClassifier(cifar_classifier(), diffpure(smooth_model(channels=3, size=32), 0.05, 2, "ddpm"))


@pytest.mark.parametrize(("threat_model", "eps"), [("Linf", 6 / 255), ("L2", 1.1)])
def test_robustbench_benchmarks_a_defended_classifier(robustbench, capsys, threat_model, eps):
    """``robustbench.benchmark`` as it is called in papers: CIFAR-10, all four attacks of the standard version."""
    torch.manual_seed(0)
    model = cifar_model()
    clean, robust = robustbench.benchmark(
        model, n_examples=10, dataset="cifar10", threat_model=threat_model, eps=eps, batch_size=6
    )
    assert clean >= 0.7
    assert 0 < robust <= clean - 0.2
    assert robustbench.attacks[0].attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert "robust accuracy after SQUARE" in "".join(capsys.readouterr())  # something was left for the last
    moved = (robustbench.found[0] - robustbench.images[:10]).flatten(1)
    distances = moved.abs().amax(1) if threat_model == "Linf" else moved.norm(dim=1)
    assert eps / 2 < distances.max() <= eps + 1e-5
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_robustbench_benchmark_keeps_its_state_and_log(robustbench, tmp_path):
    """With ``aa_state_path`` the answer is the share of images that no attack broke."""
    if adapter.is_original_installed():
        pytest.skip("the original autoattack is installed: its state file is its own")
    torch.manual_seed(0)
    _, robust = robustbench.benchmark(
        cifar_model(), 10, "cifar10", "Linf", eps=6 / 255, log_path=tmp_path / "log", aa_state_path=tmp_path / "state"
    )
    state = json.loads((tmp_path / "state").read_text())
    assert 0 < robust < 1
    assert robust == pytest.approx(sum(state["_robust_flags"]) / 10)
    untouched = (robustbench.found[0] == robustbench.images[:10]).flatten(1).all(1)
    assert untouched.float().mean() >= robust
    assert "robust accuracy" in (tmp_path / "log").read_text()


def test_adapter_equals_its_backend(images):
    """The same seed gives the same adversarial images as calling the package directly."""
    model = TinyClassifier().requires_grad_(False)
    y = model(images).argmax(1)
    ours = AutoAttack(model, "Linf", 0.2, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce", "square"])
    ours.apgd.n_iter, ours.square.n_queries = 5, 20
    package = adapter.backend()
    if package.__name__ != "pyautoattack":
        pytest.skip("the original autoattack is installed: nothing is adapted")
    direct = package.AutoAttack(model, norm="Linf", eps=0.2, seed=0, version="custom", attacks=["apgd-ce", "square"])
    direct.apgd.n_iter, direct.square.n_queries = 5, 20
    expected, labels = direct.run_standard_evaluation(images, y, batch_size=4)
    got, got_labels = ours.run_standard_evaluation(images, y, bs=4, return_labels=True)
    assert torch.equal(got, expected)
    assert torch.equal(got_labels, labels)
    assert ours.attacks_to_run == ["apgd-ce", "square"]
    individual = ours.run_standard_evaluation_individual(images, y, bs=4)
    assert set(individual) == {"apgd-ce", "square"}


def test_adapter_writes_its_log(tmp_path, images):
    model = TinyClassifier().requires_grad_(False)
    attack = AutoAttack(
        model, eps=0.2, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"], log_path=tmp_path / "log"
    )
    attack.apgd.n_iter = 2
    attack.run_standard_evaluation(images, model(images).argmax(1))
    assert "apgd-ce" in (tmp_path / "log").read_text()


def test_the_original_package_is_preferred(monkeypatch):
    fake = types.ModuleType("autoattack")
    fake.__spec__ = types.SimpleNamespace(origin="elsewhere", name="autoattack")
    calls = {}

    class Original:
        def __init__(self, model, **kwargs):
            calls["init"] = kwargs
            self.attacks_to_run = ["square"]

        def run_standard_evaluation(self, x, y, bs, return_labels):
            calls["run"] = (bs, return_labels)
            return x, y

    fake.AutoAttack = Original
    monkeypatch.setitem(sys.modules, "autoattack", fake)
    x, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    AutoAttack(TinyClassifier(), eps=0.1, log_path="somewhere").run_standard_evaluation(x, y, bs=3)
    assert calls["init"]["log_path"] == "somewhere"
    assert calls["run"] == (3, True)


def test_autoattack_rand_in_fixed_groups_does_not_depend_on_the_order(model):
    g = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(40, 1, 4, 4, generator=g)
    y = torch.stack([model(images, sample_ids=range(40), draw=k) for k in range(9)]).mean(0).argmax(1)
    attack = AutoAttackRand("Linf", 0.2, steps=4, eot=2)
    state = torch.get_rng_state()
    whole = attack(model, images, y).images
    assert torch.equal(state, torch.get_rng_state())
    order = torch.cat([torch.arange(32, 40), torch.randperm(32, generator=g)])
    again = attack(model, images[order], y[order], sample_ids=order).images
    torch.testing.assert_close(again, whole[order], rtol=0, atol=2e-5)
    second_group = attack(model, images[32:], y[32:], sample_ids=torch.arange(32, 40)).images
    torch.testing.assert_close(second_group, whole[32:], rtol=0, atol=2e-5)
    assert (whole - images).abs().max() <= 0.2 + 1e-5
    assert (whole != images).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "linf"}, "Unknown norm of AutoAttack 'linf'.*; known: L1, L2, Linf."),
        ({"version": "rnd"}, "Unknown version of AutoAttack 'rnd'.*; known: custom, plus, rand, standard."),
    ],
)
def test_autoattack_refuses_unknown_settings_when_it_is_made(settings, message, model):
    with pytest.raises(ValueError, match=f"^{message}$"):
        AutoAttack(model, eps=0.1, verbose=False, **settings)


def test_autoattack_refuses_an_unknown_version_later_on(model):
    attack = AutoAttack(model, eps=0.1, verbose=False)
    attack.set_version("rand")
    with pytest.raises(ValueError, match="Unknown version of AutoAttack 'rnd'"):
        attack.set_version("rnd")


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_autoattack_rand_places_its_checkpoints_for_its_steps(model, steps):
    """As the package's APGD does when it is made for that many; a mere change of n_iter leaves them where they were."""
    ours = AutoAttackRand("Linf", 0.3, steps=steps, eot=3).prepare(model, 0, torch.device("cpu")).apgd
    theirs = type(ours)(model, n_iter=steps, eps=0.3, eot_iter=3)
    for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr", "eot_iter"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 2.0)])
def test_pgd_is_about_as_strong_as_apgd(norm, eps):
    """At equal steps on a deterministic model, where APGD is the standard to meet."""
    model = zoo.classifier("digits-standard")
    x, y = (t[:100] for t in load_dataset("digits", "test"))
    apgd = AutoAttack(model, norm, eps, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"])
    adapter.set_apgd_steps(apgd.apgd, 40)
    apgd.apgd.n_restarts = 1
    left = {}
    for name, images in (
        ("apgd", apgd.run_standard_evaluation(x, y)),
        ("pgd", PGD(norm, eps, steps=40, eot=1, loss="ce")(model, x, y).images),
    ):
        left[name] = (model(images).argmax(1) == y).float().mean().item()
    assert left["apgd"] < 0.9
    assert left["pgd"] <= left["apgd"] + 0.03


@pytest.mark.parametrize("eps", [2.0, 4.0])
def test_l1_attacks_are_about_as_strong_as_l1_apgd(eps):
    """Croce & Hein's L1-APGD at equal steps and radius; a fixed sparsity of 5 % leaves 12 % more right at eps 4."""
    model = zoo.classifier("digits-at")
    x, y = (t[:128] for t in load_dataset("digits", "test"))
    package = AutoAttack(model, "L1", eps, seed=0, verbose=False, version="custom", attacks_to_run=["apgd-ce"])
    adapter.set_apgd_steps(package.apgd, 50)
    package.apgd.n_restarts, package.apgd.use_largereps = 1, False

    def left(images):
        return (model(images).argmax(1) == y).float().mean().item()

    theirs = left(package.run_standard_evaluation(x, y))
    for kind in (PGD, APGD):
        attack = kind("L1", eps, steps=50, eot=1, loss="ce", sparsity=None)
        assert left(attack(model, x, y).images) <= theirs + 0.02, kind


def test_square_shrinks_its_squares_within_its_queries():
    """As it would over 10,000 queries; with the published lengths as they are, 500 end with squares of 0.8 / 8."""
    model = zoo.classifier("digits-standard")
    attack = Square("Linf", 0.1, queries=500)
    square = attack.prepare(model, 0, torch.device("cpu")).square
    assert [square.p_selection(i) for i in (0, 1, 4, 499)] == [0.8, 0.4, 0.2, 0.8 / 512]
    x, y = (t[:64] for t in load_dataset("digits", "test"))
    right = model(attack(model, x, y).images).argmax(1) == y
    assert right.float().mean() < 0.72


def test_a_file_that_another_package_replaced_is_noticed(tmp_path, monkeypatch):
    """torchattacks' wheel holds an old copy of robustbench's tables; the real package's RECORD tells."""
    wheel, content = tmp_path / "thing-1.dist-info", b"models = 76\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (tmp_path / "thing").mkdir()
    wheel.mkdir()
    (tmp_path / "thing" / "zoo.py").write_bytes(content)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
    (wheel / "RECORD").write_text(f"thing/zoo.py,sha256={digest},12\nthing/other.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not replaced("thing", "thing/zoo.py")
    assert not replaced("thing", "thing/absent.py")
    (tmp_path / "thing" / "zoo.py").write_bytes(b"models = 57\n")
    assert replaced("thing", "thing/zoo.py")
    monkeypatch.setattr("purify.compat.replaced", lambda package, file: True)
    with pytest.raises(ImportError, match=r"overwritten by another package .torchattacks"):
        import_robustbench()
