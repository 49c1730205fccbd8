"""Wrong calls from Python: each ends in one sentence that says what to do, before any work."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from diffusers import DDPMScheduler
from torch import nn

import purify
from purify import (
    Calibration,
    ContinuousVP,
    DefendedClassifier,
    DiscreteVP,
    EDMDenoiser,
    Noise,
    Purifier,
    ScoreModel,
    sources,
    zoo,
)
from purify.attacks import PGD, AutoAttack, Transfer, find_attack
from purify.certify import DSSN, Cascade, Draws, NoisyCounts, OneShotDenoised, Smooth, metrics, to_grid
from purify.data import load_dataset
from purify.diffusion.schedule import schedule_from_config
from purify.evaluate import Defence, Samples, summarize

X, Y = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4)
COLOUR = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BETAS = np.linspace(1e-4, 2e-2, 1000)
FEW = Draws(10, 20)


class Convolutions(nn.Sequential):
    """A classifier of colour images of 8 x 8 that begins with a convolution."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 5))
        self.eval()


class Returning(nn.Module):
    """Returns what a function makes of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x):
        return self.function(x)


class Unpaddable(SmoothNet):
    """As networks with attention do, it cannot take an empty batch."""

    def forward(self, u, labels):
        return super().forward(u, labels) + 0 * u.reshape(len(u), -1).sum()


def anywhere(channels=3):
    """A score model without image_shape."""
    return ScoreModel(SmoothNet(channels), ContinuousVP())


def free():
    return purify.diffpure(anywhere(), 0.1, 2, "ddpm")


def pure(**options):
    return Purifier(smooth_model(), 0.1, "ddpm", 2, **options)


def defended(classifier=None, **options):
    return DefendedClassifier(classifier or TinyClassifier(), pure(), **options)


def nan(network):
    with torch.no_grad():
        next(iter(network.parameters())).fill_(float("nan"))
    return network


def attack(model=None, images=X, labels=Y, **options):
    return PGD("Linf", 0.1, steps=1, eot=1)(defended() if model is None else model, images, labels, **options)


def smooth():
    return Smooth(TinyClassifier(), 0.25)


CHANNELS_LAST = r"shape \(8, 8, 3\) \(C, H, W\); they look like \(N, H, W, C\), use images.permute\(0, 3, 1, 2\)"
CASES = {
    # score models and schedules
    "betas": (lambda: ScoreModel(SmoothNet(), BETAS), r"^.{,80}of shape \(1000,\); .* by purify.DiscreteVP\(betas\)"),
    "betas tensor": (lambda: ScoreModel(SmoothNet(), torch.tensor(BETAS)), r"a Tensor of shape .*DiscreteVP\(betas\)"),
    "betas list": (lambda: ScoreModel(SmoothNet(), BETAS.tolist()), r"^.{,140}; .*DiscreteVP\(betas\)"),
    "scheduler": (
        lambda: ScoreModel(SmoothNet(), DDPMScheduler()),
        r"make one by purify.DiscreteVP\(scheduler.betas\)",
    ),
    "schedule class": (lambda: ScoreModel(SmoothNet(), DiscreteVP), r"call it: purify.DiscreteVP.linear\(\)"),
    "schedule name": (lambda: ScoreModel(SmoothNet(), "liner"), "did you mean 'linear'"),
    "time_scale": (lambda: ScoreModel(SmoothNet(), ContinuousVP(), time_scale=0), "time_scale must be positive"),
    "time a number": (lambda: anywhere().eps(COLOUR, 0.5), r"times t \(N,\) in \[0, 1\], got .* and 0.5"),
    "one time": (lambda: anywhere().eps(COLOUR, torch.tensor([0.5])), r"times t \(N,\)"),
    "numpy images": (lambda: anywhere().eps(COLOUR.numpy(), torch.tensor([0.5, 0.5])), "takes tensors u"),
    "table a number": (lambda: DiscreteVP(1000), r"got 1000; use purify.DiscreteVP.linear\(steps\)"),
    "table a name": (lambda: DiscreteVP("linear"), r"DiscreteVP.linear\(steps\)"),
    "table of text": (lambda: DiscreteVP(["a"]), "table of betas"),
    "table ragged": (lambda: DiscreteVP([[0.1], [0.1, 0.2]]), "table of betas"),
    "table a scheduler": (lambda: DiscreteVP(DDPMScheduler()), r"DiscreteVP\(scheduler.betas\)"),
    "alphas": (lambda: DiscreteVP(1 - BETAS), "as alphas do"),
    "alphas_cumprod": (lambda: DiscreteVP(DDPMScheduler().alphas_cumprod), "as alphas do"),
    "steps 10.5": (lambda: DiscreteVP.linear(10.5), "steps of a schedule must be a whole number"),
    "steps text": (lambda: DiscreteVP.cosine("1000"), "steps of a schedule must be a whole number"),
    "beta_start": (lambda: DiscreteVP.linear(10, "a"), "0 < beta_start <= beta_end < 1"),
    "betas fall": (lambda: DiscreteVP.linear(10, 0.02, 1e-4), "0 < beta_start <= beta_end < 1"),
    "max_beta": (lambda: DiscreteVP.cosine(10, 2), "max_beta must lie"),
    "schedule config": (lambda: schedule_from_config({"kind": "linear", "stepz": 3}), "not a schedule's config"),
    "EDM of text": (lambda: EDMDenoiser("edm"), "denoiser must be a torch.nn.Module"),
    "EDM schedule": (lambda: EDMDenoiser(SmoothNet(), DiscreteVP.linear()), "must be a purify.ContinuousVP"),
    # noise
    "seed text": (lambda: purify.derive_seed("a"), "seed must be a whole number"),
    "seed None": (lambda: purify.derive_seed(None), "seed must be a whole number"),
    "seed 1.5": (lambda: purify.derive_seed(1.5), "seed must be a whole number"),
    "ids text": (lambda: Noise.keyed(0, "abc"), "sample_ids must be whole numbers, one per image, got 'abc'"),
    "ids None": (lambda: Noise.keyed(0, None), "sample_ids must be whole numbers"),
    "draw text": (lambda: Noise.keyed(0, [1], "a"), "draw must be whole numbers"),
    "stream": (lambda: Noise.keyed(0, [1]).stream("attak"), "did you mean 'attack'"),
    # purifiers
    "t_star True": (lambda: Purifier(smooth_model(), True), "t_star must lie in"),
    "t_star huge": (lambda: Purifier(smooth_model(), 10**400), "t_star must lie in"),
    "rounds text": (lambda: Purifier(smooth_model(), rounds="two"), "rounds must be"),
    "clip text": (lambda: pure(clip="no"), "clip must be True or False"),
    "through_level": (lambda: pure(through_level="no"), "through_level must be True or False"),
    "resize text": (lambda: pure(resize="no"), "resize must be True or False"),
    "forward_schedule": (lambda: pure(forward_schedule=BETAS), r"forward_schedule must .*DiscreteVP\(betas\)"),
    "share 2": (lambda: pure().at_share(2), "share of the noise level must lie"),
    "share text": (lambda: pure().at_share("a"), "share of the noise level must lie"),
    "config None": (lambda: Purifier.from_config(None, smooth_model()), "A purifier's config is a dict"),
    "NaN weights": (lambda: Purifier(ScoreModel(nan(SmoothNet()), ContinuousVP())), "NaN in its weight first.weight"),
    "meta images": (lambda: pure()(X.to("meta")), "on the meta device"),
    "ids of a call": (lambda: pure()(X, sample_ids="abcd"), "sample_ids must be whole numbers"),
    "ids of None": (lambda: pure()(X, sample_ids=[None] * 4), "sample_ids must be whole numbers"),
    "draw of a call": (lambda: pure()(X, sample_ids=range(4), draw="a"), "draw must be whole numbers"),
    "channels last": (lambda: free()(COLOUR.permute(0, 2, 3, 1)), f"The score network cannot .*{CHANNELS_LAST}"),
    "channels": (lambda: free()(X), r"cannot take images of shape \(1, 4, 4\) .*; use images of the channels and size"),
    "guided": (lambda: purify.gdmp(anywhere(), 0.1, 2)(COLOUR.permute(0, 2, 3, 1)), CHANNELS_LAST),
    # calibration
    "calibrate a network": (lambda: purify.calibrate(SmoothNet(), X), "wrap the network in one first"),
    "norm text": (lambda: purify.calibrate(smooth_model(), X, norm="score"), "norm must be a purify.ScoreNorm"),
    "calibrate channels last": (lambda: purify.calibrate(anywhere(), COLOUR.permute(0, 2, 3, 1)), CHANNELS_LAST),
    "save": (lambda: zoo.calibration("digits").save("/no/where.json"), "/no/where.json cannot be written"),
    "load": (lambda: Calibration.load("/no/where.json"), "cannot be read as a calibration"),
    # defended classifiers
    "image_shape 8": (lambda: defended(image_shape=8), r"image_shape must be \(C, H, W\), got 8"),
    "image_shape of two": (lambda: defended(image_shape=(4, 4)), r"image_shape must be \(C, H, W\)"),
    "NaN classifier": (lambda: defended(nan(TinyClassifier())), "NaN in its weight layers.1.weight"),
    "classifier's size": (lambda: defended(TinyClassifier(size=8))(X), "The classifier cannot take images of shape"),
    "classifier's dtype": (lambda: defended(TinyClassifier().double())(X), "bring both to one type and device"),
    "flat logits": (lambda: defended(Returning(torch.flatten))(X), r"logits \(N, K\).*it returned shape \(64,\)"),
    "dict of images": (lambda: defended(Returning(lambda x: {"image": x}))(X), "it returned dict for 4 images"),
    "ids of many": (lambda: defended(purifications=2)(X, sample_ids=[0]), "4 images but 1 sample_ids"),
    "draws of many": (
        lambda: defended(purifications=2)(X, sample_ids=range(4), draw=torch.zeros(3).long()),
        "4 images but 3 draws",
    ),
    "defended channels last": (
        lambda: DefendedClassifier(Convolutions(), free())(COLOUR.permute(0, 2, 3, 1)),
        CHANNELS_LAST,
    ),
    # attacks
    "norm": (lambda: PGD("linf", 0.1), r"'linf' \(did you mean 'Linf'\?\)"),
    "no model": (lambda: attack("digits-standard"), "'digits-standard' is no classifier; attack a torch.nn.Module"),
    "model class": (lambda: attack(TinyClassifier), "is no classifier"),
    "score model": (lambda: attack(smooth_model()), "a ScoreModel is no classifier"),
    "purifier": (lambda: attack(pure()), "a Purifier is no classifier"),
    "labels float": (lambda: attack(labels=Y.float()), r"got torch.float32; use torch.as_tensor\(labels\).long\(\)"),
    "labels list": (lambda: attack(labels=[0, 1, 2, 3]), r"got list; use torch.as_tensor\(labels\).long\(\)"),
    "labels elsewhere": (lambda: attack(labels=Y.to("meta")), "Labels are on meta but images on cpu"),
    "images half": (lambda: attack(TinyClassifier(), X.half()), "images of torch.float16 on cpu; bring both to one"),
    "attack channels last": (
        lambda: attack(Convolutions(), COLOUR.permute(0, 2, 3, 1), Y[:2]),
        f"The model cannot .*{CHANNELS_LAST}",
    ),
    "attack ids": (lambda: attack(sample_ids="abcd"), "sample_ids must be whole numbers"),
    "attack seed": (lambda: attack(seed="a"), "seed must be a whole number"),
    "attack seed 1.7": (lambda: attack(seed=1.7), "seed must be a whole number"),
    "detached": (lambda: attack(lambda x: TinyClassifier()(x.detach())), "has no gradient with respect to the images"),
    "numpy logits": (lambda: attack(lambda x: TinyClassifier()(x).detach().numpy()), "a tensor; it returned ndarray"),
    "classes": (lambda: attack(lambda x: TinyClassifier()(x).argmax(1)), r"it returned shape \(1,\) for one image"),
    "one class": (lambda: attack(TinyClassifier(classes=1), labels=0 * Y), "at least two classes"),
    "inference mode": (lambda: torch.inference_mode()(attack)(), "torch.inference_mode"),
    "bare transfer": (lambda: Transfer("Linf", 0.1)(TinyClassifier(), X, Y), "has a purifier"),
    "attack's name": (lambda: find_attack(None), "Unknown attack None"),
    "AutoAttack's eps": (lambda: AutoAttack(TinyClassifier(), eps=8), "in Linf at most 1, got 8"),
    "AutoAttack's eps text": (lambda: AutoAttack(TinyClassifier(), eps="8/255"), "eps must be a number"),
    "AutoAttack's model": (lambda: AutoAttack("Standard"), "'Standard' is no classifier"),
    "AutoAttack's parts": (
        lambda: AutoAttack(TinyClassifier(), version="custom", attacks_to_run=["apgd"]),
        r"Unknown attack of AutoAttack 'apgd' \(did you mean 'apgd-",
    ),
    "AutoAttack's log": (lambda: AutoAttack(TinyClassifier(), log_path="/proc/no/log"), "choose another log_path"),
    "AutoAttack's images": (
        lambda: AutoAttack(TinyClassifier(), version="rand").run_standard_evaluation(X * 255, Y),
        r"must lie in \[0, 1\]",
    ),
    "AutoAttack's labels": (
        lambda: AutoAttack(TinyClassifier(), version="rand").run_standard_evaluation(X, Y.float()),
        "Labels must be",
    ),
    "AutoAttack on nothing": (
        lambda: AutoAttack(TinyClassifier(), version="rand").run_standard_evaluation(X[:0], Y[:0]),
        "images to attack must be a whole number of at least 1",
    ),
    # certificates
    "smooth function": (lambda: Smooth(torch.relu, 0.25), "must be a torch.nn.Module"),
    "smooth swapped": (
        lambda: Smooth(0.25, TinyClassifier()),
        "sigma must be a positive number, got a TinyClassifier.",
    ),
    "smooth NaN": (lambda: Smooth(nan(TinyClassifier()), 0.25), "NaN in its weight"),
    "draws a number": (lambda: smooth().certify(X, 100), "draws must be a purify.certify.Draws"),
    "draws a dict": (lambda: Cascade((smooth(),)).certify(X, {"n": 3}), "draws must be a purify.certify.Draws"),
    "certify ids": (lambda: smooth().certify(X, FEW, sample_ids="abcd"), "sample_ids must be whole numbers"),
    "certify seed": (lambda: smooth().certify(X, FEW, seed=1.5), "seed must be a whole number"),
    "certify size": (lambda: smooth().certify(COLOUR, FEW), "The classifier cannot take images of shape"),
    "certify dtype": (lambda: smooth().certify(X.double(), FEW), "images of torch.float64 on cpu; bring both"),
    "certify channels last": (
        lambda: Smooth(Convolutions(), 0.25).certify(COLOUR.permute(0, 2, 3, 1), FEW),
        CHANNELS_LAST,
    ),
    "stop": (lambda: Draws(stop=0.5), r"stop must be a purify.certify.Anytime\(radii\)"),
    "denoiser": (lambda: OneShotDenoised(TinyClassifier(), SmoothNet(), 0.5), "must be a purify.ScoreModel"),
    "denoiser's sigma": (lambda: OneShotDenoised(TinyClassifier(), smooth_model(), "a"), "sigma must be .*, got 'a'"),
    "denoiser's images": (
        lambda: Smooth(OneShotDenoised(Convolutions(), smooth_model(), 0.5), 0.5).certify(COLOUR, FEW),
        "The score network cannot take images of shape",
    ),
    "one scale": (lambda: Cascade(smooth()), "scales must be a tuple"),
    "scales of numbers": (lambda: Cascade((0.25, 0.5)), r"scales must be a tuple .*got \(0.25, 0.5\)"),
    "clean logits": (lambda: Cascade((smooth(),)).predict(X, torch.rand(2, 5), 10), "logits must be the classifier's"),
    "clean logits numpy": (lambda: Cascade((smooth(),)).predict(X, np.ones((4, 5)), 10), "logits must be"),
    "clean logits' classes": (lambda: Cascade((smooth(),)).predict(X, torch.rand(4, 3), 10), "3 classes, the scales 5"),
    "uniform": (lambda: Cascade((smooth(),)).predict(X, torch.rand(4, 5), 10, 5), "uniform must lie"),
    "offset_seed": (lambda: DSSN(TinyClassifier(), 0.1, offset_seed=-1), "offset_seed must be a whole number"),
    "offset_seed text": (lambda: DSSN(TinyClassifier(), 0.1, offset_seed="a"), "offset_seed must be a whole number"),
    "grid of numpy": (lambda: to_grid(X.numpy()), "divide 8-bit images by 255"),
    "grid of bytes": (lambda: to_grid((X * 255).byte()), "divide 8-bit images by 255"),
    "max_rows": (lambda: NoisyCounts(TinyClassifier(), lambda x, n: x, max_rows=0), "max_rows must be"),
    "certified lengths": (lambda: metrics.correct_radii(np.zeros(3), np.zeros(2), np.zeros(3)), "one per image"),
    "one radius": (lambda: metrics.certified_accuracy(np.zeros(3), 0.5), r"as \[0.5\]"),
    "no certificates": (lambda: metrics.average_certified_radius(np.zeros(0)), "no certificates"),
    # evaluations
    "option": (lambda: purify.Evaluation(datset="digits"), "'datset' of Evaluation .did you mean 'dataset'"),
    "option's place": (lambda: purify.Evaluation("digits"), r"have names, as Evaluation\(dataset="),
    "option changed": (lambda: purify.Evaluation().replace(foo=1), "Unknown option 'foo'"),
    "model as option": (
        lambda: purify.Evaluation(model=TinyClassifier()),
        "^--model takes a name, got a TinyClassifier.$",
    ),
    "defence's model": (lambda: Defence("a", "digits-standard", [], 1, {}), "model of a must be a torch.nn.Module"),
    "one attack": (lambda: Defence("a", TinyClassifier(), PGD("Linf", 0.1), 1, {}), "attacks on a must be a list"),
    "attacks by name": (lambda: Defence("a", TinyClassifier(), ["pgd-eot"], 1, {}), "attacks on a must be a list"),
    "attack classes": (lambda: Defence("a", TinyClassifier(), [PGD], 1, {}), "attacks on a must be a list"),
    "samples": (lambda: Samples(X, Y[:2], torch.arange(4)), "Samples are tensors"),
    "ids a range": (lambda: Samples(X, Y, range(4)), r"Samples are tensors .*range\(0, 4\)"),
    "no predictions": (lambda: summarize(np.zeros((0, 3), int), np.zeros(0, int)), "at least one sample"),
    "labels of another": (lambda: summarize(np.zeros((4, 3), int), np.zeros(3, int)), "at least one sample"),
    "flat predictions": (lambda: summarize(np.zeros(4, int), np.zeros(4, int)), "at least one sample"),
    "float predictions": (lambda: summarize(torch.zeros(4, 3), torch.zeros(4)), "must be whole numbers"),
    # names and files
    "kind": (lambda: zoo.names("scores"), "did you mean 'score'"),
    "data_dir": (lambda: load_dataset("cifar10", "test", 5), "data_dir must be a folder"),
    "data None": (lambda: sources.resolve_data(None), "A data set is a name or a path"),
    "wrap nothing": (lambda: purify.wrap(None, "digits"), "model must be a name, as 'Standard'"),
    "wrap a function": (lambda: purify.wrap(torch.relu, "digits"), "model must be a name, as 'Standard'"),
    "wrap data None": (lambda: purify.wrap("digits-standard", None), "A data set is a name or a path"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_call_ends_in_a_sentence(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500


def test_schedules_by_name():
    assert ScoreModel(SmoothNet(), "linear").config() == ScoreModel(SmoothNet(), DiscreteVP.linear()).config()
    assert ScoreModel(SmoothNet(), "cosine").config() == ScoreModel(SmoothNet(), DiscreteVP.cosine()).config()
    assert ScoreModel(SmoothNet(), "continuous").config() == ScoreModel(SmoothNet(), ContinuousVP()).config()
    assert anywhere().with_settings(schedule="linear").schedule.steps == 1000


def test_betas_of_diffusers_are_the_schedules():
    for ours, theirs in (
        (DiscreteVP.linear(), DDPMScheduler()),
        (DiscreteVP.cosine(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    ):
        np.testing.assert_allclose(DiscreteVP(theirs.betas).betas, ours.betas, rtol=1e-4)
    assert DiscreteVP(torch.tensor([0.1, 0.2], requires_grad=True)).steps == 2


def test_nothing_is_purified_to_nothing_by_any_network():
    purifier = purify.diffpure(ScoreModel(Unpaddable(3), ContinuousVP()), 0.1, 2, "ddpm")
    purified = purifier.purify(COLOUR[:0])
    assert purified.images.shape == (0, 3, 8, 8)
    assert len(purified.t_star) == len(purified.statistic) == len(purified.network_calls) == 0
    model = DefendedClassifier(Convolutions(), purifier)
    assert model(COLOUR[:0]).shape == (0, 5)
    assert attack(model, COLOUR[:0], Y[:0]).images.shape == (0, 3, 8, 8)
    unable = DefendedClassifier(Returning(lambda x: x.reshape(len(x), -1)), purifier)
    with pytest.raises(ValueError, match="The classifier cannot take an empty batch"):
        unable(COLOUR[:0])


def test_what_is_no_matter_of_shapes_keeps_its_own_words():
    def fails(x):
        raise RuntimeError("my own trouble")

    def full(x):
        raise torch.OutOfMemoryError("tried to allocate, size 3")

    with pytest.raises(RuntimeError, match="my own trouble"):
        defended(Returning(fails))(X)
    with pytest.raises(torch.OutOfMemoryError):
        defended(Returning(full))(X)


def test_numbers_of_numpy_are_taken():
    assert Purifier(smooth_model(), np.float32(0.25)).level.t_star == 0.25
    assert type(PGD("Linf", np.float32(0.25)).budget()["eps"]) is float
    assert type(PGD("L2", 1).budget()["eps"]) is int  # as records have it


def test_attacks_under_no_grad_are_those_without():
    with torch.no_grad():
        inside = attack()
    assert torch.equal(inside.images, attack().images)
    assert not torch.equal(inside.images, X)


def test_a_failed_robustbench_load_leaves_no_folders(tmp_path, monkeypatch):
    """It makes models/cifar10/Linf before it downloads."""

    def load_model(name, dataset, threat_model):
        (tmp_path / "models" / dataset / threat_model).mkdir(parents=True, exist_ok=True)
        raise OSError("no network")

    package = SimpleNamespace(utils=SimpleNamespace(load_model=load_model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("purify.named.import_robustbench", lambda: package)
    monkeypatch.setattr("purify.named._entry", lambda *names: {"gdrive_id": "x"})
    for there in (None, "models", "models/cifar10/L2"):
        if there:
            (tmp_path / there).mkdir(parents=True)
        with pytest.raises(ValueError, match="Standard could not be loaded"):
            purify.wrap("Standard", "cifar10", score_model=anywhere())
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        expected = {
            None: [],
            "models": ["models"],
            "models/cifar10/L2": ["models", "models/cifar10", "models/cifar10/L2"],
        }
        assert left == expected[there]
