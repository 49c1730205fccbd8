"""The runner, and the command around it."""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model
from kills import lines, undisturbed
from test_resume import TINY

from purify import PURIFIERS, DefendedClassifier, diffpure, zoo
from purify.attacks import ATTACKS, BPDA, PGD, Attack, AttackResult, AutoAttackRand, RandomNoise, Square, Transfer
from purify.cli.attack import main
from purify.data import DATASETS
from purify.evaluate import Defence, Estimate, RunFolder, Samples, evaluate, report, results
from purify.evaluate.build import Request, build_attacks, build_pairs, build_settings, level_options
from purify.evaluate.certification import certify_all
from purify.evaluate.description import Evaluation
from purify.evaluate.metrics import CRITERIA
from purify.evaluate.ranks import Ranks
from purify.evaluate.runner import WORST_ONLY, batches, share, share_out
from purify.fingerprint import weights_digest
from purify.leaderboard import read_run
from purify.named import load_classifier, load_networks
from purify.purification.levels import LEVELS, NoiseLevel

# --- runner -------------------------------------------------------------------------------------------------------


def setup_run(steps=3):
    g = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(40, 1, 4, 4, generator=g)
    classifier = TinyClassifier()
    samples = Samples(images, classifier(images).argmax(1), torch.arange(40))
    attacks = [PGD("Linf", 0.2, steps=steps, eot=2), AutoAttackRand("Linf", 0.2, steps=2, eot=2)]
    model = DefendedClassifier(classifier, diffpure(smooth_model(), 0.1, 3, "ddpm"))
    defences = [
        Defence("undefended", classifier, [a.on_deterministic() for a in attacks], 1, {}),
        Defence("diffpure", model, attacks, 4, {}),
    ]
    return defences, samples


