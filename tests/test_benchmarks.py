"""The scripts under benchmarks/ do what they say. What depends on the clock is not tested."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script

from purify import zoo
from purify.certify import Anytime, Draws, OneShotDenoised, denoised_smoothing
from purify.data import load_dataset
from purify.evaluate import Estimate, budgets
from purify.evaluate.metrics import worst_mean
from purify.leaderboard.links import portable


def test_gradient_fidelity(tmp_path, capsys):
    """What does not depend on the clock: errors, network calls, memory, files."""
    script = load_script("gradient_fidelity")
    arguments = ["--steps", "4", "20", "--batch-size", "3", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    found = json.loads((tmp_path / "fidelity.json").read_text())
    rows = {(r["engine"], r["steps"]): r for r in found["rows"]}
    for steps in (4, 20):
        assert rows["full", steps]["network_calls"] == steps
        assert rows["checkpoint", steps]["network_calls"] == 2 * steps
        assert rows["checkpoint, half fits", steps]["network_calls"] == 2 * steps - steps // 2
        assert rows["full", steps]["relative_error"] < 1e-5
        assert rows["checkpoint", steps]["relative_error"] == rows["full", steps]["relative_error"]
        assert rows["bpda", steps]["cosine"] < rows["adjoint (SDE)", steps]["cosine"] < 0.9999
        assert rows["adjoint (ODE)", steps]["cosine"] < 1
    assert rows["checkpoint", 20]["peak_bytes"] < 1.3 * rows["checkpoint", 4]["peak_bytes"]
    assert rows["full", 20]["peak_bytes"] > 3 * rows["full", 4]["peak_bytes"]
    half = rows["checkpoint, half fits", 20]["peak_bytes"] / rows["full", 20]["peak_bytes"]
    assert 0.4 < half < 0.65
    if importlib.util.find_spec("torchsde") is not None:
        assert rows["torchsde adjoint (DiffPure)", 20]["relative_error"] > 0.05
        assert rows["torchsde, ended at t = 1e-3", 20]["relative_error"] > 0.01
    assert (tmp_path / "fidelity.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "relative error of full, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--device", "cuda:9"], ["--t-star", "0"], ["--steps", "0"]])
def test_gradient_fidelity_refuses_bad_input(arguments, tmp_path, capsys):
    assert load_script("gradient_fidelity").main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_peers_reference_is_its_own_forward_process():
    """Our published-variant SDE on torchsde's increments gives torchsde's forward result."""
    torchsde = pytest.importorskip("torchsde")
    import torch

    script = load_script("gradient_fidelity")
    from purify import zoo
    from purify.data import load_dataset
    from purify.diffusion.reverse import EulerMaruyama

    images, labels = load_dataset("digits", "test")
    setting = script.Setting(
        zoo.score_model("digits"), zoo.classifier("digits-standard"), images[:2], labels[:2], 0.02, 20
    )
    peer = script.Peer(setting)
    start = peer.diffuse(2 * setting.x - 1)
    sde = script.ReverseSDE(setting.model, setting.x.shape[1:])
    with torch.no_grad():
        theirs = torchsde.sdeint(sde, start.flatten(1), peer.times, bm=peer.path, method="euler", dt=peer.dt)[-1]
        u, t = start, peer.times[0]
        while t < peer.times[-1]:
            following = torch.minimum(t + peer.dt, peer.times[-1])
            z = (peer.path(t, following) / (following - t).sqrt()).reshape(u.shape)
            now, then = ((1 - v.double()).expand(2) for v in (t, following))
            u = EulerMaruyama()(setting.model, u, now, then, z)
            t = following
    torch.testing.assert_close(theirs.reshape(u.shape), u, rtol=1e-4, atol=1e-4)


def test_throughput(tmp_path):
    """Network calls of mixed noise levels: the sum of the samples' steps, however they are batched."""
    script = load_script("throughput")
    out = tmp_path / "t.json"
    arguments = ["--samples", "64", "--attacked", "8", "--batch", "24", "--repeats", "1", "--threads", "1"]
    assert script.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["calls to sum of steps"] == 1
    assert found["calls with the score norm, to steps + draws"] == 1
    assert found["mean to longest"] < found["calls to padding"] < 1  # padding is per chunk of 24
    assert script.main(["--samples", "0"]) == 2


