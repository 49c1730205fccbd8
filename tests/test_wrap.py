"""purify.wrap: every architecture family of RobustBench, names, sizes, stochastic models, and the ImageNet path."""

import inspect
import pkgutil
from pathlib import Path

import families
import pytest
import torch
from conftest import SmoothNet, TinyClassifier, TinyConvolutions, smooth_model
from layouts import LAYOUTS, random_weights
from torch import nn
from torchvision.transforms import Normalize, Resize

import purify
from purify import (
    Constant,
    ContinuousVP,
    DefendedClassifier,
    Purifier,
    ScoreModel,
    SSNILinear,
    SSNISigmoid,
    diffpure,
    load_score_model,
    wrap,
)
from purify.checkpoints import PUBLIC, default_score_model
from purify.compat import import_robustbench
from purify.data import DATASETS
from purify.evaluate.build import Request, build_attacks, build_defences, build_purified
from purify.evaluate.description import Evaluation
from purify.presets import PURIFIERS

FAST = {"wide_resnet", "dm_wide_resnet", "preact", "resnext", "paf", "robustarch", "meansparse swin", "timm vit"}
IDS = [0, 1]
CALIBRATION = purify.zoo.calibration("digits")


def colour_model(size=32):
    return smooth_model(channels=3, size=size)


def forward_and_gradient(defended, size):
    """Logits and the gradient of their first column, under keyed noise."""
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = defended(x, sample_ids=IDS)
    (g,) = torch.autograd.grad(logits[:, 0].sum(), x)
    return logits.detach(), g


# --- architecture families ----------------------------------------------------------------------------------------


def test_every_family_that_robustbench_ships_is_here():
    package = import_robustbench().model_zoo.architectures
    shipped = {m.name for m in pkgutil.iter_modules(package.__path__)}
    assert shipped == {f for files, _, _ in families.FAMILIES.values() if files for f in files.split()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in families.FAMILIES]
)
def test_families_behind_a_purifier(name):
    size = families.FAMILIES[name][1]
    classifier = families.build(name).eval()
    dataset = "imagenet" if size == 224 else "cifar10"
    defended = wrap(classifier, dataset, score_model=colour_model(size), t_star=0.2, steps=2, reverse="ddpm")
    defended(torch.rand(1, 3, size, size))  # BoostingWideResNet normalises its last layer at each call
    logits, g = forward_and_gradient(defended, size)
    assert logits.shape[0] == 2
    assert logits.isfinite().all()
    assert g.isfinite().all()
    assert (g.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in defended.parameters())
    # what is defended is the classifier's answer on the purified images
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    purified = defended.purifier(x, sample_ids=IDS)
    torch.testing.assert_close(classifier(purified).detach(), logits, rtol=1e-4, atol=1e-5)


# --- names --------------------------------------------------------------------------------------------------------


def test_a_robustbench_model_by_name(tmp_path, monkeypatch):
    """A file with random weights where RobustBench looks for it."""
    monkeypatch.chdir(tmp_path)
    entries = import_robustbench().model_zoo.model_dicts
    constructor = next(
        m["Wong2020Fast"]["model"] for d, t in entries.items() if d.value == "cifar10"
        for k, m in t.items() if k.value == "Linf"
    )  # fmt: skip
    model = constructor()
    file = Path("models/cifar10/Linf/Wong2020Fast.pt")
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    defended = wrap("Wong2020Fast", score_model=colour_model(), t_star=0.1, steps=2)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(defended.classifier(x), model.eval()(x))
    assert defended(x).shape == (2, 10)


