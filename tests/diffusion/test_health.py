"""The health check names the convention of a network that is wired wrongly, and is quiet on good ones."""

import math
import re

import pytest
import torch
from conftest import SmoothNet
from torch import nn

from purify import ContinuousVP, DiscreteVP, EDMDenoiser, ScoreModel, zoo
from purify.__main__ import main
from purify.data import load_dataset
from purify.diffusion.health import LIMIT, plot, times_of
from purify.networks.embedded import build_network

DIGITS = load_dataset("digits", "test")[0][:64]
FEW = (0.1, 0.3, 1.0, 3.0)
SCALED_LINEAR = DiscreteVP(torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64).numpy() ** 2)

# As public programs train: schedule, label of time t, prediction.
CONVENTIONS = {
    "score_sde": (ContinuousVP(), 999.0, 0.0, "eps"),
    "ddpm": (DiscreteVP.linear(), 1000.0, 1.0, "eps"),
    "guided": (DiscreteVP.linear(), 1000.0, 1.0, "learned_variance"),
    "improved": (DiscreteVP.cosine(4000), 1000.0, 0.25, "learned_variance"),
    "diffusers v": (DiscreteVP.cosine(), 1000.0, 1.0, "v"),
    "diffusers sample": (SCALED_LINEAR, 1000.0, 1.0, "x0"),
    "score": (ContinuousVP(), 1.0, 0.0, "score"),
    "time in [0, 1]": (ContinuousVP(), 1.0, 0.0, "v"),
    "cosine, few steps": (DiscreteVP.cosine(50), 50.0, 1.0, "x0"),
    "linear, few steps": (DiscreteVP.linear(100, 1e-3, 0.2), 100.0, 1.0, "eps"),
}


def column(values):
    return values[:, None, None, None]


class Speaking(nn.Module):
    """The embedded eps network in any other convention, exactly: it sees the same noisy image and noise level."""

    def __init__(self, schedule, scale, offset, prediction, name="digits", unit=False):
        super().__init__()
        self.eps, self.prediction, self.schedule = zoo.score_model(name), prediction, schedule
        self.scale, self.offset, self.unit = scale, offset, unit

    def forward(self, u, labels):
        t = ((labels.double() + self.offset) / self.scale).clamp(1e-6, 1)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        s, a, b = sigma / alpha, column(alpha).to(u.dtype), column(sigma).to(u.dtype)
        if self.unit:  # alpha x + sigma z with x in [0, 1] is one of 2 x - 1 with twice the noise
            s, inner = 2 * s, (2 * u - a) / (a.square() + 4 * b.square()).sqrt()
        else:
            inner = u
        eps = self.eps(inner, s.clamp_max(100).apply_(ContinuousVP().time_of_sigma))
        x0 = (u - b * eps) / a
        outputs = {"eps": eps, "x0": x0, "v": a * eps - b * x0, "score": -eps / b}
        outputs["learned_variance"] = torch.cat([eps, torch.zeros_like(eps)], 1)
        return outputs[self.prediction]


def speaking(name, **settings):
    schedule, scale, offset, prediction = CONVENTIONS[name]
    how = {"schedule": schedule, "prediction": prediction, "time_scale": scale, "time_offset": offset, **settings}
    return ScoreModel(Speaking(schedule, scale, offset, prediction), **how)


@pytest.mark.parametrize("name", zoo.names("score"))
def test_quiet_on_embedded_networks(name):
    images = load_dataset(zoo.describe(name)["dataset"], "test")[0]
    for start in range(0, 64, 16):  # whatever the images
        health = zoo.score_model(name).check(images[start : start + 8], 8, FEW)
        assert health.passed, health.sentence
    forgets = name.endswith(("-adbm", "-addt", "-consistency"))  # trained for other than denoising alone
    assert zoo.score_model(name).check(images).error < (0.7 if forgets else 0.5)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_quiet_on_the_conventions_of_public_programs(name):
    health = speaking(name).check(DIGITS, 16)
    assert health.passed, health.sentence
    assert health.error == pytest.approx(zoo.score_model("digits").check(DIGITS, 16, health.levels).error, rel=0.05)


