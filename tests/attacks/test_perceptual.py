"""Perceptual balls: distances against torchmetrics and by hand, bounds that hold, what is said without weights."""

import json

import pytest
import torch
from conftest import TinyClassifier
from torch import nn

from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, PGD, LowFrequencyPGD, NormPGD, RandomNoise, Transfer
from purify.attacks.frequency import low_pass
from purify.attacks.perceptual import LPIPSBall, PerceptualBall, SSIMBall, lpips_network, weights_file
from purify.attacks.threats import THREATS
from purify.cli.attack import main
from purify.data import load_dataset
from purify.leaderboard import read_run

IMAGES, LABELS = (t[:12] for t in load_dataset("digits", "test"))


def ssim_by_hand(z, x):
    """Wang et al. 2004, one window after the other, reflected at the border."""
    at = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    z, x = (nn.functional.pad(v.double(), (5, 5, 5, 5), mode="reflect")[0, 0] for v in (z, x))
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = z[i : i + 11, j : j + 11], x[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb, ab = (
                (window * a * a).sum() - ma**2,
                (window * b * b).sum() - mb**2,
                (window * a * b).sum() - ma * mb,
            )
            found.append(
                (2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va.clamp(0) + vb.clamp(0) + 9e-4))
            )
    return float(torch.stack(found).mean())


def test_ssim_is_the_published_one():
    z = (IMAGES + 0.2 * torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = SSIMBall().size(z, IMAGES)
    for i in range(3):
        assert float(found[i]) == pytest.approx(1 - ssim_by_hand(z[i : i + 1], IMAGES[i : i + 1]), abs=1e-5)
    assert SSIMBall().size(IMAGES, IMAGES).tolist() == [0.0] * 12
    with pytest.raises(ValueError, match="at least 6 pixels"):
        SSIMBall().check(torch.zeros(1, 1, 4, 4))


class Squares(PerceptualBall):
    """A distance that is known: the squared L2 norm."""

    def distance(self, z, x):
        return (z - x).square().flatten(1).sum(1)


def test_projection_goes_back_as_far_as_it_must_and_no_further():
    ball, g = Squares(), torch.Generator().manual_seed(0)
    x, z = 0.3 + 0.4 * torch.rand(2, 6, 1, 3, 3, generator=g)
    found = ball.project(z, x, 0.04)
    length, expected = (z - x).flatten(1).norm(dim=1), (found - x).flatten(1).norm(dim=1)
    assert (ball.size(found, x) <= 0.04).all()
    far = length > 0.2
    assert far.any()
    assert (expected[far] > 0.2 - length[far] / 2000).all()
    torch.testing.assert_close(
        nn.functional.cosine_similarity((found - x).flatten(1), (z - x).flatten(1)), torch.ones(6)
    )
    assert torch.equal(ball.project(x + 0.01, x, 0.04), (x + 0.01).clamp(0, 1))
    assert torch.equal(ball.project(z, x, 0.0), x)


def test_steps_are_as_long_as_what_there_is():
    x = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    z = x + torch.tensor([0.0, 0.1]).reshape(2, 1, 1, 1)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    lengths = Squares().direction(gradient, z, x).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.02 * 3, 0.1 * 3]), rtol=1e-3, atol=1e-4)


def defended():
    return DefendedClassifier(zoo.classifier("digits-standard"), diffpure(zoo.score_model("digits"), 0.1, 2, "ddpm"))


@pytest.mark.parametrize("kind", [PGD, APGD, LowFrequencyPGD, Transfer, RandomNoise])
def test_every_image_is_within_the_bound(kind):
    options = {} if kind is RandomNoise else {"steps": 3, "eot": 2}
    found = kind("ssim", 0.05, **options)(defended(), IMAGES[:6], LABELS[:6])
    own = SSIMBall().size(found.images, IMAGES[:6])
    assert torch.equal(own, found.sizes["ssim"])
    assert (own <= 0.05 + 1e-5).all()
    assert (own > 0.03).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_it_is_stronger_than_noise_and_a_smaller_bound_is_weaker():
    model = zoo.classifier("digits-standard")
    left = {
        eps: (model(PGD("ssim", eps, steps=20, eot=1)(model, IMAGES, LABELS).images).argmax(1) == LABELS).sum()
        for eps in (0.001, 0.05)
    }
    noise = model(RandomNoise("ssim", 0.05)(model, IMAGES, LABELS).images).argmax(1) == LABELS
    assert left[0.05] < left[0.001]
    assert left[0.05] < noise.sum()


