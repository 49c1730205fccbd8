"""Splitting noise against the original program; DSSN against brute force over every grid point in its ball."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DATA, TinyClassifier
from torch import nn

from purify import Noise, zoo
from purify.certify import ABSTAIN, DSSN, SSN, Draws, to_grid
from purify.certify.bounds import lower_bound
from purify.certify.splitting import Splitting, SplittingLevels, answer_and_steps, offsets, split
from purify.data import load_dataset


def cases(name):
    return json.loads((DATA / "certify" / f"{name}.json").read_text())["cases"]


def row(values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


# --- fixtures -----------------------------------------------------------------------------------------------------


def test_split_against_the_original():
    for case in cases("ssn_sample"):
        x, s = torch.tensor(case["x"]), torch.tensor(case["s"])
        torch.testing.assert_close(split(x, s, 2 * case["lam"]), torch.tensor(case["out"]), rtol=0, atol=1e-6)


def test_ssn_bound_and_radius_against_the_original():
    """The original's alpha is two-sided."""
    for case in cases("ssn_certify"):
        bound = lower_bound(case["NA"], case["N"], case["alpha_arg"] / 2)
        assert float(bound) == pytest.approx(case["prob_lb_f64"], rel=1e-9)
        radius = float(SSN(TinyClassifier(), case["lam"]).radius(bound))
        # The original computes it in float32, from a bound near 1/2.
        assert radius == pytest.approx(case["radius_l1"], rel=1e-5, abs=2.4e-7 * case["lam"])


def test_levels_against_the_original():
    for case in cases("dssn_levels"):
        assert SplittingLevels(case["lam"]).levels == case["levels"]
        assert SplittingLevels(case["sigma"] * 3**0.5).levels == case["levels"]
    for k in range(1, 5000):
        assert SplittingLevels(k / 510).levels == k


def test_dssn_noise_against_the_original():
    *small, cifar = cases("dssn_noise")
    template = offsets(cifar["levels"], cifar["dim"], cifar["seed"])
    assert template[:20].tolist() == cifar["template_head"]
    assert int(template.sum()) == cifar["template_sum"]
    for case in small:
        perturb = SplittingLevels(case["lam"], case["seed"])
        assert perturb.levels == case["levels"]
        for x_int, rows, mean in zip(case["x_int"], case["out"], case["out_mean_over_all_j"], strict=True):
            x = row(x_int) / 255
            draws = torch.tensor(case["j"])
            got = perturb(x.expand(len(draws), -1, -1, -1), Noise(0, torch.zeros_like(draws), draws))
            torch.testing.assert_close(got.flatten(1), torch.tensor(rows), rtol=0, atol=1e-6)
            every = torch.arange(case["levels"])
            whole = perturb(x.expand(len(every), -1, -1, -1), Noise(0, torch.zeros_like(every), every))
            torch.testing.assert_close(whole.flatten(1).mean(0), torch.tensor(mean), rtol=0, atol=1e-6)


def test_dssn_radius_against_the_original():
    for case in cases("dssn_certify"):
        answer, steps = answer_and_steps(torch.tensor([case["counts"]]))
        assert answer.tolist() == [case["pred"]]
        assert steps.tolist() == [case["radius_steps"]]
        assert steps.item() / 255 == pytest.approx(case["radius"], rel=1e-6)


# --- the noise ----------------------------------------------------------------------------------------------------


def test_wide_cells_have_the_short_form():
    """For lambda >= 1/2 the centre is (1[x > s] + min(s, 1)) / 2."""
    g = torch.Generator().manual_seed(0)
    for lam in (0.5, 0.8, 3.0):
        x = torch.rand(1000, generator=g, dtype=torch.float64)
        s = 2 * lam * torch.rand(1000, generator=g, dtype=torch.float64)
        torch.testing.assert_close(split(x, s, 2 * lam), ((x > s).double() + s.clamp_max(1)) / 2)
    assert split(torch.tensor([0.3]), torch.tensor([0.3]), 1.0).item() == pytest.approx(0.15)  # in the lower cell


