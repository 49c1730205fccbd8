"""The score norm against a loop, SSNI's formulas on numbers computed by hand, calibration and its errors."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SmoothNet, smooth_model
from torch import nn

from purify import (
    Calibration,
    Constant,
    ContinuousVP,
    FixedDt,
    Noise,
    Purifier,
    ScoreModel,
    ScoreNorm,
    SSNILinear,
    SSNISigmoid,
    calibrate,
    diffpure,
    scorenorm,
)
from purify.__main__ import main
from purify.data import load_dataset
from purify.purification.levels import LEVELS, NoiseLevel, Settings, build_level
from purify.purification.scorenorm import plain_total

IDS = torch.arange(7)


class StandardNormalScore(nn.Module):
    """The score of data N(0, I), which stay N(0, I) under a VP diffusion."""

    def forward(self, u, labels):
        return -u


def by_hand(calibration, xi=(10.0, 20.0), mean=15.0, std=2.0):
    """A calibration with round numbers in place of the measured ones."""
    return dataclasses.replace(calibration, xi_min=xi[0], xi_max=xi[1], mean=mean, std=std)


@pytest.fixture(scope="module")
def calibration():
    return calibrate(smooth_model(), torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)))


# --- the score norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["score", "eps"])
def test_score_norm_against_a_loop_over_draws(images, form):
    model = ScoreModel(StandardNormalScore(), ContinuousVP(), prediction="score")
    norm = ScoreNorm(0.01, 0.05, draws=5, form=form)
    u, noise = 2 * images.double() - 1, Noise.keyed(3, IDS, 2)
    got = norm(model, u, noise)
    keyed, schedule = noise.stream("score-norm"), ContinuousVP()
    for i in range(len(u)):
        vectors = []
        for m in range(5):
            t = 0.01 + 0.04 * (m + keyed.uniform(2 * m, (), torch.float64)[i]) / 5
            z = keyed.normal(2 * m + 1, u.shape[1:], torch.float64)[i]
            u_t = schedule.alpha(t) * u[i] + schedule.sigma(t) * z
            vectors.append(-u_t if form == "score" else schedule.sigma(t) * u_t)
        assert got[i].item() == pytest.approx(torch.stack(vectors).mean(0).norm().item(), rel=1e-12)


def test_the_mean_is_taken_before_the_norm(images):
    """Over many draws noise averages out: || E score || of N(0, I) data is mean(alpha) ||u||."""
    model = ScoreModel(StandardNormalScore(), ContinuousVP(), prediction="score")
    u = 2 * images.double() - 1
    alpha = ContinuousVP().alpha(torch.linspace(0.05, 0.15, 2001, dtype=torch.float64)).mean()
    got = ScoreNorm(0.05, 0.15, draws=4000)(model, u, Noise.keyed(0, IDS))
    torch.testing.assert_close(got, alpha * u.flatten(1).norm(dim=1), rtol=0.04, atol=0.0)


def test_score_norm_is_keyed_and_independent_of_batches(images, monkeypatch):
    model, norm, u = smooth_model(), ScoreNorm(draws=6), 2 * images - 1
    noise = Noise.keyed(1, IDS, 4)
    whole = norm(model, u, noise)
    rows = torch.tensor([5, 0, 3])
    torch.testing.assert_close(norm(model, u[rows], noise[rows]), whole[rows], rtol=1e-5, atol=0)
    monkeypatch.setattr(scorenorm, "ROWS", 14)  # two draws at a time
    torch.testing.assert_close(norm(model, u, noise), whole, rtol=1e-5, atol=0)
    assert not torch.allclose(norm(model, u, Noise.keyed(1, IDS, 5)), whole)
    # ... and is no function of the noise that purifies
    assert not torch.equal(noise.stream("score-norm").normal(1, (4,)), noise.normal(1, (4,)))


def test_score_norm_costs_its_draws_in_one_network_call(images):
    model, sizes = smooth_model(), []
    model.network.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    ScoreNorm(draws=6)(model, 2 * images - 1, Noise.keyed(0, IDS))
    assert sizes == [42]


def test_score_norm_gradient_by_finite_differences(images):
    model, norm = smooth_model(torch.float64), ScoreNorm(draws=4)
    u, noise = 2 * images.double() - 1, Noise.keyed(0, IDS)
    v = u.clone().requires_grad_()
    (g,) = torch.autograd.grad(norm(model, v, noise).sum(), v)
    direction, h = torch.randn(u.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1e-6
    slope = (norm(model, u + h * direction, noise) - norm(model, u - h * direction, noise)).sum() / (2 * h)
    assert (g * direction).sum().item() == pytest.approx(slope.item(), rel=1e-7)


# --- formulas -----------------------------------------------------------------------------------------------------


def test_linear_rule_by_hand(calibration):
    rule = SSNILinear(0.2, by_hand(calibration), bias=0.05)
    norms = torch.tensor([0.0, 7.0, 10.0, 15.0, 18.0, 20.0, 30.0], dtype=torch.float64)
    # (n - 10) / 10 * 0.2 + 0.05, clipped to [0.001, 0.25]
    expected = torch.tensor([0.001, 0.001, 0.05, 0.15, 0.21, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(rule.level(norms), expected, rtol=1e-12, atol=0)
    wide = SSNILinear(0.2, by_hand(calibration), bias=0.05, t_min=0.01, t_max=0.4)
    ends = wide.level(torch.tensor([0.0, 30.0, 50.0]).double())
    torch.testing.assert_close(ends, torch.tensor([0.01, 0.4, 0.4]).double(), rtol=1e-7, atol=0)


def test_sigmoid_rule_by_hand(calibration):
    rule = SSNISigmoid(0.2, by_hand(calibration), bias=0.05, tau=0.5)  # half a standard deviation of 2: 1.0
    norms = torch.tensor([15.0, 16.0, 14.0, 15.0 + math.log(3)], dtype=torch.float64)
    expected = torch.tensor([0.125, 0.25 * 0.7310585786300049, 0.25 * 0.2689414213699951, 0.1875]).double()
    torch.testing.assert_close(rule.level(norms), expected, rtol=1e-7, atol=0)
    in_norm = SSNISigmoid(0.2, by_hand(calibration), bias=0.05, tau=1.0, tau_unit="norm")
    assert torch.equal(in_norm.level(norms), rule.level(norms))
    assert rule.level(torch.tensor([1e6]).double()).item() == pytest.approx(0.25)
    assert rule.level(torch.tensor([-1e6]).double()).item() == 1e-3  # 0, but for the least level


@pytest.mark.parametrize("kind", [SSNILinear, SSNISigmoid])
def test_a_larger_norm_never_gives_a_smaller_level(kind, calibration):
    norms = torch.linspace(0, 60, 1001, dtype=torch.float64)
    levels = kind(0.3, by_hand(calibration), bias=0.02).level(norms)
    assert (levels.diff() >= 0).all()
    assert levels.min() >= 1e-3
    assert levels.max() <= 0.32 + 1e-12


@pytest.mark.parametrize("plan", [6, FixedDt(0.05)], ids=["fixed_steps", "fixed_dt"])
def test_equal_norms_give_diffpure(images, plan):
    """A network without a bias at u = 0 has the same score everywhere only if it is constant; then all norms agree."""

    class Constant1(nn.Module):
        def forward(self, u, labels):
            return torch.ones_like(u)

    model = ScoreModel(Constant1(), ContinuousVP(), prediction="score")
    norm = ScoreNorm()(model, 2 * images - 1, Noise.keyed(0, IDS))
    assert norm.std() < 1e-6  # the norm of the score alone: 4
    calibration = Calibration(2.0, 6.0, 4.0, 1.0, 2, model.fingerprint(), ScoreNorm())
    for rule in (SSNILinear(0.4, calibration, bias=0.1), SSNISigmoid(0.5, calibration, bias=0.1)):
        got = Purifier(model, rule, "ddpm", plan)(images, sample_ids=IDS)
        expected = Purifier(model, 0.3, "ddpm", plan)(images, sample_ids=IDS)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_each_sample_is_purified_as_if_alone_at_its_level(images, calibration):
    model = smooth_model()
    purifier = diffpure(model, SSNISigmoid(0.5, calibration, bias=0.1), 7, "ddpm")
    whole = purifier.purify(images, sample_ids=IDS)
    assert whole.t_star.std() > 0.01
    for i in range(7):
        alone = diffpure(model, whole.t_star[i].item(), 7, "ddpm")(images[i : i + 1], sample_ids=[i])
        torch.testing.assert_close(alone[0], whole.images[i], rtol=0, atol=1e-5)
    z = (calibration.norm(model, 2 * images - 1, Noise.keyed(0, IDS)) - calibration.mean) / calibration.std
    torch.testing.assert_close(whole.statistic, z)


# --- calibration --------------------------------------------------------------------------------------------------


def test_calibration_measures_the_norms(images):
    model = smooth_model()
    found = calibrate(model, images, ScoreNorm(draws=3), seed=4, batch_size=3)
    norms = ScoreNorm(draws=3)(model, 2 * images - 1, Noise.keyed(4, IDS)).detach()
    numbers = [found.xi_min, found.xi_max, found.mean, found.std]
    assert numbers == pytest.approx([f(norms).item() for f in (torch.min, torch.max, torch.mean, torch.std)], rel=1e-5)
    assert found.images == 7
    assert found.score_model == model.fingerprint()


def test_calibration_measures_what_a_purifier_that_resizes_measures(images):
    model = smooth_model(size=6)
    with pytest.raises(ValueError, match=r"takes images of shape \(1, 6, 6\)"):
        calibrate(model, images)
    found = calibrate(model, images, ScoreNorm(draws=3), seed=4, batch_size=3, resize=True)
    purifier = diffpure(model, SSNISigmoid(0.3, found), 3, "ddim").with_resize()
    norms = found.mean + found.std * purifier.purify(images, sample_ids=IDS, seed=4).statistic.detach()
    numbers = [found.xi_min, found.xi_max, found.mean, found.std]
    assert numbers == pytest.approx([f(norms).item() for f in (torch.min, torch.max, torch.mean, torch.std)], rel=1e-5)
    with pytest.raises(ValueError, match="give the ScoreModel an image_shape"):
        calibrate(ScoreModel(SmoothNet(), ContinuousVP()), images, resize=True)


def test_calibration_comes_back_from_disk_and_from_a_config(tmp_path, images, calibration):
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    purifier = diffpure(smooth_model(), SSNISigmoid(0.3, calibration, tau=2.0), FixedDt(0.05, batch=3), "ddim")
    config = json.loads(json.dumps(purifier.config()))
    again = Purifier.from_config(config, smooth_model())
    assert again.level == purifier.level
    assert again.plan == FixedDt(0.05, batch=3)
    assert torch.equal(again(images, sample_ids=IDS), purifier(images, sample_ids=IDS))


def test_another_score_model_is_refused(calibration):
    other = ScoreModel(SmoothNet(seed=1), ContinuousVP(), image_shape=(1, 4, 4))
    for level in (SSNILinear(0.2, calibration), SSNISigmoid(0.2, calibration)):
        with pytest.raises(ValueError, match="calibrated with another score model"):
            diffpure(other, level)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: SSNILinear(0.2), "needs a calibration on clean training images"),
        (lambda c: Purifier(smooth_model(), {"kind": "ssni-n", "t_star": 0.2}), "needs a calibration"),
        (lambda c: Purifier(smooth_model(), "ssni-n"), "lacks t_star"),
        (lambda c: SSNILinear(0.0, c), r"t_star must lie in \(0, 1\]"),
        (lambda c: SSNILinear(0.9, c, bias=0.2), r"t_max \(default: t_star \+ bias\) must lie in"),
        (lambda c: SSNILinear(0.2, c, bias=-0.1), r"bias must lie in \[0, 1\)"),
        (lambda c: SSNILinear(0.2, c, t_min=0.3), "t_min = 0.3 must not exceed t_max = 0.2"),
        (lambda c: SSNISigmoid(0.2, c, tau=0), "tau must be a positive number"),
        (lambda c: SSNISigmoid(0.2, c, tau_unit="sigma"), "Unknown unit of tau 'sigma'; known: norm, std"),
        (lambda c: SSNISigmoid(0.2, {"xi_min": 1}), "not a score-norm calibration"),
        (lambda c: dataclasses.replace(c, xi_max=c.xi_min), "calibrate on more, and different, images"),
        (lambda c: dataclasses.replace(c, std=math.nan), "finite norms"),
        (lambda c: ScoreNorm(0.02, 0.01), "0 < t_min < t_max"),
        (lambda c: ScoreNorm(draws=0), "score-norm draws must be"),
        (lambda c: ScoreNorm(form="x0"), "Unknown score-norm form 'x0'; known: eps, score"),
        (lambda c: calibrate(smooth_model(), torch.rand(1, 1, 4, 4)), "reference images must be"),
        (lambda c: calibrate(smooth_model(), 255 * torch.rand(9, 1, 4, 4)), r"lie in \[0, 1\]"),
        (lambda c: Calibration.load("nowhere.json"), "cannot be read as a calibration"),
    ],
)
def test_bad_settings(make, message, calibration):
    with pytest.raises(ValueError, match=message):
        make(calibration)


@pytest.mark.parametrize("content", ["[]", "{", '{"xi_min": 1}', '"text"', ""])
def test_damaged_calibration_files(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match="run `purify calibrate`"):
        Calibration.load(tmp_path / "c.json")


def test_the_command_resizes_where_the_score_model_is_larger(tmp_path, monkeypatch):
    model, path = smooth_model(size=12), tmp_path / "c.json"
    monkeypatch.setattr("purify.cli.calibrate.load_score", lambda name, dataset: model)
    assert main(["calibrate", "--images", "40", "--draws", "2", "--out", str(path)]) == 0
    expected = calibrate(model, load_dataset("digits", "train")[0][:40], ScoreNorm(draws=2), resize=True)
    assert Calibration.load(path) == expected


def test_the_command_calibrates(tmp_path, capsys):
    assert main(["calibrate", "--images", "40", "--draws", "2", "--out", str(tmp_path / "c.json")]) == 0
    found = Calibration.load(tmp_path / "c.json")
    assert (found.images, found.norm.draws) == (40, 2)
    for wrong, message in (
        (["--images", "1298"], "has 1297 training images"),
        (["--draws", "0"], "score-norm draws must be"),
        (["--dataset", "mnist"], "Unknown data set 'mnist'"),
    ):
        assert main(["calibrate", *wrong, "--out", str(tmp_path / "d.json")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()


def test_calibrate_notices_a_file_that_it_cannot_write_first(capsys, monkeypatch):
    monkeypatch.setattr("purify.cli.calibrate.calibrate", lambda *args, **kwargs: pytest.fail("it measured first"))
    assert main(["calibrate", "--out", "/proc/x.json"]) == 2
    assert "error: /proc/x.json cannot be written (" in capsys.readouterr().err


# --- a rule of one's own ------------------------------------------------------------------------------------------


def test_a_rule_of_ones_own_plugs_in(images, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Brightness(NoiseLevel):
        highest: float = 0.3

        def statistic(self, model, u, noise, total=plain_total):
            return u.flatten(1).mean(1).double()

        def level(self, statistic):
            return self.highest * torch.sigmoid(statistic)

    monkeypatch.setitem(LEVELS, "brightness", Brightness)
    purifier = Purifier(smooth_model(), {"kind": "brightness", "highest": 0.4}, "ddpm", 5)
    t_star = purifier.purify(images).t_star
    torch.testing.assert_close(t_star, 0.4 * torch.sigmoid((2 * images - 1).mean((1, 2, 3)).double()))
    assert Constant(0.2).varies is False


def test_a_level_named_on_the_command_line_is_that_level():
    settings = Settings(0.2, lambda: None)
    with pytest.raises(ValueError, match="constant has no parameter 'kind'"):
        build_level("constant", settings, {"kind": "ssni-l"})