def test_runner_writes_every_sample_once_and_resumes(tmp_path):
    defences, samples = setup_run()
    evaluate(RunFolder(tmp_path / "a", {}, {}), defences, samples, batch_size=16, progress=False)
    reference = lines(tmp_path / "a")
    assert len(reference) == 2 * 3 * 40
    # A run with some records missing does just those and ends up the same.
    (tmp_path / "b").mkdir()
    kept = [line for i, line in enumerate((tmp_path / "a" / "records.jsonl").read_text().splitlines(True)) if i % 3]
    (tmp_path / "b" / "manifest.json").write_text((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "b" / "records.jsonl").write_text("".join(kept))
    evaluate(RunFolder(tmp_path / "b", {}, {}), defences, samples, batch_size=64, progress=False)
    again = lines(tmp_path / "b")
    assert [r["predictions"] for r in again] == [r["predictions"] for r in reference]
    np.testing.assert_allclose([r["L2"] for r in again], [r["L2"] for r in reference], atol=1e-4)
    folder = RunFolder(tmp_path / "b", {}, {})
    found = results(folder, defences, samples)
    assert found["undefended"]["clean"]["mean"].value == 1.0
    assert found["diffpure"]["worst case"]["mean"].value <= found["diffpure"]["pgd-eot"]["mean"].value
    assert found["diffpure"]["pgd-eot"]["any_of_r"].value <= found["diffpure"]["pgd-eot"]["mean"].value
    folder.get("diffpure", "clean", 3)["label"] += 1
    with pytest.raises(ValueError, match=r"sample 3 \(diffpure, clean\) .* changed by hand"):
        results(folder, defences, samples)


def test_equal_names_are_refused(tmp_path):
    """Two defences with one name would share records."""
    _, samples = setup_run()
    twins = [Defence("d", TinyClassifier(), [], 1, {})] * 2
    with pytest.raises(ValueError, match="Two defences are called 'd'"):
        evaluate(RunFolder(tmp_path, {}, {}), twins, samples, progress=False)
    with pytest.raises(ValueError, match="Two attacks on d are called 'pgd-eot'"):
        Defence("d", TinyClassifier(), [PGD("Linf", 0.1, steps=1, eot=1)] * 2, 1, {})


def test_two_images_of_one_id_are_refused(tmp_path):
    """They would share their noise and their record."""
    _, samples = setup_run()
    twins = Samples(samples.images, samples.labels, torch.arange(40) % 39)
    with pytest.raises(ValueError, match="Two images are called 0; give every image an id of its own"):
        evaluate(RunFolder(tmp_path, {}, {}), [Defence("d", TinyClassifier(), [], 1, {})], twins, progress=False)
    with pytest.raises(ValueError, match="Two images are called 0"):
        certify_all(RunFolder(tmp_path, {}, {}), [], twins, progress=False)


def test_a_model_that_cannot_take_the_images_is_refused_before_any_record(tmp_path):
    _, samples = setup_run()
    cases = {"cannot take images": TinyClassifier(size=8), "classes 0 to 1": TinyClassifier(classes=2)}
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluate(RunFolder(tmp_path / message, {}, {}), [Defence("d", model, [], 1, {})], samples, progress=False)
        assert not (tmp_path / message / "records.jsonl").exists()


def test_judges_use_other_noise_than_the_attack(tmp_path):
    """No (seed, sample, draw) that the attack saw is used to judge."""
    _, samples = setup_run()
    seeds = []

    class Spy(TinyClassifier):
        accepts_keys = True

        def forward(self, x, *, sample_ids, draw, seed):
            seeds.append((seed, torch.is_grad_enabled()))
            return super().forward(x)

    defence = Defence("spy", Spy(), [PGD("Linf", 0.1, steps=2, eot=2)], 3, {})
    evaluate(RunFolder(tmp_path, {}, {}), [defence], samples, progress=False)
    attacking = {s for s, grad in seeds if grad}
    assert len(attacking) == 1
    assert seeds[-1][0] not in attacking


def test_an_answer_that_is_not_a_number_is_no_class(tmp_path):
    class Broken(TinyClassifier):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.9, torch.nan, logits)

    images = torch.full((6, 1, 4, 4), 0.5)
    images[4] = 0.95  # not among those that are asked before a run
    samples = Samples(images, torch.zeros(6).long(), torch.tensor([4, 7, 9, 10, 12, 14]))
    folder = RunFolder(tmp_path / "run", {}, {})
    with pytest.raises(ValueError, match="broken answers NaN or infinity for sample 12, first in Broken; check"):
        evaluate(folder, [Defence("broken", Broken(), [], 2, {})], samples, batch_size=4, progress=False)
    assert [r["sample"] for r in lines(tmp_path / "run")] == [4, 7, 9, 10]  # what was computed before stays
    assert evaluate(folder, [Defence("broken", TinyClassifier(), [], 2, {})], samples, progress=False) == 2
    with pytest.raises(ValueError, match="broken answers NaN or infinity for sample 12"):  # asked before
        evaluate(folder, [Defence("broken", Broken(), [], 2, {})], samples[torch.tensor([4, 5])], progress=False)

    class Masked(TinyClassifier):
        def forward(self, x):
            return super().forward(x).index_fill(1, torch.tensor([2]), -torch.inf)

    evaluate(folder, [Defence("masked", Masked(), [], 2, {})], samples, progress=False)
    answers = {p for i in (4, 7, 14) for p in folder.get("masked", "clean", i)["predictions"]}
    assert answers <= {0, 1, 3, 4}