def test_engine_overhead(tmp_path, capsys):
    """The passes that are run bare are those that a gradient takes."""
    script, out = load_script("engine_overhead"), tmp_path / "o.json"
    few = [
        "--datasets",
        "digits",
        "--batch-size",
        "1",
        "--repeats",
        "1",
        "--purifiers",
        "diffpure",
        "agdm",
        "likelihood",
    ]
    assert script.main([*few, "--out", str(out)]) == 0
    passes = {row["purifier"]: row["passes"] for row in json.loads(out.read_text())["rows"]}
    assert passes["diffpure"] == {"score forward": 10, "score backward": 10}
    guide = {"guide forward": 1 + 2 * 10, "guide backward": 1 + 2 * 10, "guide twice": 10}
    assert passes["agdm"] == {**guide, "score forward": 10, "score backward": 10}
    assert passes["likelihood"] == {"score forward": 20, "score backward": 20, "score twice": 10}
    assert "digits, agdm: checkpoint, own" in capsys.readouterr().out
    assert script.main(["--purifiers", "nothing", "--out", str(out)]) == 2


def test_attack_speed(tmp_path, monkeypatch):
    """Both ask for the same gradients, however they are batched; ours also looks at one image and the last iterate."""
    script = load_script("attack_speed")
    seen = []
    forward = script.DefendedClassifier.forward

    def counted(self, x, **keys):
        seen.append((len(x), x.requires_grad, any(p.requires_grad for p in self.parameters())))
        return forward(self, x, **keys)

    monkeypatch.setattr(script.DefendedClassifier, "forward", counted)
    out = tmp_path / "t.json"
    arguments = ["--batches", "1,3", "--steps", "2", "--eot", "4", "--repeats", "1", "--reverse-steps", "2"]
    assert script.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    peers = (script.PEER, script.PEER_WEIGHTS)
    assert [(r["batch"], r["peer"]) for r in rows] == [(n, p) for n in (1, 3) for p in peers]
    x, y = (t[:3] for t in script.load_dataset("digits", "test"))
    works = script.build_works(script.parser().parse_args(arguments), x, y)
    calls = {}
    for name, work in works.items():
        seen.clear()
        work()
        calls[name] = list(seen)
    assert calls[script.OURS] == [(1, False, False), *[(12, True, False)] * 2, (12, False, False)]
    assert calls[script.PEER] == [(3, True, False)] * 8
    assert calls[script.PEER_WEIGHTS] == [(3, True, True)] * 8
    assert script.main(["--batches", "0"]) == 2


def test_certify_draws_counts_what_certificates_take(tmp_path, capsys):
    """On replayed votes certificates are those of the network, calls too; the table says the mean."""
    script, votes = load_script("certify_draws"), tmp_path / "votes.npy"
    arguments = ["--samples", "3", "--draws", "400", "--threads", "1", "--radii", "0,0.25", "--votes", str(votes)]
    assert script.main(arguments) == 0
    first = capsys.readouterr().out
    images = load_dataset("digits", "test")[0][:3]
    smooth = denoised_smoothing(zoo.classifier("digits-standard"), zoo.score_model("digits"), 0.25)
    draws = Draws(100, 400, stop=Anytime((0.0, 0.25)))
    found = smooth.certify(images, draws)
    replayed = script.Replay(smooth.classifier, 0.25, votes=np.load(votes)[0]).certify(images, draws)
    assert torch.equal(replayed.hits, found.hits)
    assert torch.equal(replayed.draws, found.draws)
    assert f" {found.draws.double().mean():.0f} " in first
    assert script.main(arguments) == 0  # from the votes kept
    assert capsys.readouterr().out == first
    assert script.main([*arguments, "--draws", "300"]) == 2
    assert "holds votes of shape (1, 3, 500)" in capsys.readouterr().err
    cascade = ["--samples", "2", "--draws", "200", "--sigma", "0.25,0.7", "--radii", "0"]
    assert script.main(cascade) == 0
    assert "in looks" not in capsys.readouterr().out