def test_quiet_on_an_edm_denoiser():
    def denoiser(x, sigma):
        alpha = (1 + sigma.double().square()).rsqrt()
        times = times_of(ContinuousVP(), sigma.tolist())
        return digits.denoise(column(alpha).to(x.dtype) * x, times)

    class Module(nn.Module):
        def forward(self, x, sigma):
            return denoiser(x, sigma)

    digits = zoo.score_model("digits")
    health = ScoreModel(EDMDenoiser(Module()), ContinuousVP(), "x0").check(DIGITS)
    assert health.passed, health.sentence


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("declared", ["eps", "x0", "v", "score"])
def test_the_right_prediction_is_named(name, declared):
    right = CONVENTIONS[name][3]
    if declared == right or right == "learned_variance":  # whose shape tells
        return
    health = speaking(name, prediction=declared).check(DIGITS, 16, FEW)
    assert not health.passed
    assert health.best.prediction == right
    assert health.best.changes(health.declared) == 1
    assert f"output fits {right}, " in health.sentence
    assert f"declared ({declared}, " in health.sentence


LABELS = {
    "linear for cosine": ("diffusers v", {"schedule": DiscreteVP.linear()}),
    "cosine for linear": ("ddpm", {"schedule": DiscreteVP.cosine()}),
    "cosine for continuous": ("score_sde", {"schedule": DiscreteVP.cosine()}),
    "t in [0, 1] for 0 to 999": ("ddpm", {"time_scale": 1.0, "time_offset": 0.0}),
    "0 to 999 for t in [0, 1]": ("time in [0, 1]", {"time_scale": 1000.0}),
    "0 to 3999 for 0 to 999": ("improved", {"time_scale": 4000.0, "time_offset": 1.0}),
    "1000 t for 50 steps": ("cosine, few steps", {"time_scale": 1000.0}),
    "cosine, t in [0, 1] and v": ("ddpm", {"schedule": DiscreteVP.cosine(), "time_scale": 1.0, "prediction": "v"}),
}


@pytest.mark.parametrize(("name", "wrong"), LABELS.values(), ids=LABELS)
def test_the_right_labels_are_named(name, wrong):
    health = speaking(name, **wrong).check(DIGITS, 16, FEW)
    right = speaking(name)
    assert not health.passed
    read = right.with_settings(**health.best.settings())
    times = [times_of(model.schedule, health.levels) for model in (read, right)]
    torch.testing.assert_close(read.labels(times[0]), right.labels(times[1]), rtol=0.02, atol=1.0)
    assert health.best.prediction == right.prediction
    mended = speaking(name, **wrong).with_settings(**health.best.settings()).check(DIGITS, 16, FEW)
    assert mended.passed, mended.sentence


def test_off_by_one_matters_among_few_steps_only():
    few, many = DiscreteVP.cosine(10), DiscreteVP.linear()
    health = ScoreModel(Speaking(few, 10.0, 1.0, "eps"), few, time_offset=0.0).check(DIGITS)
    assert not health.passed
    assert (health.best.time_scale, health.best.time_offset) == (10.0, 1.0)
    assert ScoreModel(Speaking(many, 1000.0, 1.0, "eps"), many, time_offset=0.0).check(DIGITS).passed


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_a_network_for_images_between_0_and_1_is_named(prediction):
    network = Speaking(DiscreteVP.linear(), 1000.0, 1.0, prediction, unit=True)
    health = ScoreModel(network, DiscreteVP.linear(), prediction).check(DIGITS, 16, FEW)
    assert health.best.data == "unit"
    assert "labels 1000 t - 1, images in [0, 1], with" in health.sentence
    assert not health.passed