def test_classes_change_no_more_often_than_the_perturbation_is_long():
    """P(split(x) != split(x + delta)) = delta / (2 lambda) for one pixel: the heart of the certificate."""
    lam, n, x, delta = 0.15, 40_000, 0.4, 0.07
    noise = Noise.keyed(0, torch.arange(n))
    first = Splitting(lam)(torch.full((n, 1, 1, 1), x), noise)
    second = Splitting(lam)(torch.full((n, 1, 1, 1), x + delta), noise)
    share = (first != second).double().mean().item()
    expected = delta / (2 * lam)
    assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_gradients_go_straight_through(images):
    for perturb in (Splitting(0.2), SplittingLevels(0.2)):
        x = images.clone().requires_grad_()
        noise = Noise.keyed(0, torch.arange(7), 3)
        values = perturb(x, noise)
        assert torch.equal(values, perturb(images, noise))
        (gradient,) = torch.autograd.grad(values.square().sum(), x)
        torch.testing.assert_close(gradient, 2 * values.detach())


# --- certificates -------------------------------------------------------------------------------------------------


class Edge(nn.Module):
    """Class 1 where the sum of the pixels exceeds ``edge``."""

    def __init__(self, edge):
        super().__init__()
        self.edge = edge
        self.eval()

    def forward(self, x):
        distance = x.flatten(1).sum(1, keepdim=True) - self.edge
        return torch.cat([-distance, distance], 1)


