"""Records that survive kills, damage and full disks; the runner; the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyClassifier, smooth_model

from purify import DefendedClassifier, diffpure
from purify.attacks import PGD, AutoAttackRand
from purify.evaluate import Defence, RunFolder, Samples, evaluate, results
from purify.evaluate.command import main
from purify.evaluate.metrics import CRITERIA
from purify.evaluate.models import load_classifier
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import differences
from purify.evaluate.runner import WORST_ONLY, batches, share
from purify.leaderboard import read_run

# --- records ------------------------------------------------------------------------------------------------------

CONFIG = {"attack": {"eps": 0.1, "steps": 3}, "seed": 0}


def record(sample, **changes):
    return {"defence": "d", "attack": "clean", "sample": sample, "label": 1, "predictions": [1, 1], **changes}


def test_records_come_back(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, {})
    folder.append(record(3, attack="pgd"), np.ones((1, 2, 2), np.float32))
    del folder  # releases its lock
    again = RunFolder(tmp_path / "run", CONFIG, {"other": "environment"})
    assert ("d", "pgd", 3) in again
    assert ("d", "pgd", 4) not in again
    assert again.get("d", "pgd", 3) == record(3, attack="pgd")
    assert (again.image("d", "pgd", 3) == 1).all()


def test_a_torn_last_line_is_cut_off(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, {})
    for i in range(3):
        folder.append(record(i))
    path = tmp_path / "run" / "records.jsonl"
    whole = path.read_bytes()
    del folder
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        again = RunFolder(tmp_path / "run", CONFIG, {})
        assert ("d", "clean", 1) in again
        assert ("d", "clean", 2) not in again
        again.append(record(2))
        del again
        assert path.read_bytes() == whole


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = RunFolder(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match="Another process writes to"):
        RunFolder(tmp_path, CONFIG, {})
    first.append(record(0))


def test_a_kill_while_the_manifest_was_written_does_not_block_the_folder(tmp_path):
    (tmp_path / "manifest.partial").write_text('{"conf')
    RunFolder(tmp_path, CONFIG, {})


def test_the_manifest_remembers_every_session(tmp_path):
    for environment in ({"torch": "1"}, {"torch": "1"}, {"torch": "2"}):
        RunFolder(tmp_path, CONFIG, environment)
    assert json.loads((tmp_path / "manifest.json").read_text())["sessions"] == [{"torch": "1"}, {"torch": "2"}]


DAMAGED = [
    b"{not json}\n",
    b'{"defence": "d"}\n',
    b"7\n",
    b'{"defence": "d", "attack": "clean", "sample": 1, "label": 1, "predictions": "yes"}\n',
    b'{"defence": "d", "attack": "clean", "sample": 1, "label": 1, "predictions": []}\n',
    b'{"defence": ["d"], "attack": "clean", "sample": 1, "label": 1, "predictions": [1]}\n',
    b'{"defence": "d", "attack": "clean", "sample": 0, "label": 1, "predictions": [0]}\n',  # sample 0 again
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, line):
    RunFolder(tmp_path / "run", CONFIG, {}).append(record(0))
    with open(tmp_path / "run" / "records.jsonl", "ab") as f:
        f.write(line)
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2"):
        RunFolder(tmp_path / "run", CONFIG, {})


def test_another_run_in_the_folder_is_refused_with_its_differences(tmp_path):
    RunFolder(tmp_path, CONFIG, {})
    other = {"attack": {"eps": 0.2, "steps": 3}, "seed": 1}
    with pytest.raises(ValueError, match=r"another run, which differs in attack\.eps, seed"):
        RunFolder(tmp_path, other, {})
    assert list(differences({"a": {"b": 1}}, {"a": 2})) == ["a"]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "below", CONFIG, {})
    with pytest.raises(ValueError, match="holds other files"):
        RunFolder(tmp_path, CONFIG, {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        RunFolder(tmp_path / "run", CONFIG, {})


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small tmpfs")
def test_a_full_disk_loses_nothing(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        written = []

        def fill():
            folder = RunFolder(tmp_path, CONFIG, {})
            for i in range(10_000):
                folder.append(record(i, predictions=[1] * 1000), np.zeros((1, 9, 9), np.float32))
                written.append(i)

        with pytest.raises(ValueError, match="make room"):
            fill()
        assert 0 < len(written) < 10_000
        again = RunFolder(tmp_path, CONFIG, {})
        assert all(("d", "clean", i) in again for i in written)
        assert ("d", "clean", len(written)) not in again
        del again
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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


def lines(path: Path):
    """Records without their timings, sorted."""
    found = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    return sorted(({k: v for k, v in r.items() if k != "seconds"} for r in found), key=lambda r: str(sorted(r.items())))


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


def test_batches_are_groups_of_ids():
    assert [b.tolist() for b in batches(torch.arange(5, 12), 4)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [b.tolist() for b in batches(torch.tensor([9, 1, 8]), 4)] == [[1], [0, 2]]


def test_units_of_samples_are_shared_out_among_processes():
    ids = torch.arange(5, 75)
    shares = [ids[share(ids, 8, Ranks(r, 3))].tolist() for r in range(3)]
    assert sorted(i for part in shares for i in part) == ids.tolist()
    assert not any({i // 8 for i in shares[a]} & {i // 8 for i in shares[b]} for a, b in [(0, 1), (0, 2), (1, 2)])
    assert share(ids[:3], 8, Ranks(1, 3)).tolist() == []


@pytest.mark.parametrize("criterion", WORST_ONLY)
def test_worst_only_skips_what_is_broken_and_finds_the_same_worst_case(criterion, tmp_path):
    whole, only = tmp_path / "whole", tmp_path / "only"
    attacks = ["--attacks", "random-noise,pgd-eot,square,bpda-eot"]
    assert main([*TINY, *attacks, "--out", str(whole)]) == 0
    assert main([*TINY, *attacks, "--worst-only", criterion, "--out", str(only)]) == 0
    every = {(r["defence"], r["attack"], r["sample"]): r for r in lines(whole)}
    kept = {(r["defence"], r["attack"], r["sample"]): r for r in lines(only)}
    order = ["clean", "random-noise", "pgd-eot", "square", "bpda-eot"]
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


TINY = [
    *("--n-examples", "48", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--batch-size", "4"),
    *("--steps", "3", "--threads", "1", "--noise-level", "constant"),
]
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "run_autoattack.py"


def count(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("records*.jsonl"))


def test_twenty_kills_leave_the_same_records(tmp_path):
    """SIGKILL at random moments, each time the same command again, and at last in peace."""
    assert main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    context = get_context("forkserver")  # children that need not import everything again
    context.set_forkserver_preload(["purify.evaluate.command"])
    g = np.random.default_rng(0)
    for _ in range(20):
        process = context.Process(target=main, args=([*TINY, "--out", str(tmp_path / "killed")],))
        process.start()
        aim = count(tmp_path / "killed") + int(g.integers(0, 9))
        while count(tmp_path / "killed") < aim and process.is_alive():
            time.sleep(0.001)
        time.sleep(g.random() / 100)
        assert process.is_alive()  # there is work left
        process.kill()
        process.join()
    assert 0 < count(tmp_path / "killed") < count(tmp_path / "whole")
    assert main([*TINY, "--out", str(tmp_path / "killed")]) == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")  # none lost, none twice, none different
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["results"] == json.loads((tmp_path / "whole" / "result.json").read_text())["results"]
    assert result["budgets"]["diffpure"]["pgd-eot"]["steps"] == 2


@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_shares_the_samples_out(processes, tmp_path):
    """The same records as one process gives, in one file."""
    assert main([*TINY, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*launch, BENCHMARK, *TINY, "--out", tmp_path / "many"], check=True, capture_output=True)
    assert lines(tmp_path / "many") == lines(tmp_path / "one")
    assert [p.name for p in (tmp_path / "many").glob("records*")] == ["records.jsonl"]
    assert json.loads((tmp_path / "many" / "manifest.json").read_text())["sessions"][0]["processes"] == processes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_restarted_and_picks_its_samples_up(rank, tmp_path):
    assert main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    process = subprocess.Popen(
        [*launch, BENCHMARK, *TINY, "--out", tmp_path / "many"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while count(tmp_path / "many") < 20 and process.poll() is None:
        time.sleep(0.001)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[rank]), signal.SIGKILL)
    assert count(tmp_path / "many") < count(tmp_path / "whole") / 2  # so somebody must go on
    assert process.wait(timeout=180) == 0
    assert lines(tmp_path / "many") == lines(tmp_path / "whole")


def test_records_of_ranks_are_merged_and_a_merge_that_was_killed_is_finished(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, {})
    for i in range(3):
        folder.append(record(i))
    del folder
    merged = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.0.jsonl").write_bytes(merged.splitlines(True)[1])  # was merged, not yet removed
    (tmp_path / "records.1.jsonl").write_text(json.dumps(record(7)) + "\n" + '{"torn')
    folder = RunFolder(tmp_path, CONFIG, {})
    assert ("d", "clean", 7) in folder
    folder.merge()
    assert (tmp_path / "records.jsonl").read_bytes() == merged + (json.dumps(record(7)) + "\n").encode()
    assert len(list(tmp_path.glob("records*"))) == 1
    del folder
    (tmp_path / "records.0.jsonl").write_text(json.dumps(record(1, predictions=[0, 0])) + "\n")
    with pytest.raises(ValueError, match=r"records\.0\.jsonl, line 1, repeats an earlier record"):
        RunFolder(tmp_path, CONFIG, {})


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


def test_several_nodes_with_a_shared_store_are_refused(monkeypatch):
    """Where a restart would hang."""
    from purify.evaluate import ranks

    monkeypatch.setattr(ranks.dist, "rendezvous", lambda url, timeout: iter([(None, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks.join(torch.device("cpu"))


# --- command ------------------------------------------------------------------------------------------------------


def test_demo_prints_its_table_and_says_that_the_budget_is_reduced(tmp_path, capsys):
    small = ["--n-examples", "8", "--attack-steps", "2", "--eot", "2", "--judge-draws", "3", "--threads", "1"]
    assert main([*small, "--attacks", "pgd-eot,bpda-eot", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for word in ("undefended", "diffpure", "adversarial training", "worst case", "REDUCED", "pgd-eot 2 steps x EOT 2"):
        assert word in text
    assert (tmp_path / "run" / "samples-diffpure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["attacks"]["diffpure"][0] == PGD("Linf", 0.3, steps=2, eot=2).budget()
    assert len(manifest["config"]["defences"]["diffpure"]["score_model"]) == 64
    assert main([*small, "--out", str(tmp_path / "run"), "--seed", "1"]) == 2
    assert "differs in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "Unknown data set 'mnist'; known: cifar10, cifar100, digits"),
        (["--purifier", "magic"], "Unknown purifier 'magic'; known: agdm, diffpure"),
        (["--attacks", "pgd-eot,fgsm"], "Unknown attack 'fgsm'; known: apgd-margin-eot, autoattack-rand"),
        (["--model", "resnet"], "Unknown model 'resnet' for digits; known: digits-at, digits-dssn, digits-guide"),
        (["--model", "nowhere.py:make"], "no file nowhere.py"),
        (["--score-model", "nothing"], "no score network 'nothing'"),
        (["--score-model", "nothing.safetensors"], "no score network 'nothing.safetensors'"),
        (["--gradient", "exact"], "Unknown gradient engine"),
        (["--preset", "huge"], "Unknown preset 'huge'; known: paper, quick, standard"),
        (["--reverse", "heun"], "Unknown reverse rule"),
        (["--threat-model", "Linfinity"], "Unknown threat model"),
        (["--t-star", "0"], "t_star must lie in (0, 1]"),
        (["--steps", "0"], "steps must be a whole number"),
        (["--eps", "-1"], "eps must be a number of at least 0"),
        (["--eot", "0"], "EOT draws must be"),
        (["--n-examples", "501"], "has 500 test images"),
        (["--device", "cuda:7"], "no GPU 'cuda:7' here"),
        (["--device", "gpu"], "Unknown device"),
        (["--device", "meta"], "Unknown device"),
        (["--threads", "-1"], "threads must be"),
        (["--gradient", "bpda", "--memory-budget", "7"], "--memory-budget is for"),
        (["--dataset", "imagenet", "--threat-model", "L1"], "no usual L1 radius for imagenet; pass --eps"),
        (["--dataset", "fashion_mnist", "--data-dir", "/nonexistent"], "Fashion-MNIST is not in"),
        (["--out", "/proc/nothing"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from purify import zoo\ndef make():\n    return zoo.classifier('digits-at')\n")
    small = ["--n-examples", "4", "--attack-steps", "1", "--eot", "1", "--judge-draws", "1", "--threads", "1"]
    assert main([*small, "--model", f"{tmp_path}/mine.py:make", "--out", str(tmp_path / "run")]) == 0
    assert "adversarial training" not in capsys.readouterr().out
    assert main([*small, "--model", f"{tmp_path}/mine.py:other", "--out", str(tmp_path / "run2")]) == 2
    assert "has no function 'other'" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def make(:")
    assert main([*small, "--model", f"{tmp_path}/broken.py:make", "--out", str(tmp_path / "run3")]) == 2
    assert "could not give a model" in capsys.readouterr().err


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
