"""The certification benchmark: kills, shards, tables by hand; attacks inside the radius fail, outside they do not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import count, kill_again_and_again, lines
from torch import nn

from purify import zoo
from purify.attacks.norms import BALLS
from purify.certify import (
    ABSTAIN,
    DSSN,
    SSN,
    Anytime,
    Cascade,
    Certifier,
    Draws,
    Smooth,
    denoised_smoothing,
    dense_smoothing,
    to_grid,
)
from purify.certify.metrics import linf_share
from purify.cli.certify import main
from purify.data import load_dataset
from purify.evaluate import RunFolder, Samples
from purify.evaluate.certification import CERTIFICATE, Inside, System, attack, certificates, certify_all, summarize
from purify.train.loop import Hyper, train
from purify.train.losses import SplittingLoss

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "run_certify.py"
TINY = [
    *("--method", "cohen,multiscale", "--sigma", "0.1,0.25", "--n-examples", "20", "--selection-draws", "10"),
    *("--draws", "50", "--batch-size", "4", "--attack-examples", "10", "--attack-steps", "2", "--eot", "2"),
    *("--threads", "1"),
]


def digits(n):
    images, labels = load_dataset("digits", "test")
    return Samples(to_grid(images[:n]), labels[:n], torch.arange(n))


@pytest.fixture(scope="module")
def splitting_classifier():
    """A linear classifier trained on splitting noise for a moment."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module[1].reset_parameters()
    return train(module, SplittingLoss(0.5), *load_dataset("digits", "train"), Hyper(steps=400, lr=1e-2, warmup=10))


# --- attacks inside the radius ------------------------------------------------------------------------------------


def systems(classifier) -> list[Certifier]:
    standard, score = zoo.classifier("digits-standard"), zoo.score_model("digits")
    scales = [denoised_smoothing(standard, score, s) for s in (0.1, 0.25)]
    dense = dense_smoothing(standard, score, 0.25, votes=2, steps=1)
    return [scales[1], Cascade(tuple(scales)), dense, SSN(classifier, 0.5), DSSN(classifier, 0.5)]


def test_pgd_inside_the_radius_never_succeeds_and_outside_it_does(splitting_classifier):
    """Within each certificate's radius no answer changes; the same attack four times as far changes many."""
    samples, inside = digits(6), Inside(6, 8, 8)
    for certifier in systems(splitting_classifier):
        system = System("s", certifier, Draws(50, 300), inside, {})
        records = list(certificates(system, samples, seed=0))
        positive = [i for i, r in enumerate(records) if r["radius"] > 0]
        assert len(positive) >= 3, certifier.config()
        changed = 0
        for i in positive:
            for stage in system.stages()[1:]:
                found, image = attack(system, stage, samples[torch.tensor([i])], records[i], seed=0)
                assert not found["refuted"]
                assert found["distance"] <= records[i]["radius"] * (1 + 1e-6)
                assert found["distance"] > 0.5 * records[i]["radius"] or certifier.norm == "L1"
                assert np.abs(image).max() <= 1
            further = {**records[i], "radius": 4 * records[i]["radius"]}
            changed += attack(system, stage, samples[torch.tensor([i])], further, seed=0)[0]["predictions"] != [
                records[i]["predictions"][0]
            ]
        assert changed >= len(positive) / 4, certifier.config()


def test_no_certified_image_of_twenty_four_is_changed(splitting_classifier):
    """The standing test: PGD inside the radius of every certificate, of each kind and way of sampling."""
    scales = tuple(Smooth(splitting_classifier, s) for s in (0.1, 0.25))
    fixed, radii = Draws(50, 500, 0.01), Anytime((0.0, 0.1))
    anytime = replace(fixed, stop=radii)
    samples, attacks = digits(24), 0
    for certifier, draws in (
        *((c, d) for c in (scales[1], Cascade(scales)) for d in (fixed, anytime)),
        (SSN(splitting_classifier, 0.5), fixed),
        (SSN(splitting_classifier, 0.5), anytime),
        (DSSN(splitting_classifier, 0.25), fixed),
    ):
        system = System("s", certifier, draws, Inside(24, 5, 4), {})
        records = list(certificates(system, samples, seed=0))
        certified = [i for i, r in enumerate(records) if r["radius"] > 0]
        assert len(certified) > 12, certifier.config()
        for i in certified:
            for stage in system.stages()[1:]:
                assert not attack(system, stage, samples[torch.tensor([i])], records[i], seed=0)[0]["refuted"]
                attacks += 1
    assert attacks > 150


