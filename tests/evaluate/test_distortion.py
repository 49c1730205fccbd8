"""Minimum distortion: linear models that have an exact one, a grid over two pixels, kills, shards and censoring."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import Linear
from kills import kill_again_and_again, lines, undisturbed
from twopixels import two_pixels

import purify
from purify.attacks import PGD, RandomNoise
from purify.cli.distortion import main
from purify.cli.merge import main as merge_command
from purify.diffusion.noise import derive_seed
from purify.evaluate import Defence, RunFolder, Samples
from purify.evaluate.bisection import CONFIRM, Bisection, Search, replay
from purify.evaluate.distortion import Distortions, median
from purify.evaluate.progress import Progress
from purify.leaderboard import read_run

SEED = 5


def search(path, defence, samples, asked):
    """Run it; what the records say of each sample, and the records."""
    with RunFolder(path, {"seed": SEED}, {}) as folder:
        Search(folder, defence, asked, SEED, 4, 64)(samples, Progress(0, shown=False))
        ends = [replay(folder, defence.name, int(i), asked.levels) for i in samples.ids]
        return ends, folder.records


@pytest.mark.parametrize(("norm", "upper"), [("Linf", 0.1), ("L2", 0.4), ("L1", 0.45)])
def test_of_a_linear_model_it_is_the_margin_over_the_dual_norm(norm, upper, tmp_path):
    model = Linear(centre=0.5)
    images = 0.45 + 0.1 * torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    value = (images.flatten(1) - 0.5) @ model.w
    labels = (value > 0).long()
    labels[3] = 1 - labels[3]  # wrong as it is
    samples = Samples(images, labels, torch.arange(10))
    dual = {"Linf": model.w.abs().sum(), "L2": model.w.norm(), "L1": model.w.abs().max()}[norm]
    exact = (value.abs() / dual).tolist()
    asked = Bisection(norm, upper, halvings=5)
    defence = Defence("linear", model, [PGD(norm, upper, steps=30, eot=1, sparsity=None)], 1, {})
    ends, records = search(tmp_path, defence, samples, asked)
    assert ends[3].high == 0
    assert ends[3].probes == 1
    for i in set(range(10)) - {3}:
        assert ends[i].high >= exact[i] - 1e-6
        assert ends[i].high <= exact[i] + 1.5 * upper / 32
        assert ends[i].high - ends[i].low == pytest.approx(upper / 32)
        assert ends[i].probes == 7
        found = records["linear", ends[i].found, i]
        assert found["predictions"] != [found["label"]]
        assert exact[i] - 1e-6 <= found[norm] <= ends[i].high + 1e-6
    assert not any(key[1] == CONFIRM for key in records)  # there is no randomness


def toy():
    """A defence with randomness, images of two pixels, and the attacks."""
    _, model, samples = two_pixels(12)
    return Defence("d", model, [RandomNoise("Linf", 0.2), PGD("Linf", 0.2, steps=15, eot=8)], 10, {}), samples


def test_of_a_randomized_defence_against_a_grid(tmp_path):
    """No point of a grid fails nearer than what was found, and few images have one that is much nearer."""
    defence, samples = toy()
    asked = Bisection("Linf", 0.2, rate=0.7, halvings=4)
    ends, records = search(tmp_path, defence, samples, asked)
    judge = derive_seed(SEED, "judge")
    cell = 0.2 / 24
    steps = cell * torch.arange(-24, 25)
    grid = torch.cartesian_prod(steps, steps)
    far = grid.abs().amax(1)
    near = []
    for x, y, i in zip(samples.images, samples.labels, samples.ids, strict=True):
        points = (x + grid.reshape(-1, 1, 1, 2)).clamp(0, 1)
        ids = i.repeat(len(points))
        with torch.no_grad():
            wrong = [defence.model(points, sample_ids=ids, draw=d, seed=judge).argmax(1) != y for d in range(10)]
        fails = torch.stack(wrong).float().mean(0) >= 0.7 - 1e-6
        near.append(float(far[fails].min()) if bool(fails.any()) else math.inf)
    highs = np.array([end.high for end in ends])
    near = np.array(near)
    assert (highs >= near - cell - 1e-6).all()
    assert np.mean(highs <= near + 2 * cell + 0.2 / 16) >= 0.75
    assert len(set(highs)) > 3
    for (_, stage, i), r in records.items():
        if stage != CONFIRM:
            assert r["broken"] == (np.mean(np.array(r["predictions"]) != r["label"]) >= 0.7)
            assert r["Linf"] <= r["eps"] + 1e-6
        else:
            image = np.load(tmp_path / "adversarial" / "d" / ends[i].found / f"{i}.npy")
            again = torch.from_numpy(image)[None]
            seed = derive_seed(derive_seed(SEED, CONFIRM), "judge")
            alone = [int(defence.model(again, sample_ids=[i], draw=d, seed=seed).argmax()) for d in range(10)]
            assert r["predictions"] == alone
    assert {r.get("by") for r in records.values()} >= {"projected", "pgd-eot", "clean"}
    cheap = next(r for r in records.values() if r.get("by") == "projected" and r["broken"])
    dear = next(r for r in records.values() if r.get("by") == "pgd-eot" and r["eps"] == 0.2)
    assert cheap["calls"] * 5 < dear["calls"]


def test_a_search_goes_on_wherever_it_was_cut(tmp_path):
    defence, samples = toy()
    asked = Bisection("Linf", 0.2, halvings=2)
    _, whole = search(tmp_path / "whole", defence, samples, asked)
    stored = (tmp_path / "whole" / "records.jsonl").read_text().splitlines(keepends=True)
    for cut in (1, len(stored) // 2, len(stored) - 3):
        path = tmp_path / f"{cut}"
        search(path, defence, samples[torch.arange(0)], asked)
        (path / "records.jsonl").write_text("".join(stored[:cut]))
        (path / "adversarial").symlink_to(tmp_path / "whole" / "adversarial")
        _, again = search(path, defence, samples, asked)
        assert list(again) == list(whole)
        assert all({**again[k], "seconds": 0} == {**whole[k], "seconds": 0} for k in whole)


def test_medians_with_censored_values():
    values = np.array([*range(1, 15), *[math.inf] * 6], dtype=float)
    found = median(values)
    assert (found.value, found.low, found.high) == (10.5, 6, math.inf)  # the 6th and the 15th of 20
    assert str(found) == "10.5 [6, more]"
    assert str(median(np.full(9, math.inf))) == "more [more, more]"
    assert (median(np.array([2.0])).low, median(np.array([2.0])).high) == (0, math.inf)
    some = Distortions(values, 14.0, 0.0, None)
    assert some.unbroken == 6
    assert some.left(14.0).value == pytest.approx(0.3)
    assert some.left(0.0).value == 1.0


@pytest.mark.parametrize(("n", "share"), [(25, 0.5), (60, 0.5)])
def test_the_interval_of_a_median_covers_it(n, share):
    g = np.random.default_rng(0)
    found = [median(g.exponential(size=n)) for _ in range(400)]
    covered = np.mean([m.low <= math.log(2) <= m.high for m in found])
    assert covered >= 0.94


# --- on the command line ------------------------------------------------------------------------------------------

TINY = [
    *("--n-examples", "12", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--batch-size", "2"),
    *("--steps", "2", "--threads", "1", "--noise-level", "constant", "--halvings", "2"),
]
whole = undisturbed(main, TINY)


def test_kills_leave_the_same_records(whole, tmp_path):
    kill_again_and_again(main, "purify.cli.distortion", TINY, tmp_path / "killed", 4)
    assert main([*TINY, "--out", str(tmp_path / "killed")]) == 0
    assert lines(tmp_path / "killed") == lines(whole)
    both = [json.loads((path / "result.json").read_text())["distortion"] for path in (whole, tmp_path / "killed")]
    assert both[0] == both[1]
    assert set(both[0]) == {"undefended", "diffpure", "adversarial training"}
    assert len(both[0]["diffpure"]["values"]) == 12


def test_shards_and_python_give_the_same(whole, tmp_path, capsys):
    run = tmp_path / "run"
    for shard in ("1/2", "2/2"):
        assert main([*TINY, "--shard", shard, "--out", str(run)]) == 0
    assert merge_command([str(run)]) == 0
    said = capsys.readouterr().out
    assert f"purify distortion --config {run / 'run.yaml'}" in said
    assert lines(run) == lines(whole)
    found = purify.MinimumDistortion.from_yaml(run / "run.yaml").run(progress=False)
    stored = json.loads((whole / "result.json").read_text())["distortion"]["diffpure"]
    assert found["diffpure"].median.value == stored["median"]["value"]
    assert found["diffpure"].confirmed.value == stored["confirmed"]["value"]
    assert (run / "distortion.png").stat().st_size > 1000


def test_the_table_says_what_it_is(whole, capsys):
    assert main([*TINY, "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "This is a REDUCED budget" in said
    assert "digits, Linf up to eps 0.6, 12 samples" in said
    assert "Radii are multiples of 0.15; 'more' is more than 0.6" in said
    assert "left at 0.6, %" in said
    with pytest.raises(ValueError, match="is a search for minimum distortions"):
        read_run(whole)
    assert main([*TINY, "--dry-run", "--out", str(whole.parent / "none")]) == 0
    assert "At most about" in capsys.readouterr().out
    assert not (whole.parent / "none").exists()