def test_a_robustbench_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    monkeypatch.chdir(tmp_path)
    file = Path("models/cifar10/Linf/Wong2020Fast.pt")
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(ValueError, match="RobustBench's Wong2020Fast could not be loaded"):
        wrap("Wong2020Fast", score_model=colour_model())
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "dataset", "where"),
    [
        ("Standard", "cifar10", "Google Drive id 1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC at models/cifar10/Linf/Standard.pt"),
        ("Chen2020Adversarial", "cifar10", r"at models/cifar10/Linf/Chen2020Adversarial.pt_m0.pt and that of"),
        ("Standard_R50", "imagenet", "the file that it downloads into .*checkpoints"),
    ],
)
def test_offline_says_which_file_to_put_where(name, dataset, where, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", no_network)
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{name} could not be loaded \(no network\); without a.*{where}") as error:
        wrap(name, dataset, score_model=colour_model(224 if dataset == "imagenet" else 32))
    assert "\n" not in str(error.value)


def test_embedded_models_and_the_data_sets_own_score_network():
    defended = wrap("digits-standard", "digits", t_star=0.18, steps=10, reverse="ddpm", purifications=2)
    score_model, classifier = purify.zoo.score_model("digits"), purify.zoo.classifier("digits-standard")
    expected = DefendedClassifier(classifier, diffpure(score_model, 0.18, 10, "ddpm"), purifications=2)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(defended(x, sample_ids=range(3)), expected(x, sample_ids=range(3)))


def test_what_is_missing_is_said(tmp_path, monkeypatch, images):
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path))
    purifier = Purifier(smooth_model(), 0.2, "ddpm", 3)
    assert torch.equal(
        wrap(TinyClassifier(), purifier=purifier)(images, sample_ids=range(7)),
        DefendedClassifier(TinyClassifier(), purifier)(images, sample_ids=range(7)),
    )
    for message, call in {
        "score-sde-cifar10 is not here; run `purify download": lambda: wrap("Standard"),
        "No score network of cifar100 is known": lambda: wrap("Rice2020Overfitting", "cifar100"),
        "Unknown purifier 'magic'; known: agdm, diffap, diffpure": lambda: wrap("Standard", purifier="magic"),
        "This purifier is complete; leave t_star, score_model out": lambda: wrap(
            TinyClassifier(), purifier=purifier, t_star=0.2, score_model="digits"
        ),
        "in train mode": lambda: wrap(TinyClassifier().train(), purifier=purifier),
        # a name is looked up before a score network is loaded, which is not here
        "RobustBench has no cifar10 Linf model 'Nothing'": lambda: wrap("Nothing"),
        "Unknown threat model of RobustBench's cifar10 models 'linf'.*; known: L2, Linf, corr": lambda: wrap(
            "Standard", "cifar10", "linf"
        ),
        "Unknown data set 'cifar'.*; known: cifar10, cifar100": lambda: wrap(TinyClassifier(), "cifar"),
        "Unknown option of diffpure 'tstar'.*; known: gradient, reverse, steps, t_star": lambda: wrap(
            TinyClassifier(), tstar=0.2
        ),
        "There is no file nowhere.py": lambda: wrap("nowhere.py:model"),
        "There is no file nothing.py": lambda: wrap(TinyClassifier(), score_model="nothing.py:score"),
        "Unknown guidance of GDMP parameter tstar .did you mean 't_star'.*; known: .*t_star": lambda: wrap(
            TinyClassifier(), "digits", purifier="gdmp", tstar=0.1
        ),
        "Unknown option of ssni-n 'tua'.*; known: bias, calibration, gradient": lambda: wrap(
            TinyClassifier(), "digits", purifier="ssni-n", tua=2
        ),
        "SSNI needs a calibration on clean training images: pass": lambda: wrap(
            TinyClassifier(), "digits", purifier="ssni-l", score_model="digits-calibrated"
        ),
        r"got SmoothNet; wrap a network of your own in purify.ScoreModel\(network, schedule": lambda: wrap(
            TinyClassifier(), score_model=SmoothNet()
        ),
        "The purifier must be a purify.Purifier, got ScoreModel; make one": lambda: DefendedClassifier(
            TinyClassifier(), smooth_model()
        ),
        "The purifier must be a purify.Purifier, got TinyClassifier": lambda: DefendedClassifier(
            purifier, TinyClassifier()
        ),
        "Purifier is no classifier of images; pass Defended": lambda: DefendedClassifier(purifier, purifier),
        "ScoreModel is no classifier of images": lambda: DefendedClassifier(smooth_model(), purifier),
        "function is no classifier of images": lambda: DefendedClassifier(lambda x: x, purifier),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "options", "level"),
    [
        ("ssni-n", {}, SSNISigmoid(0.18, CALIBRATION)),
        ("ssni-n", {"t_star": 0.2, "tau": 3}, SSNISigmoid(0.2, CALIBRATION, tau=3)),
        ("ssni-l", {"t_star": 0.2, "bias": 0.1, "t_max": 0.4}, SSNILinear(0.2, CALIBRATION, 0.1, t_max=0.4)),
        ("constant", {"t_star": 0.2}, Constant(0.2)),
    ],
)
def test_a_noise_level_is_diffpure_there_as_on_the_command_line(name, options, level):
    defended = wrap("digits-standard", "digits", purifier=name, steps=3, reverse="ddpm", **options)
    assert defended.purifier.config() == diffpure(purify.zoo.score_model("digits"), level, 3, "ddpm").config()
    settings, t_star = dict(options), options.get("t_star")
    settings.pop("t_star", None)
    evaluation = Evaluation(purifier=name, t_star=t_star, settings=settings, steps=3)
    assert first_purifier(evaluation).config() == defended.purifier.config()