def test_a_false_certificate_is_refuted():
    """The cross-check can fail: a system whose radii are ten times too large."""
    scale = denoised_smoothing(zoo.classifier("digits-standard"), zoo.score_model("digits"), 0.1)

    class Boast(Certifier):
        norm = "L2"

        def certify(self, images, draws=None, **keys):
            found = scale.certify(images, draws, **keys)
            return replace(found, radii=10 * found.radii)

        def noisy_models(self):
            return scale.noisy_models()

        def config(self):
            return {}

    system, samples = System("boast", Boast(), Draws(50, 500), Inside(6, 10, 8), {}), digits(6)
    records = list(certificates(system, samples, seed=0))
    stage = system.stages()[1]
    found = [attack(system, stage, samples[torch.tensor([i])], r, seed=0)[0]["refuted"] for i, r in enumerate(records)]
    assert sum(found) >= 3


def test_dssn_images_stay_on_the_grid_and_in_the_ball(splitting_classifier):
    dssn, image = DSSN(splitting_classifier, 0.5), digits(1).images
    g = torch.Generator().manual_seed(0)
    for steps in (0, 1, 7, 60):
        radius = steps / 255
        near = BALLS["L1"].project(image + 0.1 * torch.randn(image.shape, generator=g), image, radius)
        found = dssn.covered(near, image, radius)
        moved = 255 * (found - image).double()
        assert float((moved - moved.round()).abs().max()) < 1e-3
        assert steps - 1 <= round(float(moved.abs().sum())) <= steps


def test_linf_radii_are_of_cubes_inside_the_certified_balls():
    """The corner of the cube of a radius lies on the ball, the one of a larger cube does not."""
    for norm in ("L2", "L1"):
        for d in (1, 64, 784):
            corner = torch.full((1, d), linf_share(norm, d), dtype=torch.float64)
            length = BALLS[norm].distance(corner.reshape(1, 1, 1, d))
            assert float(length) == pytest.approx(1)
    with pytest.raises(ValueError, match="Unknown norm of a certificate 'Linf'"):
        linf_share("Linf", 3)


# --- the runner ---------------------------------------------------------------------------------------------------


def test_records_and_summary_by_hand(tmp_path, splitting_classifier):
    samples = digits(10)
    system = System("dssn", DSSN(splitting_classifier, 0.5), Draws(), Inside(3, 2, 2), {})
    folder = RunFolder(tmp_path, {}, {})
    certify_all(folder, [system], samples, batch_size=4, progress=False)
    assert len(lines(tmp_path)) == 10 + 3
    exact = system.certifier.certify(samples.images)
    for i in range(6):
        record = folder.get("dssn", CERTIFICATE, i)
        assert record["predictions"] == [int(exact.classes[i])]
        assert record["radius"] == float(exact.radii[i])
        assert record["counts"] == exact.counts[i].tolist()
    right = (exact.classes == samples.labels).double()
    found = summarize(folder, system, samples, [0.0, 0.2])
    assert found.certified[0].value == pytest.approx(right.mean().item())
    assert found.certified[1].value == pytest.approx((right * (exact.radii >= 0.2)).mean().item())
    assert found.acr.value == pytest.approx((right * exact.radii).mean().item())
    assert found.acr.low <= found.acr.value <= found.acr.high
    assert found.abstained.value == 0
    assert found.draws == 255
    assert (found.attacked, found.refuted) == (int((exact.radii[:3] > 0).sum()), 0)
    folder.get("dssn", CERTIFICATE, 3)["label"] += 1
    with pytest.raises(ValueError, match=r"sample 3 \(dssn\) .* changed by hand"):
        summarize(folder, system, samples, [0.0])


def test_batches_do_not_change_records(tmp_path):
    for size in (1, 7):
        arguments = [*TINY, "--n-examples", "8", "--batch-size", str(size), "--out", str(tmp_path / str(size))]
        assert main(arguments) == 0
    assert lines(tmp_path / "1") == lines(tmp_path / "7")