class PerChannel(nn.Module):
    """Three channels, each with a network of its own: digits, inverted and transposed ones."""

    def __init__(self):
        super().__init__()
        self.net = zoo.score_model("digits").network

    def forward(self, u, labels):
        a, b, c = u[:, :1], -u[:, 1:2], u[:, 2:].mT
        return torch.cat([self.net(a, labels), -self.net(b, labels), self.net(c, labels).mT], 1)


def test_channels_in_the_wrong_order_are_named():
    images = torch.cat([DIGITS, 1 - DIGITS.roll(1, 0), DIGITS.roll(2, 0).mT], 1)
    model = ScoreModel(PerChannel(), ContinuousVP())
    assert model.check(images, 16, FEW).passed
    health = model.check(images.flip(1), 16, FEW)
    assert not health.passed
    assert health.best.data == "reversed"


TRAINED = {
    "v": (DiscreteVP.cosine(), 1000.0, 1.0, 150),
    "eps": (DiscreteVP.cosine(100), 100.0, 1.0, 150),
    "score": (ContinuousVP(), 999.0, 0.0, 150),
    "x0": (DiscreteVP.linear(), 1000.0, 1.0, 500),
}


def trained(prediction):
    """A network trained in this way, for a short while."""
    schedule, scale, offset, steps = TRAINED[prediction]
    images = 2 * load_dataset("digits", "train")[0] - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(zoo.describe("digits")["architecture"])
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        for _ in range(steps):
            x, t = images[torch.randint(len(images), (64,))], (torch.randint(1000, (64,)) + 1).double() / 1000
            if isinstance(schedule, DiscreteVP):
                t = (t * schedule.steps).ceil() / schedule.steps
            z, a, b = torch.randn_like(x), *(column(c).float() for c in (schedule.alpha(t), schedule.sigma(t)))
            target = {"v": a * z - b * x, "eps": z, "score": -z / b, "x0": x}[prediction]
            error = network(a * x + b * z, (t * scale - offset).float()) - target
            (error * (b if prediction == "score" else 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    how = {"schedule": schedule, "time_scale": scale, "time_offset": offset}
    return ScoreModel(network.requires_grad_(False), prediction=prediction, **how)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", TRAINED)
def test_small_trained_networks(prediction):
    """Poor ones, quiet as they were trained and named in every other reading."""
    model = trained(prediction)
    health = model.check(DIGITS, 16, FEW)
    assert health.passed, health.sentence
    wrong = [{"prediction": other} for other in TRAINED if other != prediction] + [{"time_scale": 1.0}]
    if isinstance(model.schedule, ContinuousVP):
        wrong.append({"schedule": DiscreteVP.cosine()})
    for settings in wrong:
        health = model.with_settings(**settings).check(DIGITS, 16, FEW)
        assert not health.passed
        assert health.best.prediction == prediction
        assert model.with_settings(**health.best.settings()).check(DIGITS, 16, FEW).passed


def test_untrained_weights_and_other_data_are_no_better_than_trivial():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = build_network(zoo.describe("digits")["architecture"]).eval()
    for model, images in (
        (ScoreModel(untrained, ContinuousVP()), DIGITS),
        (zoo.score_model("digits"), 1 - DIGITS),
        (zoo.score_model("digits"), DIGITS.mT),
    ):
        health = model.check(images, 16, FEW)
        assert not health.passed
        assert health.error > LIMIT
        assert "EMA" in health.sentence


def test_no_number_is_named_with_its_noise_level():
    class Failing(SmoothNet):
        def forward(self, u, labels):
            return torch.where(labels.max() > 500, torch.nan, super().forward(u, labels))

    found = ScoreModel(Failing(), ContinuousVP()).check(DIGITS, 4, (0.1, 10.0))
    assert not found.passed
    assert found.sentence.startswith("This network answers NaN or infinity at noise level 10;")


def test_the_errors_are_those_of_denoise():
    """Against the model's own methods, and trivial denoisers computed in the plain way."""
    model = zoo.score_model("digits")
    health = model.check(DIGITS, 4, (0.5,))
    t = torch.full((4,), float(times_of(model.schedule, [0.5])), dtype=torch.float64)
    assert float(model.schedule.sigma(t)[0] / model.schedule.alpha(t)[0]) == pytest.approx(0.5)
    u = 2 * DIGITS[:4] - 1
    rough = []
    for seed in range(40):
        z = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed))
        noisy = column(model.schedule.alpha(t)).float() * (u + 0.5 * z)
        rough.append(float((model.denoise(noisy, t) - u).square().mean()))
    assert min(rough) < health.declared.errors[0] < max(rough)
    variance = float(u.var(correction=0))
    assert health.scaled[0] == pytest.approx(variance * 0.25 / (variance + 0.25), rel=0.15)
    others = torch.stack([u[[j for j in range(4) if j != i]].mean(0) for i in range(4)])
    assert health.mean[0] == pytest.approx(float((u - others).square().mean()))
    assert health.error == pytest.approx(health.declared.errors[0] / min(health.scaled[0], health.mean[0]))