def test_results_are_on_disk_before_the_self_checks(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sys.modules["purify.evaluate.finish"], "self_checks", fail)
    assert main([*TINY, "--attacks", "random-noise", "--out", str(tmp_path / "run")]) == 2
    assert "out of memory (no room); lower --max-rows" in capsys.readouterr().err
    assert "diffpure" in json.loads((tmp_path / "run" / "result.json").read_text())["results"]
    with pytest.raises(ValueError, match="run its command again"):
        read_run(tmp_path / "run")  # a leaderboard wants the checks
    monkeypatch.setattr(sys.modules["purify.evaluate.finish"], "self_checks", lambda *args: [])
    assert main([*TINY, "--attacks", "random-noise", "--out", str(tmp_path / "run")]) == 0
    complete = (tmp_path / "run" / "result.json").read_bytes()
    monkeypatch.setattr(sys.modules["purify.evaluate.finish"], "self_checks", fail)
    assert main([*TINY, "--attacks", "random-noise", "--out", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run" / "result.json").read_bytes() == complete  # what was whole stays whole


def test_batches_are_groups_of_ids():
    assert [b.tolist() for b in batches(torch.arange(5, 12), 4)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [b.tolist() for b in batches(torch.tensor([9, 1, 8]), 4)] == [[1], [0, 2]]


def test_units_of_samples_are_shared_out_among_processes():
    ids = torch.arange(5, 75)
    shares = [ids[share(ids, 8, r, 3)].tolist() for r in range(3)]
    assert sorted(i for part in shares for i in part) == ids.tolist()
    assert not any({i // 8 for i in shares[a]} & {i // 8 for i in shares[b]} for a, b in [(0, 1), (0, 2), (1, 2)])
    assert share(ids[:3], 8, 1, 3).tolist() == []
    few = Samples(torch.rand(3, 1, 4, 4), torch.zeros(3).long(), ids[:3])
    with pytest.warns(UserWarning, match="2 of 3 processes have nothing to do, because samples are shared out by 8"):
        assert len(share_out(few, 8, Ranks(0, 3))) == 3


FOUR = [*TINY, "--attacks", "random-noise,pgd-eot,transfer,bpda-eot"]
whole = undisturbed(main, FOUR)


@pytest.mark.parametrize("criterion", WORST_ONLY)
def test_worst_only_skips_what_is_broken_and_finds_the_same_worst_case(criterion, whole, tmp_path):
    only = tmp_path / "only"
    assert main([*FOUR, "--worst-only", criterion, "--out", str(only)]) == 0
    every = {(r["defence"], r["attack"], r["sample"]): r for r in lines(whole)}
    kept = {(r["defence"], r["attack"], r["sample"]): r for r in lines(only)}
    order = ["clean", "random-noise", "pgd-eot", "transfer", "bpda-eot"]
    skipped = 0
    for defence, attack, sample in every:
        earlier = [every.get((defence, a, sample)) for a in order[: order.index(attack)]]
        broken = any(
            e and not CRITERIA[criterion](np.array([e["predictions"]]), np.array([e["label"]]))[0] for e in earlier
        )
        assert ((defence, attack, sample) in kept) == (not broken), (defence, attack, sample)
        skipped += broken
    assert skipped > 50
    a, b = (json.loads((p / "result.json").read_text())["results"] for p in (whole, only))
    assert {d: r["clean"][criterion] for d, r in a.items()} == {d: r["clean"][criterion] for d, r in b.items()}
    assert {d: r["worst case"][criterion] for d, r in a.items()} == {
        d: r["worst case"][criterion] for d, r in b.items()
    }
    with pytest.raises(ValueError, match="every attack on every sample"):
        read_run(only)


def test_nothing_left_for_the_picture(tmp_path, capsys):
    """Random noise of this size breaks all of these samples, so that no attack is left to draw."""
    few = ["--n-examples", "4", "--worst-only", "any_of_r", "--attacks", "random-noise,pgd-eot", "--eps", "1"]
    assert main([*TINY, *few, "--out", str(tmp_path / "run")]) == 0
    assert not list((tmp_path / "run").glob("*.png"))
    assert "result.json." in capsys.readouterr().out


def test_a_dry_run_looks_at_the_folder(tmp_path, capsys):
    few = [*TINY, "--n-examples", "4", "--attacks", "random-noise", "--out", str(tmp_path / "run")]
    assert main(few) == 0
    before = sorted(tmp_path.rglob("*"))
    assert main([*few, "--dry-run"]) == 0
    assert main([*few, "--seed", "1", "--dry-run"]) == 2
    assert "holds another run, which differs in seed" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# --- command ------------------------------------------------------------------------------------------------------


def test_demo_prints_its_table_and_says_that_the_budget_is_reduced(tmp_path, capsys):
    small = ["--n-examples", "8", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--threads", "1"]
    assert main([*small, "--attacks", "pgd-eot,bpda-eot", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for word in ("undefended", "diffpure", "adversarial training", "worst case", "REDUCED", "pgd-eot 2 steps x EOT 2"):
        assert word in text
    assert (tmp_path / "run" / "samples-diffpure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["attacks"]["diffpure"][0] == PGD("Linf", 0.3, steps=2, eot=2).budget()
    assert len(manifest["config"]["defences"]["diffpure"]["score_model"]) == 64
    assert main([*small, "--steps", "3", "--out", str(tmp_path / "run"), "--seed", "1"]) == 2
    assert "differs in" in capsys.readouterr().err


def test_a_model_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from purify import zoo\ndef make():\n    return zoo.classifier('digits-at')\n")
    small = ["--n-examples", "4", "--attack-steps", "1", "--eot", "1", "--judge-draws", "1", "--attacks", "pgd-eot"]
    assert main([*small, "--model", f"{tmp_path}/mine.py:make", "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert "adversarial training" not in capsys.readouterr().out
    assert main([*small, "--model", f"{tmp_path}/mine.py:other", "--out", str(tmp_path / "run2")]) == 2
    assert "has no function 'other'" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def make(:")
    assert main([*small, "--model", f"{tmp_path}/broken.py:make", "--out", str(tmp_path / "run3")]) == 2
    assert "broken.py, line 1, failed with SyntaxError" in capsys.readouterr().err


OWN = """
from purify import zoo

def score():
    return zoo.score_model("digits-calibrated").train()

def network():
    return score().network

def guide():
    return zoo.classifier("digits-at").train()

thing = 3
"""


def test_a_score_model_and_an_auxiliary_network_from_a_file(tmp_path):
    """Both are loaded as --model's are, and what they are is in the run's config."""
    (tmp_path / "own.py").write_text(OWN)
    small = ["--n-examples", "2", "--steps", "2", "--attack-steps", "1", "--eot", "1", "--judge-draws", "1"]
    parts = ["--score-model", f"{tmp_path}/own.py:score", "--set", f"agdm.auxiliary={tmp_path}/own.py:guide"]
    run = [*small, "--attacks", "pgd-eot", "--purifier", "agdm", *parts, "--out", str(tmp_path / "run")]
    assert main(run) == 0
    defence = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["defences"]["agdm"]
    assert defence["score_model"] == zoo.score_model("digits-calibrated").fingerprint()
    assert defence["purifier"]["guidance"]["auxiliary"] == weights_digest(zoo.classifier("digits-at"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("network", "own.py:network returned PatchUNet; it must return a purify.ScoreModel(network, schedule,"),
        ("guide", "it must return a purify.ScoreModel"),
        ("other", "own.py has no function 'other'."),
        ("thing", "has no function 'thing'"),
    ],
)
def test_what_a_file_returns_must_be_a_score_model(function, message, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    assert main(["--score-model", f"{tmp_path}/own.py:{function}", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_auxiliary_network_by_its_robustbench_name(monkeypatch):
    """agdm's auxiliary takes every name that --model takes."""
    asked = []

    def load(name, dataset, threat_model):
        asked.append((name, dataset, threat_model))
        return zoo.classifier("digits-at")

    monkeypatch.setattr("purify.named._from_robustbench", load)
    options = load_networks({"auxiliary": "Rebuffi2021", "scale": 2.0}, "cifar10", "L2")
    assert asked == [("Rebuffi2021", "cifar10", "L2")]
    assert weights_digest(options["auxiliary"]) == weights_digest(zoo.classifier("digits-at"))
    assert load_networks({"scale": 2.0}, "cifar10", "L2") == {"scale": 2.0}


def test_parameters_of_a_noise_level_by_set():
    request = digits_request(noise_level="ssni-n", settings={"tau": 2, "ssni-n.t_min": 0.02})
    given = build_settings(request.asked.settings, build_pairs(request))["ssni-n"]
    expected = {"t_min": 0.02, "tau": 2, "calibration": zoo.calibration("digits")}
    assert level_options("ssni-n", request, given) == expected


def digits_request(**options):
    """An evaluation on digits before anything is built."""
    return Request(Evaluation(**options), DATASETS["digits"], torch.device("cpu"))


def lacking(score_model, level, steps):
    """No preset: its parameters have other names."""


def test_a_preset_that_the_command_cannot_call_is_named(monkeypatch, capsys):
    monkeypatch.setitem(PURIFIERS, "mine", lacking)
    assert main(["--purifier", "mine", "--dry-run"]) == 2
    message = "mine lacks the parameter t_star, reverse, gradient; every preset takes score_model, t_star"
    assert message in capsys.readouterr().err


def test_a_level_without_t_star_refuses_it(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Half(NoiseLevel):
        top: float = 0.5

        def statistic(self, model, u, noise, total):
            return u.flatten(1).mean(1).double()

        def level(self, statistic):
            return self.top * statistic.sigmoid()

    monkeypatch.setitem(LEVELS, "half", Half)
    few = ["--noise-level", "half", "--n-examples", "2", "--steps", "2", "--attacks", "pgd-eot", "--dry-run"]
    assert main([*few, "--set", "half.top=0.2"]) == 0
    assert main([*few, "--t-star", "0.1"]) == 2
    assert "half has no t_star; leave --t-star out" in capsys.readouterr().err


def test_an_attack_of_ones_own_needs_nothing_but_its_entry(monkeypatch):
    """Its parameters get the budget's numbers by their names, with or without any."""

    @dataclass(frozen=True)
    class Nothing(Attack):
        queries: int = 3
        mine: float = 0.5
        name = "nothing"

        def run(self, model, x, y, ids, seed):
            return AttackResult(x, torch.zeros(len(x)))

    monkeypatch.setitem(ATTACKS, "nothing", Nothing)
    request = digits_request(attacks="nothing", eps=0.25)
    assert build_attacks(request) == [Nothing("Linf", 0.25, queries=request.budget.queries)]
    assert main(["--attacks", "nothing,pgd-eot", "--n-examples", "2", "--steps", "2", "--dry-run"]) == 0


def test_approximate_gradients_are_named(tmp_path, capsys):
    small = ["--n-examples", "4", "--attack-steps", "3", "--eot", "1", "--judge-draws", "1", "--threads", "1"]
    assert main([*small, "--gradient", "bpda", "--attacks", "surrogate-eot", "--out", str(tmp_path)]) == 0
    assert "bpda gradient, APPROXIMATE" in capsys.readouterr().out
    budgets = json.loads((tmp_path / "result.json").read_text())["budgets"]
    assert budgets["undefended"]["pgd-eot"]["steps"] == 3
    assert budgets["diffpure"]["surrogate-eot"]["surrogate_steps"] == 5


def test_unknown_robustbench_models_are_listed():
    for threat_model, name, message in (
        ("Linf", "Nobody2020", "RobustBench has no cifar10 Linf model 'Nobody2020'; known: Andriushchenko"),
        ("L1", "Standard", "Unknown threat model of RobustBench's cifar10 models 'L1'; known: L2, Linf, corruptions"),
    ):
        with pytest.raises(ValueError, match=message):
            load_classifier(name, "cifar10", threat_model)


def test_the_verdict_says_where_no_gradient_attack_was_run():
    half = {"mean": Estimate(0.5, 0.4, 0.6)}
    classifier = TinyClassifier()
    model = DefendedClassifier(classifier, diffpure(smooth_model(), 0.1, 3, "ddpm"))
    noise, transfer, pgd = RandomNoise("Linf", 0.1), Transfer("Linf", 0.1), PGD("Linf", 0.1)
    defences = [
        Defence("undefended", classifier, [noise], 1, {}),
        Defence("blind", model, [noise, transfer, Square("Linf", 0.1)], 4, {}),
        Defence("inexact", model, [noise, BPDA("Linf", 0.1)], 4, {}),
        Defence("attacked", model, [noise, transfer, pgd], 4, {}),
    ]
    found = {d.name: {"clean": half, "worst case": half} for d in defences}
    lines = report.verdict(found, defences, "Linf eps 0.1", "4 images").splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines if "no gradient attack was run on it" in line] == [
        "undefended",
        "blind",
    ]


def test_an_evaluation_has_one_bar(tmp_path, capsys):
    defences, samples = setup_run()
    evaluate(RunFolder(tmp_path, {}, {}), defences, samples, batch_size=16)
    shown = capsys.readouterr().err
    assert "diffpure, pgd-eot" in shown
    assert "gradient" not in shown