def test_certify_speed(tmp_path, monkeypatch):
    """Ours, the plain loop and the bare passes classify equally many noisy images, and give the same answers."""
    script = load_script("certify_speed")
    seen = []
    forward = OneShotDenoised.forward
    monkeypatch.setattr(OneShotDenoised, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    out = tmp_path / "t.json"
    arguments = ["--samples", "2", "--draws", "300", "--plain-batch", "250", "--max-rows", "128", "--repeats", "1"]
    assert script.main([*arguments, "--sigma", "0.1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ratio = found["plain loop, seconds per image"] / found["ours, seconds per image"]
    assert found["images per second, ours to plain loop"] == pytest.approx(ratio)
    answers, rows = {}, {}
    for name, work in script.build_works(script.parser().parse_args([*arguments, "--sigma", "0.1"])).items():
        seen.clear()
        answers[name], rows[name] = work(), list(seen)
    for system in ("cascade", "cohen", "ssn"):
        works = script.build_works(script.parser().parse_args([*arguments[:2], "--draws", "20", "--system", system]))
        assert list(works)[-2:] == [script.OURS, script.BARE]
        works[script.OURS]()
    assert rows[script.PLAIN] == [100, 250, 50] * 2
    assert rows[script.SAME_BATCH] == [100, 128, 128, 44] * 2
    assert rows[script.OURS] == [100, 100, 120, 120, 120, 120, 120]
    assert max(rows[script.BARE]) == 128
    assert {sum(r) for r in rows.values()} == {800}
    labels = script.load_dataset("digits", "test")[1][:2].tolist()
    assert answers[script.OURS] == answers[script.PLAIN] == answers[script.SAME_BATCH] == labels
    assert script.main(["--samples", "0"]) == 2


def test_library_attacks(tmp_path, capsys):
    """The whole script on a tiny budget; it resumes."""
    script = load_script("library_attacks")
    arguments = ["--samples", "4", "--steps", "1", "--eot", "2", "--queries", "2", "--judge-draws", "3"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    first = (tmp_path / "result.json").read_text()
    rows = {r["name"]: r for r in json.loads(first)["rows"]}
    peers = ["torchattacks-2-0.075", "torchattacks-2-0.75", "autoattack-rand", "square"]
    if script.INTEROP:
        peers += ["foolbox-2-0.075", "foolbox-1-0.075", "foolbox-1-0.01", "art-1-0.075"]
    assert list(rows) == ["clean", "pgd-eot", "apgd-margin-eot", "adaptive", "our worst case", *peers]
    worst = rows["our worst case"]["accuracy"]["value"]
    for name in peers:
        gap = rows[name]["difference"]
        assert gap["value"] == pytest.approx(worst - rows[name]["accuracy"]["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
        other = rows["adaptive"]["accuracy"]["value"] - rows[name]["accuracy"]["value"]
        assert rows[name]["adaptive"]["value"] == pytest.approx(other)
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0  # everything is on disk
    assert (tmp_path / "result.json").read_text() == first
    assert "at most square" in capsys.readouterr().out
    assert script.main(["--samples", "0"]) == 2


def test_torchattacks_is_run_as_it_is():
    """The images are those of torchattacks.EOTPGD under the same seed of torch's generator, which is left as it was."""
    import torch
    import torchattacks

    from purify.diffusion.noise import derive_seed

    script = load_script("library_attacks")
    attack = script.TorchattacksPGD("Linf", 0.3, steps=3, eot=2, size=0.1)
    model = script.build_model(0.18)
    images, labels = (t[:5] for t in script.load_dataset("digits", "test"))
    before = torch.get_rng_state()
    found = attack(model, images, labels, sample_ids=torch.arange(10, 15), seed=3).images
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(derive_seed(derive_seed(3, attack.name), *range(10, 15)))
    assert torch.equal(found, torchattacks.EOTPGD(model, 0.3, 0.1, 3, 2)(images, labels))


def predictions_of(job):
    """Whether each image of a noise_levels job was right in each draw, stage by stage, from its records."""
    records = [json.loads(line) for line in (job.folder().path / "records.jsonl").read_text().splitlines()]
    for stage in dict.fromkeys(r["attack"] for r in records):
        found = sorted((r["sample"], r["predictions"], r["label"]) for r in records if r["attack"] == stage)
        yield np.array([np.array(answers) == label for _, answers, label in found])


def test_noise_levels(tmp_path, capsys, monkeypatch):
    """The whole script on a tiny budget: runs, resumes, table and plot."""
    script = load_script("noise_levels")
    tiny = replace(budgets.BUDGETS["quick"], steps=1, eot=1, n_examples=4, judge_draws=2)
    monkeypatch.setitem(budgets.BUDGETS, "quick", tiny)
    monkeypatch.setitem(script.CONSTANTS, "digits", (0.1, 0.2))
    monkeypatch.setitem(script.SSNI, "digits", script.SSNI["digits"][:1])
    monkeypatch.setattr(script, "map_jobs", lambda jobs, workers: [job() or job for job in jobs])
    arguments = ["--preset", "quick", "--seeds", "0,1", "--n-examples", "4", "--steps", "2", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    first = (tmp_path / "digits" / "result.json").read_text()
    points = json.loads(first)["points"]
    assert [p["name"].split("(")[0] for p in points] == ["constant", "constant", "ssni-l"]
    assert all(p["worst"]["value"] <= p["attacks"]["pgd-eot"]["value"] for p in points)
    ssni = ["pgd-eot", "pgd-eot-constant-t", "pgd-eot-norm(0.3)", "pgd-eot-low-level(1)"]
    assert [list(p["attacks"]) for p in points[1:]] == [list(points[0]["attacks"]), ssni]
    assert len(points[0]["attacks"]) == len(ssni)
    groups = script.build_jobs(script.parser().parse_args(arguments))
    assert [job.samples().ids.tolist() for job in groups[0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for point, group in zip(points, groups, strict=True):
        found = [predictions_of(job) for job in group]
        worst = np.concatenate([worst_mean(list(stages)) for stages in found])
        assert point["worst"]["value"] == pytest.approx(worst.mean())
    for point, attack in ((points[2], "pgd-eot-constant-t"), (points[0], "pgd-eot")):
        gap = point["attacks"][attack]["value"] - point["worst"]["value"]
        assert point["flattered"]["value"] == pytest.approx(gap)
    assert (tmp_path / "digits" / "curve.png").stat().st_size > 10_000
    assert script.main(arguments) == 0  # everything is on disk
    assert (tmp_path / "digits" / "result.json").read_text() == first
    out = capsys.readouterr().out
    assert "above curve" in out
    gaps = [f"{100 * (points[2][k]['value'] - points[0][k]['value']):.1f} [" for k in ("clean", "worst")]
    line = out[out.index("paired by image") :].splitlines()[2]
    assert line.startswith(points[0]["name"])
    assert all(gap.lstrip("-") in line for gap in gaps)
    for bad in (["--seeds", "0,0"], ["--seeds", "-1"], ["--seeds", "a"], ["--steps", "0"], ["--norm-weight", "nan"]):
        assert script.main([*bad, "--out", str(tmp_path / "bad")]) == 2
        assert not (tmp_path / "bad" / "digits").exists()


def test_above_the_curve_by_hand():
    """A point at the clean accuracy midway between two constants lies above the curve by what it exceeds the middle."""
    script = load_script("noise_levels")
    n = 400

    def point(varies, clean, worst):
        values = {"clean": (np.arange(n) < clean * n) * 1.0, "worst": (np.arange(n) < worst * n) * 1.0}
        e = Estimate(clean, clean, clean)
        return script.Point("p", varies, e, {}, e, 0.1, 0.1, 1, values, e)

    constants = [point(False, 0.9, 0.1), point(False, 0.7, 0.3), point(False, 0.2, 0.35)]
    above = point(True, 0.8, 0.25)
    found = script.above_curve(above, [*constants, above])
    assert found.value == pytest.approx(0.05)
    assert 0.02 < 0.05 - found.low < 0.06
    assert 0.02 < found.high - 0.05 < 0.06
    # Paired: what equals a constant on every image lies on the curve in every resampling.
    same = script.above_curve(point(True, 0.7, 0.3), constants)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert script.above_curve(point(True, 0.95, 0.25), constants) is None
    near = point(True, 0.895, 0.25)
    near.values["clean"] = near.values["clean"][::-1]  # wrong on other images: often beyond the curve when resampled
    assert script.above_curve(near, constants) is None


def test_score_norms(tmp_path, capsys):
    """AUROC of the embedded norm by brute force over all pairs; larger radii stand out more."""
    import torch

    script = load_script("score_norms")
    found = {"clean": torch.tensor([1.0, 2.0, 3.0, 2.5]), "attacked": torch.tensor([2.5, 2.6, 0.5, 4.0])}
    pairs = [(a > c) + 0.5 * (a == c) for a in found["attacked"].tolist() for c in found["clean"].tolist()]
    assert script.table(found).loc["attacked", "AUROC"] == pytest.approx(np.mean(pairs))
    arguments = ["--n-examples", "6", "--attack-steps", "5", "--eot", "1", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [r["images"] for r in rows[:2]] == ["clean", "pgd, eps 0.03"]
    assert rows[0]["AUROC"] is None
    assert rows[4]["AUROC"] == 1
    assert rows[0]["mean norm"] < rows[1]["mean norm"] < rows[2]["mean norm"]
    assert rows[5]["mean norm"] > 1.1 * rows[0]["mean norm"]
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert "AUROC" in capsys.readouterr().out
    assert script.main(["--n-examples", "1"]) == 2
    assert script.main(["--n-examples", "501"]) == 2
    assert script.main(["--dataset", "cifar10"]) == 2


def test_scaling(tmp_path, capsys, monkeypatch):
    """Ratios by hand; two processes are held to 1.7 of one with as many threads as each."""
    script = load_script("scaling")
    speed = {(1, 4): 5.0, (1, 2): 4.0, (2, 2): 6.0, (4, 1): 10.0}
    monkeypatch.setattr(script, "measure", lambda k, t, n, folder: speed[k, t])
    out = tmp_path / "s.json"
    assert script.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text())["samples per second"]["2x2"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x 4 threads: 5.00 samples/s"
    assert lines[2] == "2 x 2 threads: 6.00 samples/s, 1.20 of 1 x 4, 1.50 of 1 x 2 (LESS THAN 1.7)"
    assert lines[3].endswith("2.00 of 1 x 4, 2.50 of 1 x 2")
    assert script.main(["--runs", "1x4,2"]) == 2
    assert script.main(["--runs", "0x4"]) == 2


WORKS = {
    "attack_speed": "times",
    "certify_speed": "build_works",
    "engine_overhead": "measure",
    "gradient_fidelity": "measure",
    "guidance_overhead": "measure",
    "released_attacks": "measure",
    "scaling": "measure",
    "score_norms": "adversarial",
    "throughput": "measure",
}


@pytest.mark.parametrize("name", WORKS)
def test_results_that_cannot_be_written_are_noticed_before_any_work(name, capsys, monkeypatch):
    script = load_script(name)
    monkeypatch.setattr(script, WORKS[name], lambda *args, **kwargs: pytest.fail("it measured first"))
    assert script.main(["--out", "/proc/x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: /proc/x")
    assert "cannot be written (" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("throughput", ["--samples", "2", "--attacked", "5"], "--attacked 5 is more than the images, --samples 2"),
        ("throughput", ["--samples", "501"], "digits has 500 test images; --samples 501 is too many"),
        ("attack_speed", ["--batches", "a"], "--batches takes whole numbers separated by commas, got 'a'"),
        ("attack_speed", ["--batches", "4,0"], "every number in --batches must be a whole number of at least 1, got 0"),
    ],
)
def test_benchmarks_refuse_bad_input(name, arguments, message, capsys, tmp_path):
    assert load_script(name).main([*arguments, "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == f"error: {message}.\n"


def test_released_attacks_are_of_other_models_and_judged_behind_the_defence(tmp_path, capsys):
    """Every registered one weakens the model that it attacks, and never the one that judges."""
    script, out = load_script("released_attacks"), tmp_path / "r.json"
    for name, (_, weaken) in script.RELEASED.items():
        defence = script.build_purifier(name, None, "digits")
        assert weaken(defence).config() != defence.config()
    few = ["--images", "2", "--steps", "1", "--eot", "1", "--draws", "1", "--purifiers", "diffap"]
    assert script.main([*few, "--out", str(out)]) == 0
    assert set(json.loads(out.read_text())["diffap"]) == {"clean", "released (no guidance)", "exact"}
    assert "diffap; clean" in capsys.readouterr().out
    assert script.main(["--purifiers", "gdmp"]) == 2
    assert "Unknown purifier 'gdmp'; known: diffap" in capsys.readouterr().err


def test_the_gpu_script_runs_at_toy_size(tmp_path, monkeypatch):
    """All sections but the peers' run on the CPU; one that failed stands as an error in gpu.json."""
    pytest.importorskip("torchsde")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = load_script("gpu")
    assert script.main(["--toy", "--out", str(tmp_path), "--only", "memory per step", "waits", "certification"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "error" not in json.dumps(report).lower()
    assert "not asked" in (tmp_path / "gpu.md").read_text()


def test_half_precision_is_held_against_float64(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script, out = load_script("precision_speed"), tmp_path / "p.json"
    assert script.main(["--toy", "--systems", "digits", "--repeats", "1", "--out", str(out)]) == 0
    whole, half = json.loads(out.read_text())["rows"]
    assert (whole["precision"], half["precision"]) == ("float32", "bf16")
    for what in ("cosine", "cosine, purification"):
        assert 0.99 < half[what] < 1 - 1e-6 < whole[what]
    assert whole["time to float32"] == 1
    assert "ok   digits, bf16: cosine 0.9" in capsys.readouterr().out
    row = {"system": "fashion_mnist", "precision": "bf16", "time to float32": 0.8, "cosine": 0.9}
    assert [line[:4] for line in script.verdicts([row])] == ["MISS", "MISS"]


def test_the_dry_run_predicts_memory_within_a_quarter(tmp_path, monkeypatch, capsys):
    """Guidance and noise levels that hold graphs of their own among them; times depend on the clock."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script, out = load_script("dry_run"), tmp_path / "d.json"
    monkeypatch.setattr(script.dryrun, "seconds", script.dryrun.seconds)  # put back what the script replaces
    tiny = ["--datasets", "digits", "--batch-size", "6", "--steps", "4", "--repeats", "1", "--out", str(out)]
    assert script.main([*tiny, "--purifiers", "diffpure", "agdm", "ssni-l"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 9
    for row in rows:
        assert 0.75 <= row["memory, said to taken"] <= 1.25, row
    assert "ok   memory, said to taken: 9 of 9 within 25%" in capsys.readouterr().out


def test_attack_budgets_are_measured_once_and_resumed(tmp_path, capsys):
    script = load_script("attack_budget")
    options = ["--systems", "diffpure", "--images", "2", "--steps", "2", "--eot", "1", "--judge-draws", "10"]
    command = [*options, "--rows", "adaptive 1/2,pgd-eot 2", "--out", str(tmp_path)]
    assert script.main([*command, "--minutes", "0"]) == 0
    assert "goes on from here" in capsys.readouterr().out
    script.main(command)
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "attack_budget.json").read_text())["rows"]
    names = {row["attack"]: row for row in found}
    assert set(names) == {"adaptive 1/25", "adaptive 1/2", "pgd-eot 2 x 1"}
    assert names["pgd-eot 2 x 1"]["calls"] == 2 * 33 + 11
    assert names["pgd-eot 2 x 1"]["minus pgd-eot"] is None
    assert (tmp_path / "attack_budget.png").exists()
    script.main(command)
    again = capsys.readouterr().out
    assert "s\n" in first.partition("###")[0]
    assert again.startswith("###")


def test_leaderboard_runs_are_commands_that_can_be_given(tmp_path):
    """Every run's options make an evaluation; each has a folder of its own, and what is kept is not run again."""
    from purify.cli.attack import parser
    from purify.cli.parsing import described
    from purify.evaluate.description import Evaluation

    script = load_script("leaderboard_runs")
    runs = list(script.runs(["digits", "fashion_mnist"], []))
    assert len({run.name for run in runs}) == len(runs) == 2 * len(script.SYSTEMS)
    for run in runs:
        asked = described(Evaluation, parser().parse_args(run.command(tmp_path)[4:]))
        assert (asked.dataset, asked.purifier) == (run.dataset, (run.purifier,))
        assert asked.n_examples == script.IMAGES[run.dataset]
        (tmp_path / run.name).mkdir()
    assert script.main(["--keep", str(tmp_path), "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_kept_runs_do_not_name_folders_of_a_machine(tmp_path):
    run, kept = tmp_path / "made" / "digits-a", tmp_path / "kept"
    (run / "adversarial").mkdir(parents=True)
    (run / "run.yaml").write_text(f"seed: 0\nout: {run}\n")
    (run / "manifest.json").write_text(json.dumps({"sessions": [{"command": f"--out {run} --seed 0"}]}))
    load_script("leaderboard_runs").keep(run, kept)
    assert (kept / "run.yaml").read_text() == "seed: 0\nout: digits-a\n"
    assert json.loads((kept / "manifest.json").read_text())["sessions"][0]["command"] == "--out digits-a --seed 0"
    published = Path(__file__).parents[1] / "docs" / "leaderboard" / "runs"
    for file in (*published.glob("*/run.yaml"), *published.glob("*/manifest.json")):
        assert portable(file.read_text()) == file.read_text(), file


def test_protocols_cost(capsys):
    """The run's gradients are those of its attack, and the protocols' of theirs."""
    tiny = ["--n-examples", "2", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2"]
    assert load_script("protocols_cost").main([*tiny, "--attacks", "pgd-eot", "--threads", "1"]) == 0
    run, protocols, total = capsys.readouterr().out.splitlines()[-3:]
    # undefended and adversarially trained 2, purified 2 x 2; known noise 2 runs of 2, answers of eight 1, if not broken
    own, more = float(run.split()[1]), float(protocols.split()[1])
    assert own == 2 + 2 + 4
    assert 0 < more <= 4 + 1
    assert total.startswith(f"with all protocols {1 + more / own:.2f} times the gradients")