def test_a_network_that_ignores_the_time_is_quiet():
    """A blind denoiser: all labels are alike."""

    class Blind(nn.Module):
        def forward(self, u, labels):
            inner = zoo.score_model("digits")
            return inner.eps(u, times_of(ContinuousVP(), [0.5] * len(u)))

    health = ScoreModel(Blind(), DiscreteVP.cosine()).check(DIGITS, 16, (0.3, 0.5, 0.7))
    assert health.passed, health.sentence


def test_a_table_of_embeddings_is_never_asked_beyond_its_end():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.most = nn.Embedding(20, 1), 0.0

        def forward(self, u, labels):
            self.most = max(self.most, float(labels.max()))
            return u + column(self.table(labels.long())[:, 0])

    model = ScoreModel(Table(), DiscreteVP.cosine(20))
    model.check(DIGITS)
    assert 0 < model.network.most <= 19


def test_images_are_few_where_they_are_large_and_flat_ones_do_no_harm():
    class Zero(nn.Module):
        def forward(self, u, labels):
            return 0 * u

    health = ScoreModel(Zero(), ContinuousVP()).check(torch.full((4, 3, 300, 300), 0.5), levels=(0.1,))
    assert health.images == 2
    assert not health.passed
    assert math.isfinite(health.error)
    with pytest.raises(ValueError, match="images to check a score model on"):
        zoo.score_model("digits").check(DIGITS[:0])
    with pytest.raises(ValueError, match="takes images of shape"):
        zoo.score_model("digits").check(torch.rand(2, 3, 8, 8))


def test_the_plot_is_a_picture(tmp_path):
    plot(zoo.score_model("digits").with_settings(prediction="v").check(DIGITS, 4), tmp_path / "a.png", "digits")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_plots_and_tells_by_its_status(tmp_path, capsys):
    assert main(["check", "--images", "8", "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "denoises as it should" in out
    assert re.search(r"noisy image, scaled +mean image +as declared", out)
    assert (tmp_path / "a.png").is_file()
    (tmp_path / "net.py").write_text(
        "from purify import zoo\n\ndef score():\n    return zoo.score_model('digits').with_settings(prediction='v')\n"
    )
    assert main(["check", "--images", "8", "--score-model", f"{tmp_path}/net.py:score"]) == 1
    out = capsys.readouterr().out
    assert "This network's output fits eps, continuous schedule, labels 1000 t, with 0.5" in out
    assert "best reading" in out


def test_the_dry_run_warns(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "from purify import zoo\n\ndef score():\n    return zoo.score_model('digits').with_settings(prediction='v')\n"
    )
    command = ["attack", "--n-examples", "4", "--steps", "1", "--noise-level", "constant", "--dry-run"]
    assert main(command) == 0
    assert "diffpure: This network denoises as it should" in capsys.readouterr().out
    assert main([*command, "--score-model", f"{tmp_path}/net.py:score"]) == 0
    assert "WARNING: diffpure: This network's output fits eps" in capsys.readouterr().out