def plan_of(evaluation):
    return Request(evaluation, DATASETS[evaluation.dataset], torch.device("cpu"))


def first_purifier(evaluation):
    """The purifier of an evaluation, the first of a run."""
    request = plan_of(evaluation)
    defences = build_defences(request, build_attacks(request))
    return next(d.model.purifier for d in defences if hasattr(d.model, "purifier"))


@pytest.mark.parametrize("purifier", [*PURIFIERS, "ssni-l", "ssni-n"])
@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist"])
def test_the_same_name_is_the_same_defence_in_python_and_on_the_command_line(purifier, dataset):
    defended = wrap(f"{dataset}-standard", dataset, purifier=purifier)
    evaluation = Evaluation(purifier=purifier, dataset=dataset, noise_level="constant")
    assert first_purifier(evaluation).config() == defended.purifier.config()


@pytest.mark.parametrize("purifier", PURIFIERS)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagenet"])
def test_published_settings_are_the_same_in_python_and_on_the_command_line(purifier, dataset):
    """Around networks of one's own."""
    size = DATASETS[dataset].shape[-1]
    model, classifier = colour_model(size), TinyClassifier(channels=3, size=size)
    given = (
        {"auxiliary": TinyConvolutions(3)} if "auxiliary" in inspect.signature(PURIFIERS[purifier]).parameters else {}
    )
    defended = wrap(classifier, dataset, purifier=purifier, score_model=model, **given)
    request = plan_of(Evaluation(dataset=dataset, attacks="pgd-eot", model="own"))
    options = {purifier: given, "constant": {}}
    built = build_purified(purifier, "constant", classifier, model, request, build_attacks(request), options)
    assert built.model.purifier.config() == defended.purifier.config()


def test_ssni_on_cifar10_takes_the_papers_tau():
    model = colour_model()
    calibration = purify.calibrate(model, torch.rand(9, 3, 32, 32))
    defended = wrap(TinyClassifier(), score_model=model, purifier="ssni-n", calibration=calibration, t_star=0.2)
    assert defended.purifier.level == SSNISigmoid(0.2, calibration, tau=20.0, tau_unit="norm")


def test_networks_from_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from purify import zoo\n\ndef score():\n    return zoo.score_model('digits')\n\n"
        "def guide():\n    return zoo.classifier('digits-guide')\n"
    )
    x = torch.rand(2, 1, 8, 8)
    own, named = (
        wrap("digits-standard", "digits", purifier="agdm", score_model=s, auxiliary=a, t_star=0.2, steps=2)
        for s, a in ((f"{file}:score", f"{file}:guide"), ("digits", "digits-guide"))
    )
    assert torch.equal(own(x, sample_ids=IDS), named(x, sample_ids=IDS))


# --- other sizes, stochastic models -------------------------------------------------------------------------------


def test_classifiers_that_need_another_size_and_preprocessing():
    inner = families.build("torchvision resnet").model
    chain = nn.Sequential(Resize((224, 224), antialias=False), Normalize(families.MEAN, families.STD), inner).eval()
    logits, g = forward_and_gradient(wrap(chain, score_model=colour_model(), t_star=0.2, steps=2), 32)
    assert logits.shape == (2, 1000)
    assert (g.flatten(1).norm(dim=1) > 0).all()