def test_four_kills_leave_the_same_records(tmp_path):
    """SIGKILL at random moments, each time the same command again, and at last in peace."""
    assert main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    kill_again_and_again(main, "purify.cli.certify", TINY, tmp_path / "killed", 4)
    assert 0 < count(tmp_path / "killed") < count(tmp_path / "whole")
    assert main([*TINY, "--out", str(tmp_path / "killed")]) == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    whole, killed = (json.loads((tmp_path / f / "result.json").read_text())["results"] for f in ("whole", "killed"))
    assert whole == killed


def test_torchrun_shares_the_samples_out(tmp_path):
    """The same records as one process gives, in one file."""
    assert main([*TINY, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, BENCHMARK, *TINY, "--out", tmp_path / "many"], check=True, capture_output=True)
    assert lines(tmp_path / "many") == lines(tmp_path / "one")
    assert [p.name for p in (tmp_path / "many").glob("records*")] == ["records.jsonl"]


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_draws_curves(tmp_path, capsys):
    assert main([*TINY, "--n-examples", "6", "--linf-radii", "0,0.02", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "L_inf: certified accuracy in % at radii, from those above" in text
    assert (tmp_path / "certified-Linf.png").stat().st_size > 0
    for word in ("cohen 0.1", "cohen 0.25", "multiscale", "ACR", "abstained", "REDUCED", "changed by PGD inside"):
        assert word in text
    assert "FAILED" not in text
    assert (tmp_path / "certified-L2.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads((tmp_path / "result.json").read_text())["results"]["cohen 0.1"]
    assert result["norm"] == "L2"
    found = [r for r in lines(tmp_path) if (r["defence"], r["attack"]) == ("cohen 0.1", CERTIFICATE)]
    share = sum(r["radius"] >= 0.02 * 8 and r["predictions"] == [r["label"]] for r in found) / 6  # 64 pixels
    assert result["Linf"]["certified"][1]["value"] == pytest.approx(share)
    assert result["certified"][0]["value"] > 0.5
    assert main([*TINY, "--n-examples", "6", "--seed", "1", "--out", str(tmp_path)]) == 2
    assert "differs in seed" in capsys.readouterr().err


def test_several_denoisers_anytime_sampling_and_a_classifier_for_splitting_noise(tmp_path, capsys):
    small = ["--n-examples", "3", "--selection-draws", "10", "--draws", "64", "--threads", "1"]
    small += ["--attack-examples", "0"]
    arguments = [*small, "--sigma", "0.1", "--score-model", "digits,none", "--sampling", "anytime", "--radii", "0"]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "cohen 0.1, digits" in text
    assert "cohen 0.1, none" in text
    assert all(r["draws"] == sum(r["counts"]) + 8 or r["draws"] < 74 for r in lines(tmp_path / "a"))
    old = [*small, "--sigma", "0.1", "--score-model", "digits,none", "--stop-radius", "0", "--looks", "3"]
    assert main([*old, "--out", str(tmp_path / "a")]) == 0  # the same run
    assert "note: --stop-radius 0 is now called --sampling anytime --radii 0, and needs" in capsys.readouterr().err
    model = ["--method", "ssn,dssn", "--model", "digits-standard"]
    assert main([*small, *model, "--lam", "0.05", "--out", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "dssn" in text
    assert "REDUCED" in text
    exact = [*small[:2], *small[6:], "--method", "dssn", "--model", "digits-standard", "--lam", "0.05"]
    assert main([*exact, "--out", str(tmp_path / "exact")]) == 0
    text = capsys.readouterr().out
    assert "REDUCED" not in text  # it draws nothing
    assert "3 samples, no draws, exact;" in text
    assert all(r["predictions"] != [ABSTAIN] for r in lines(tmp_path / "b") if r["defence"] == "dssn")


def test_the_denoisers_precision_is_part_of_what_is_certified(tmp_path, capsys):
    """bfloat16 is certified, attacked and judged as bfloat16; a run, and a record, of another precision is refused."""
    few = [*TINY, "--method", "cohen,multiscale", "--n-examples", "3", "--attack-examples", "1"]
    half = [*few, "--precision", "bf16", "--out", str(tmp_path / "half")]
    assert main(half) == 0
    score = zoo.score_model("digits")
    score.set_autocast("bfloat16")
    smooth = denoised_smoothing(zoo.classifier("digits-standard"), score, 0.25)
    expected = smooth.certify(digits(3).images, Draws(10, 50), sample_ids=torch.arange(3))
    records = [r for r in lines(tmp_path / "half") if r["attack"] == CERTIFICATE]
    assert {r["precision"] for r in records} == {"bf16"}
    assert [r["counts"] for r in records if r["defence"] == "cohen 0.25"] == expected.counts.tolist()
    assert main([*few, "--out", str(tmp_path / "half")]) == 2
    assert "holds another run, which differs in systems.cohen 0.1.precision" in capsys.readouterr().err
    file = tmp_path / "half" / "records.jsonl"
    file.write_text(file.read_text().replace('"precision": "bf16"', '"precision": "float32"'))
    assert main(half) == 2
    assert "was certified with a denoiser of float32, and cohen 0.1 has one of bf16, which" in capsys.readouterr().err


def test_denoisers_from_a_file(tmp_path, capsys):
    """Two functions of one file are two denoisers; what they are is in the config."""
    file = tmp_path / "own.py"
    file.write_text(
        "from purify import zoo\n\ndef a():\n    return zoo.score_model('digits')\n\n"
        "def b():\n    return zoo.score_model('digits-calibrated')\n"
    )
    few = [*TINY, "--method", "cohen", "--sigma", "0.25", "--n-examples", "2", "--attack-examples", "0"]
    assert main([*few, "--score-model", f"{file}:a,{file}:b", "--out", str(tmp_path / "run")]) == 0
    systems = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["systems"]
    expected = {"cohen 0.25, own.a": "digits", "cohen 0.25, own.b": "digits-calibrated"}
    assert {k: s["score_model"] for k, s in systems.items()} == {
        k: zoo.score_model(v).fingerprint() for k, v in expected.items()
    }
    assert main([*few, "--score-model", f"{file}:c", "--out", str(tmp_path / "other")]) == 2
    assert "own.py has no function 'c'" in capsys.readouterr().err


def test_a_dry_run_counts_all_draws_and_times_the_attacks(tmp_path, monkeypatch, capsys):
    """Of certificates that draw all, those that a run makes; of a cascade those of all its scales."""
    from purify.evaluate import drawtimes

    out = tmp_path / "run"
    arguments = ["--n-examples", "2", "--attack-examples", "1", "--draws", "64", "--out", str(out)]
    costs, kept = {}, drawtimes.estimate

    def kept_estimate(system, samples):
        costs[system.name] = (kept(system, samples), system)
        return costs[system.name][0]

    monkeypatch.setattr("purify.evaluate.systems.estimate", kept_estimate)
    assert main([*arguments, "--method", "cohen,multiscale,dssn", "--sigma", "0.25,0.5", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "At most about" in said
    assert not out.exists()
    both = costs["cohen 0.25"][1].draws.n0 + 64
    assert costs["cohen 0.25"][0].draws == both
    assert costs["multiscale"][0].draws == 2 * both
    exact = costs["dssn"][1]
    image = to_grid(load_dataset("digits", "test")[0][:1])
    assert costs["dssn"][0].draws == exact.certifier.certify(image, exact.draws).draws[0]
    for cost, system in costs.values():
        assert cost.seconds == pytest.approx(2 * cost.image + cost.attack)
        assert cost.attack > 0
        assert system.attack.samples == 1


def test_a_dry_run_without_attacks_and_in_words(tmp_path, monkeypatch, capsys):
    from purify.evaluate import drawtimes

    arguments = ["--n-examples", "2", "--attack-examples", "0", "--draws", "64", "--sigma", "0.25"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "none" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--n-examples", "3", "--out", str(tmp_path / "a"), "--dry-run"]) == 2
    assert "holds another run" in capsys.readouterr().err

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(drawtimes, "fitted", broken)
    assert main([*arguments, "--dry-run"]) == 2
    assert "cohen 0.25 cannot be certified (no such kernel); check its networks." in capsys.readouterr().err
