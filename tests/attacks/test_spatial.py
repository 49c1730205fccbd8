"""Flow fields against scipy, by hand and by finite differences; the attack against every shift there is."""

import json

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model
from scipy.ndimage import map_coordinates
from torch import nn

from purify import DefendedClassifier, diffpure
from purify.attacks import PGD, RandomNoise, SpatialPGD, SpatialTransfer, Square
from purify.attacks.flowfield import FlowBall, displacement, joined, parted, roughness, warp
from purify.attacks.threats import stated
from purify.cli.attack import main
from purify.evaluate import Defence, RunFolder, Samples, evaluate
from purify.evaluate.description import USUAL_ATTACKS
from purify.leaderboard import read_run, write_leaderboard

LABELS = torch.arange(7) % 5
G = torch.Generator().manual_seed(0)


def field(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def test_warping_is_bilinear_interpolation_with_a_border_that_goes_on():
    x, flow = torch.rand(3, 2, 5, 7, generator=G, dtype=torch.float64), field(3, 2, 5, 7)
    rows, columns = np.mgrid[:5, :7]
    for image, (right, down), found in zip(x, flow, warp(x, flow), strict=True):
        places = np.stack([(rows + down.numpy()).clip(0, 4), (columns + right.numpy()).clip(0, 6)])
        expected = [map_coordinates(channel, places, order=1) for channel in image.numpy()]
        np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-12)
    torch.testing.assert_close(warp(x, torch.zeros_like(flow)), x, rtol=0, atol=1e-12)


def test_size_and_roughness_by_hand():
    flow = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]], [[[1.0, 1.0]], [[2.0, 2.0]]]])  # two fields of 1 x 2 pixels
    assert displacement(flow).tolist() == pytest.approx([5.0, 5**0.5])
    assert roughness(flow).tolist() == pytest.approx([10.0, 0.0], abs=1e-5)  # the one pair, from both ends


def test_the_direction_is_that_of_the_loss_less_the_roughness():
    """Finite differences of a linear loss; and every pixel with a slope moves by one pixel."""
    x, flow, weights = (
        torch.rand(2, 1, 4, 4, generator=G, dtype=torch.float64),
        0.3 * field(2, 2, 4, 4),
        field(2, 1, 4, 4),
    )
    ball = FlowBall(0.1)
    found = parted(ball.direction(weights, joined(warp(x, flow), flow), ball.enter(x)))[1]

    def climbed(f):
        return ((weights * warp(x, f)).sum() - 0.1 * roughness(f).sum()).item()

    slope = torch.zeros_like(flow)
    for at in np.ndindex(*flow.shape):
        step = torch.zeros_like(flow)
        step[at] = 1e-6
        slope[at] = (climbed(flow + step) - climbed(flow - step)) / 2e-6
    torch.testing.assert_close(found, slope / slope.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)


class Where(nn.Module):
    """Whether the mass of an image is to the right, in the middle, or to the left of where it was."""

    def forward(self, x):
        columns = torch.arange(x.shape[-1], dtype=x.dtype)
        centre = (x.sum((1, 2)) * columns).sum(1) / x.sum((1, 2, 3)) - 3.5
        return torch.stack([centre, 0.4 - centre.abs(), -centre], 1)


def test_the_attack_shifts_what_has_to_be_shifted():
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, 3:5, 3:5] = 1.0
    y, model = torch.ones(2, dtype=torch.int64), Where().eval()
    assert model(x).argmax(1).tolist() == [1, 1]
    found = SpatialPGD("flow", 0.5, steps=30, eot=1)(model, x, y)
    assert (found.loss > 0).all()
    assert (found.sizes["flow"] <= 0.5 + 1e-5).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    whole = [warp(x, torch.tensor([s, 0.0]).reshape(1, 2, 1, 1).expand(2, 2, 8, 8)) for s in (-0.5, 0.5)]
    best = max(float(model(w)[0, [0, 2]].max() - model(w)[0, 1]) for w in whole)
    assert found.loss.min() > best - 0.05  # no shift of the whole does better
    still = SpatialPGD("flow", 0.0, steps=2, eot=1)(model, x, y)
    torch.testing.assert_close(still.images, x, rtol=0, atol=1e-5)
    rough = SpatialPGD("flow", 0.5, steps=30, eot=1, smoothness=0.0)(model, x, y)
    assert (found.sizes["roughness"] < rough.sizes["roughness"]).all()


def defended():
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"))