class NoisyClassifier(nn.Module):
    """Draws at each call, like randomized smoothing."""

    def __init__(self):
        super().__init__()
        self.inner = TinyClassifier()

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn_like(x))


def test_a_classifier_that_is_already_stochastic_draws_fresh_noise_at_each_call(images):
    defended = wrap(NoisyClassifier().eval(), purifier=Purifier(smooth_model(), 0.2, "ddpm", 3))
    x = images.requires_grad_()
    first, second = defended(x, sample_ids=range(7)), defended(x, sample_ids=range(7))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = defended(x, sample_ids=range(7))
    torch.manual_seed(1)
    second = defended(x, sample_ids=range(7))
    assert torch.equal(first, second)
    (g,) = torch.autograd.grad(first.sum(), x)
    assert (g.flatten(1).norm(dim=1) > 0).all()


def test_eval_mode_is_still_demanded_where_it_matters():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout()).eval()
    model[2].train()
    with pytest.raises(ValueError, match="in train mode"):
        DefendedClassifier(model, Purifier(smooth_model(), 0.2))


# --- ImageNet -----------------------------------------------------------------------------------------------------


def narrow(shapes, factor):
    """The layout of guided-diffusion's ImageNet network, its widths divided by ``factor``."""
    image = {"input_blocks.0.0.weight": 1, "out.2.weight": 0, "out.2.bias": 0}  # a dimension that counts colours

    def divided(key, shape):
        return [n if n <= 3 or image.get(key) == i else n // factor for i, n in enumerate(shape)]

    return {key: divided(key, shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("factor", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_network_for_256_in_front_of_a_classifier_for_224(factor, tmp_path):
    """One purification step on random weights, in float32 and under bfloat16."""
    path = tmp_path / "256x256_diffusion_uncond.pt"
    torch.save(random_weights(narrow(LAYOUTS["full"]["guided"]["shapes"], factor)), path)
    classifier = families.build("meansparse resnet").eval()
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    answers = {}
    for autocast in (None, "bfloat16"):
        model = load_score_model(path, head_channels=64 // factor, autocast=autocast)
        assert model.image_shape == (3, 256, 256)
        defended = wrap(classifier, "imagenet", score_model=model, t_star=0.15, steps=1, reverse="ddpm")
        z = x.clone().requires_grad_()
        logits = defended(z, sample_ids=[0])
        (g,) = torch.autograd.grad(logits[0, 0], z)
        assert g.isfinite().all()
        answers[autocast] = logits.detach(), g
    for half, full in zip(answers["bfloat16"], answers[None], strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - full).norm() / full.norm() < 0.1


def digits_defence(model):
    return wrap(TinyClassifier(size=8), "digits", score_model=model, t_star=0.2, steps=2)


def test_wrap_resizes_only_to_a_larger_score_model():
    x = torch.rand(2, 1, 8, 8)
    for model, resize in (
        (ScoreModel(SmoothNet(), ContinuousVP()), False),
        (smooth_model(size=8), False),
        (smooth_model(size=12), True),
    ):
        defended = digits_defence(model)
        assert defended.purifier.resize == resize
        assert defended(x).shape == (2, 5)
        with pytest.raises(ValueError, match=r"takes images of shape \(1, 8, 8\) \(C, H, W\), got \(1, 12, 12\)"):
            defended(torch.rand(2, 1, 12, 12))
    with pytest.raises(ValueError, match=r"would throw detail away.*a purifier of your own, made with resize=True"):
        digits_defence(smooth_model(size=4))
    with pytest.raises(ValueError, match=r"the score network takes \(3, 12, 12\); use one of this data set"):
        digits_defence(smooth_model(channels=3, size=12))
    own = Purifier(smooth_model(size=4), 0.2, "ddpm", 2, resize=True)
    assert wrap(TinyClassifier(size=8), "digits", purifier=own)(x).shape == (2, 5)


def test_default_score_models_are_known_by_name():
    assert {name for name in DATASETS if DATASETS[name].score_model is None} == {"cifar100"}
    for name in set(DATASETS) - {"cifar100"}:
        assert default_score_model(name) in {*purify.zoo.names("score"), *PUBLIC}
    with pytest.raises(ValueError, match="Unknown data set 'mnist'"):
        default_score_model("mnist")