def test_low_frequencies_stay_low_in_a_perceptual_ball():
    """Where the box does not cut: scaling a perturbation back keeps its frequencies."""
    x, g = 0.5 + 0.1 * (IMAGES[:4] - 0.5), torch.Generator().manual_seed(0)
    attack = LowFrequencyPGD("ssim", 0.02)
    z = attack.project(x + 0.1 * torch.randn(x.shape, generator=g), x)
    torch.testing.assert_close(low_pass(z - x, 0.5), z - x, rtol=0, atol=1e-5)
    assert (SSIMBall().size(z, x) <= 0.02 + 1e-5).all()


def test_attacks_with_steps_in_l_p_are_refused():
    with pytest.raises(ValueError, match="pgd-eot-norm is an attack in Linf, L2, L1, not in ssim"):
        NormPGD("ssim", 0.1)


# --- LPIPS --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for weights that is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips_network.cache_clear()
    yield tmp_path
    lpips_network.cache_clear()


def test_lpips_without_weights_says_what_to_do(hub, images, capsys):
    sentence = "alexnet-owt-7be5be79.pth is not in .*/checkpoints; make it where there is a network"
    with pytest.raises(ValueError, match=sentence):
        PGD("lpips", 0.05)(TinyClassifier(), images, torch.zeros(len(images), dtype=torch.int64))
    assert main(["--threat-model", "lpips", "--eps", "0.05", "--out", str(hub / "run")]) == 2
    error = capsys.readouterr().err
    assert "take the threat model ssim, which needs no weights" in error
    assert len(error.splitlines()) == 1
    assert not (hub / "run").exists()


def test_lpips_with_weights_is_that_of_torchmetrics(hub):
    """Random weights where AlexNet's belong: the numbers mean nothing, the way to them is the same."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference
    from torchvision.models import alexnet

    weights_file().parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(alexnet().state_dict(), weights_file())
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 40, 40, generator=g)
    z = (x + 0.2 * torch.rand(x.shape, generator=g)).clamp(0, 1)
    found = LPIPSBall().size(z, x)
    expected = [float(reference(z[i : i + 1], x[i : i + 1], "alex", normalize=True)) for i in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(found.min()) > 0
    assert LPIPSBall().size(x, x).tolist() == [0.0] * 3
    eps = float(LPIPSBall().size((IMAGES[:4] + 0.1).clamp(0, 1), IMAGES[:4]).mean())
    attacked = LowFrequencyPGD("lpips", eps, steps=2, eot=1)(defended(), IMAGES[:4], LABELS[:4])  # 8 x 8, grey
    assert (LPIPSBall().size(attacked.images, IMAGES[:4]) <= eps * (1 + 1e-4)).all()


def test_a_run_says_which_distance(tmp_path):
    out = tmp_path / "run"
    tiny = ["--n-examples", "4", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2"]
    more = ["--noise-level", "constant", "--threat-model", "ssim", "--eps", "0.05", "--protocol", "deterministic"]
    assert main([*tiny, *more, "--attacks", "transfer,low-frequency-eot", "--threads", "1", "--out", str(out)]) == 0
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert all(0 < r["ssim"] <= 0.05 + 1e-5 for r in records if r["attack"] != "clean")
    assert {(row.threat_model, row.eps) for row in read_run(out)} == {("ssim", 0.05)}
    result = json.loads((out / "result.json").read_text())
    assert result["verdict"].startswith("ssim eps 0.05, 4 images of digits:")
    assert any(x["protocol"] == "deterministic" for x in result["protocols"]["diffpure"]["lines"])
    assert set(THREATS) == {"Linf", "L2", "L1", "lpips", "ssim", "flow"}