class Ripples(nn.Module):
    """A classifier that changes its mind often."""

    def __init__(self, size, classes, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.waves = nn.Parameter(60 * torch.randn(classes, size, generator=g))
        self.heights = nn.Parameter(1 + 0.5 * torch.rand(classes, generator=g))
        self.eval()

    def forward(self, x):
        return self.heights * torch.sin(x.flatten(1) @ self.waves.T)


def ball(centre, steps):
    """Grid points in [0, 255]^d within L1 distance ``steps``, and each one's distance."""
    reach = range(-steps, steps + 1)
    moves = [m for m in itertools.product(reach, repeat=len(centre)) if sum(map(abs, m)) <= steps]
    points = np.array(centre) + np.array(moves)
    inside = ((points >= 0) & (points <= 255)).all(1)
    return points[inside], np.abs(np.array(moves)).sum(1)[inside]


@pytest.mark.parametrize("size", [2, 3])
def test_dssn_by_brute_force(size):
    """No grid point in the certified ball changes the answer; just outside, some do."""
    rng = np.random.default_rng(size)
    positive = tight = 0
    for trial in range(60 if size == 2 else 40):
        levels = int(rng.integers(6, 16 if size == 2 else 11))
        classifier = Edge(rng.uniform(0, size)) if trial % 2 else Ripples(size, 3, trial)
        dssn = DSSN(classifier, levels / 510, offset_seed=trial)
        centre = rng.integers(0, 256, size)
        if trial % 2:  # near the edge
            centre = np.clip(np.rint(255 * classifier.edge / size + rng.integers(-4, 5, size)), 0, 255).astype(int)
        found = dssn.certify(row(centre.tolist()) / 255)
        steps = round(255 * found.radii.item())
        points, distances = ball(centre, steps + 1)
        answers = dssn.certify(torch.tensor(points, dtype=torch.float32).reshape(-1, 1, 1, size) / 255).classes
        changed = (answers != found.classes).numpy()
        assert not changed[distances <= steps].any()
        positive += steps > 0
        tight += bool(changed.any())
    assert positive > 10
    assert tight > 5


def test_one_level_is_the_plain_classifier():
    """L = 1: every pixel keeps its place (at 0 and 1 it moves by a quarter of a level)."""
    classifier, images = zoo.classifier("digits-standard"), to_grid(load_dataset("digits", "test")[0][:20])
    found = DSSN(classifier, 1 / 510).certify(images)
    assert torch.equal(found.classes, classifier(images).argmax(1))
    assert (found.counts.sum(1) == 1).all()
    assert (found.radii == 0).all()


def test_ssn_radius_and_failure_rate():
    """One pixel, class 1 where its cell's centre exceeds 1/2: the exact probability gives the exact radius."""
    lam, value, trials, alpha = 0.6, 0.75, 3000, 0.05
    s = torch.linspace(0, 2 * lam, 200_001, dtype=torch.float64)
    p = (split(torch.full_like(s, value), s, 2 * lam) > 0.5).double().mean().item()
    exact = 2 * lam * (p - 0.5)
    found = SSN(Edge(0.5), lam).certify(torch.full((trials, 1, 1, 1), value), Draws(15, 150, alpha), seed=5)
    failures = (found.classes == 0) | ((found.classes == 1) & (found.radii > exact))
    assert 0 < failures.double().mean() <= alpha + 3.7 * (alpha * (1 - alpha) / trials) ** 0.5
    assert (found.classes == 1).any()
    assert (found.radii[found.classes == ABSTAIN] == 0).all()


def test_dssn_is_the_same_in_any_batch_and_process(tmp_path):
    """Bit for bit, over batches, rows per call, threads and processes."""
    dssn = DSSN(zoo.classifier("digits-standard"), 0.1)
    images = to_grid(load_dataset("digits", "test")[0][:6])
    whole = dssn.certify(images)
    again = dssn.certify(images, Draws(5, 5), sample_ids=torch.arange(10, 16), seed=99)
    assert torch.equal(whole.counts, again.counts)
    for rows in (1, 7, 300):
        for i in (0, 5):
            alone = DSSN(zoo.classifier("digits-standard"), 0.1, max_rows=rows).certify(images[i : i + 1])
            assert torch.equal(alone.counts[0], whole.counts[i])
            assert torch.equal(alone.radii[0], whole.radii[i])
    script = (
        "import torch; torch.set_num_threads(3)\n"
        "from purify import zoo; from purify.certify import DSSN, to_grid; from purify.data import load_dataset\n"
        "images = to_grid(load_dataset('digits', 'test')[0][:6])\n"
        "print(DSSN(zoo.classifier('digits-standard'), 0.1).certify(images).counts.tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "3"},
    ).stdout  # fmt: skip
    assert json.loads(out) == whole.counts.tolist()


def test_dssn_runs_without_tf32(images):
    """TF32, PyTorch's default for convolutions on GPUs, errs by more than what counts as a near tie."""
    conv, seen = torch.backends.cudnn.conv, []
    classifier = TinyClassifier()
    classifier.register_forward_pre_hook(lambda *_: seen.append(conv.fp32_precision))
    before = conv.fp32_precision
    DSSN(classifier, lam=2 / 255).certify((images * 255).round() / 255)
    assert set(seen) == {"ieee"}
    assert conv.fp32_precision == before != "ieee"


def test_images_off_the_grid_are_refused():
    dssn = DSSN(TinyClassifier(), 0.05)
    on = torch.randint(256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    assert (dssn.certify(on).counts == dssn.certify(on.double().float()).counts).all()
    off = on.clone()
    off[1, 0, 2, 2] = 0.5 / 255
    with pytest.raises(ValueError, match=r"on the grid k/255; these are off it by up to 0\.5 levels"):
        dssn.certify(off)
    assert torch.equal(to_grid(on), on)
    with pytest.raises(ValueError, match=r"lambda must lie in \[0\.001961, 196\.1\]"):
        DSSN(TinyClassifier(), 0.001)
    with pytest.raises(ValueError, match="lambda must lie in"):
        DSSN(TinyClassifier(), 1e9)
    with pytest.raises(ValueError, match="lambda must be a positive number"):
        SSN(TinyClassifier(), -1.0)