@pytest.mark.parametrize("kind", [SpatialPGD, SpatialTransfer])
def test_a_purifier_is_attacked_per_sample_and_within_the_bound(kind, images):
    attack = kind("flow", 0.4, steps=3, eot=2, restarts=2)
    whole = attack(defended(), images, LABELS)
    assert (whole.sizes["flow"] <= 0.4 + 1e-5).all()
    assert whole.sizes["flow"].max() > 0.2
    part = attack(defended(), images[3:5], LABELS[3:5], sample_ids=torch.arange(3, 5))
    torch.testing.assert_close(part.images, whole.images[3:5], rtol=0, atol=1e-5)
    assert whole.images.shape == images.shape
    if kind is SpatialPGD:
        assert set(whole.submitted.asked.tolist()) == {2 * 4 * 2}


def test_threat_models_do_not_mix():
    with pytest.raises(ValueError, match="pgd-eot is an attack in Linf, L2, L1, lpips, ssim, not in flow"):
        PGD("flow", 1.0)
    with pytest.raises(ValueError, match="spatial-eot is an attack in flow, not in Linf"):
        SpatialPGD("Linf", 0.1)
    with pytest.raises(ValueError, match=r"Unknown threat model 'flo' \(did you mean 'flow'"):
        SpatialPGD("flo", 0.1)
    with pytest.raises(ValueError, match="smoothness must be"):
        SpatialPGD("flow", 1.0, smoothness=-1)
    assert stated("flow", 1.0) == "flow 1 px"
    assert stated("Linf", 0.3, " eps ") == "Linf eps 0.3"
    assert "flow" not in Square.threats


def test_random_noise_moves_pixels_at_random(images):
    found = RandomNoise("flow", 0.5)(defended(), images, LABELS)
    assert (found.sizes["flow"] <= 0.5 + 1e-5).all()
    assert (found.images != images).any()


TINY = [
    *("--n-examples", "4", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2", "--threads", "1"),
    *("--noise-level", "constant", "--threat-model", "flow"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    assert main([*TINY, "--eps", "0.5", "--protocol", "in-loop", "--out", str(folder)]) == 0
    return folder


def test_a_run_says_what_its_radius_is(run, tmp_path):
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    attacked = [r for r in records if r["attack"] != "clean"]
    assert all(0 < r["flow"] <= 0.5 + 1e-5 and r["roughness"] > 0 for r in attacked)
    assert {r["attack"] for r in attacked} == set(USUAL_ATTACKS["flow"].split(","))
    result = json.loads((run / "result.json").read_text())
    assert result["verdict"].startswith("flow eps 0.5 px, 4 images of digits:")
    assert (run / "samples-diffpure.png").read_bytes().startswith(b"\x89PNG")
    rows = read_run(run)
    assert {(row.threat_model, row.eps) for row in rows} == {("flow", 0.5)}
    write_leaderboard(rows, tmp_path / "board")
    entries = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert {e["threat"] for e in entries} == {"flow 0.5 px"}
    assert "| flow 0.5 px |" in (tmp_path / "board" / "leaderboard.md").read_text()
    asked = [c for c in result["self_checks"] if c["defence"] == "diffpure"]
    assert any(c["name"].startswith("accuracy that black-box attacks take") and c["value"] is not None for c in asked)


def test_a_run_in_flow_resumes(run, capsys):
    before = (run / "records.jsonl").read_text()
    lines = before.splitlines(True)
    (run / "records.jsonl").write_text("".join(lines[:-3]))
    assert main([*TINY, "--eps", "0.5", "--out", str(run)]) == 0
    now = (run / "records.jsonl").read_text().splitlines()
    strip = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in part] for part in (lines, now)]
    assert strip[0] == strip[1]


def test_what_a_run_in_flow_cannot_do(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert main([*TINY, *out]) == 2
    assert "There is no usual flow radius for digits; pass --eps." in capsys.readouterr().err
    assert main([*TINY, "--eps", "0.5", "--attacks", "pgd-eot", *out]) == 2
    assert "pgd-eot is an attack in Linf, L2, L1, lpips, ssim, not in flow" in capsys.readouterr().err
    assert main([*TINY, "--eps", "0.5", "--protocol", "deterministic", *out]) == 2
    assert "The protocol deterministic goes on from attacked images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sample_is_judged_as_under_other_attacks(tmp_path, images):
    defence = Defence("d", defended(), [SpatialPGD("flow", 0.4, steps=2, eot=1)], 3, {})
    samples = Samples(images, LABELS, torch.arange(7))
    with RunFolder(tmp_path, {}, {}) as folder:
        evaluate(folder, [defence], samples, 1, progress=False)
        record, image = folder.get("d", "spatial-eot", 2), torch.from_numpy(folder.image("d", "spatial-eot", 2))
    assert record["Linf"] == pytest.approx(float((image - images[2]).abs().max()))
    assert len(record["predictions"]) == 3
    assert record["submitted"] == 3
