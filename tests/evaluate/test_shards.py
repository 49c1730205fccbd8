"""Independent processes that take a shard each, killed or not, and merged: the records of one process."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyClassifier
from kills import count, kill_again_and_again, lines

import purify
from purify.attacks import PGD
from purify.cli.attack import main
from purify.cli.certify import main as certify
from purify.cli.merge import main as merge_command
from purify.evaluate.merge import in_order, merge
from purify.evaluate.ranks import Ranks, Shard
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, evaluate, share_out

TINY = [
    *("--n-examples", "8", "--attack-steps", "1", "--eot", "1", "--judge-draws", "2", "--batch-size", "1"),
    *("--steps", "2", "--threads", "1", "--noise-level", "constant", "--attacks", "random-noise,pgd-eot"),
]


def stored(folder: Path):
    """Records as they stand in the file, without their timings."""
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_killed_shards_merge_to_the_records_of_one_process(one, tmp_path, capsys):
    run = tmp_path / "run"
    for shard in ("2/2", "1/2"):
        arguments = [*TINY, "--shard", shard]
        kill_again_and_again(main, "purify.cli.attack", arguments, run, 1, run / Shard.parse(shard).folder)
        capsys.readouterr()
        assert merge_command([str(run)]) == 0  # what there is, while shards lack
        assert "It lacks" in capsys.readouterr().out
        assert main([*arguments, "--out", str(run)]) == 0
        assert f"Shard {shard} is finished, {count(run / Shard.parse(shard).folder)} records" in capsys.readouterr().out
    assert merge_command([str(run)]) == 0
    said = capsys.readouterr().out
    assert "It lacks" not in said
    assert stored(run) == stored(one)  # in the same order, too
    assert lines(run) == lines(one)  # and the same images
    again = (run / "records.jsonl").read_bytes()
    assert merge_command([str(run)]) == 0
    assert ", 0 of them new." in capsys.readouterr().out
    assert (run / "records.jsonl").read_bytes() == again
    assert main(said.splitlines()[-1].partition(": ")[2].split()[2:]) == 0  # the command that it names
    assert "Nothing was left to attack" in capsys.readouterr().out
    found, expected = (json.loads((folder / "result.json").read_text()) for folder in (run, one))
    assert found["results"] == expected["results"]
    assert found["config"] == expected["config"]


def test_runs_from_elsewhere_merge_into_a_new_folder_and_the_rest_is_done_there(one, tmp_path, capsys):
    assert main([*TINY, "--shard", "1/2", "--out", str(tmp_path / "a")]) == 0  # the other machine never comes up
    found = merge([tmp_path / "a"], tmp_path / "c")
    total = count(one)
    assert found.lacking == f"the shards 2 of 2 and {total // 2} of {total} records"
    assert main([*TINY, "--out", str(tmp_path / "c")]) == 0
    assert lines(tmp_path / "c") == lines(one)


def test_certificates_are_shared_out_too(tmp_path, capsys):
    tiny = ["--n-examples", "4", "--batch-size", "1", "--draws", "20", "--selection-draws", "5", "--alpha", "0.3"]
    tiny += ["--sigma", "0.5", "--score-model", "none", "--attack-examples", "2", "--attack-steps", "1", "--eot", "1"]
    assert certify([*tiny, "--out", str(tmp_path / "one")]) == 0
    for shard in ("1/2", "2/2"):
        assert certify([*tiny, "--shard", shard, "--out", str(tmp_path / "run")]) == 0
    assert merge_command([str(tmp_path / "run")]) == 0
    assert stored(tmp_path / "run") == stored(tmp_path / "one")
    assert certify(["--config", str(tmp_path / "run" / "run.yaml")]) == 0
    found, expected = (json.loads((tmp_path / f / "result.json").read_text()) for f in ("run", "one"))
    assert found["results"] == expected["results"]


@pytest.mark.parametrize("unit", [1, 4, 32])
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.filterwarnings("ignore:.* of .* processes have nothing to do")
def test_every_sample_belongs_to_one_shard_and_rank(unit, count):
    ids = torch.arange(70)
    samples = Samples(torch.zeros(70, 1, 1, 1), torch.zeros(70).long(), ids)
    parts = [
        share_out(samples, unit, Ranks(rank, 2), Shard(number, count)).ids
        for number in range(1, count + 1)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(parts).sort().values, ids)
    for part in parts:
        assert sorted(i for u in set((part // unit).tolist()) for i in ids[ids // unit == u].tolist()) == part.tolist()


def defence():
    return Defence("d", TinyClassifier(), [PGD("Linf", 0.1, steps=1, eot=1)], 1, {})


CONFIG = {"defences": {"d": {}}, "attacks": {"d": [{"attack": "pgd-eot"}]}, "n_examples": 7, "worst_only": None}


def shard(path, images, number, config=CONFIG, seed=0):
    samples = Samples(images, torch.arange(7) % 5, torch.arange(7))
    with RunFolder(path, config, {"git": None, "number": number}) as folder:
        evaluate(folder, [defence()], samples, seed, 2, progress=False, shard=Shard(number, 2))
    return path


def test_merging_names_what_is_missing_and_keeps_all_sessions(images, tmp_path):
    whole = tmp_path / "run"
    shard(whole / "shard-2-of-2", images, 2)
    found = merge([whole])
    assert found.lacking == "the shards 1 of 2 and 8 of 14 records"
    shard(whole / "shard-1-of-2", images, 1)
    found = merge([whole])
    assert (found.records, found.new, found.lacking) == (14, 8, None)
    with RunFolder(whole, CONFIG, {"git": None, "number": 2}) as folder:
        assert [s["number"] for s in folder.sessions] == [2, 1]
        assert list(folder.records) == [("d", stage, i) for stage in ("clean", "pgd-eot") for i in range(7)]
        assert folder.image("d", "pgd-eot", 0).shape == (1, 4, 4)


def test_what_does_not_belong_together_is_refused_and_nothing_written(images, tmp_path):
    a = shard(tmp_path / "a", images, 1)
    b = shard(tmp_path / "b", images, 1, {**CONFIG, "seed": 1})
    with pytest.raises(ValueError, match=r"b and .*a are different runs; they differ in seed"):
        merge([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    other = shard(tmp_path / "other", images + 0.01, 1)
    with pytest.raises(ValueError, match=r"c and .*other have different records of d, pgd-eot, sample"):
        merge([a, other], tmp_path / "c")
    with pytest.raises(ValueError, match="say into which by --out"):
        merge([a, b])
    with (
        RunFolder(a, CONFIG, {"git": None, "number": 1}),
        pytest.raises(ValueError, match=r"Another process writes to .*a;"),
    ):
        merge([a], tmp_path / "d")
    (tmp_path / "e").mkdir()
    with pytest.raises(ValueError, match="e holds no run and no shards"):
        merge([tmp_path / "e"])


def test_a_folder_on_another_file_system_is_copied(images, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    part = shard(tmp_path / "a", images, 1)
    merge([part], tmp_path / "c")
    shutil.rmtree(part)
    with RunFolder(tmp_path / "c", CONFIG, {"git": None, "number": 1}) as folder:
        assert folder.image("d", "pgd-eot", 0).shape == (1, 4, 4)


def test_stages_that_a_manifest_does_not_name_keep_their_order():
    keys = [("b", "x", 1), ("a", "y", 0), ("b", "w", 0), ("a", "y", 2), ("b", "x", 0)]
    expected = [("a", "y", 0), ("a", "y", 2), ("b", "x", 0), ("b", "x", 1), ("b", "w", 0)]
    assert in_order(keys, {"systems": {"a": {}, "b": {}}}) == expected


def test_a_shard_has_no_results_of_its_own():
    evaluation = purify.Evaluation(shard="1/2")
    assert evaluation.part == Shard(1, 2)
    for description in (evaluation, purify.Certification(shard="1/2")):
        with pytest.raises(ValueError, match="A shard has no results of its own; run it by `purify attack`"):
            description.run()
    with pytest.raises(ValueError, match="Each shard might choose another precision; name the one"):
        replace(evaluation, precision="auto")


SLURM = Path(__file__).parents[2] / "benchmarks" / "slurm"


def script(name, *arguments, **environment):
    """A batch file as SLURM runs it, with an ``sbatch`` of ours that writes down what it is asked for."""
    path = f"{environment.pop('PATH', '')}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k != "SHARDS"}
    call = ["bash", str(SLURM / name), *map(str, arguments)]
    return subprocess.run(call, env={**clean, "PATH": path, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("name", [p.name for p in sorted(SLURM.iterdir())])
def test_batch_files_are_bash_and_say_how_they_are_called(name):
    subprocess.run(["bash", "-n", SLURM / name], check=True)
    found = script(name)
    assert found.returncode == 2
    assert found.stderr.startswith("usage: ")


@pytest.mark.slow
def test_an_array_of_shards_and_its_merging_job(tmp_path):
    run = tmp_path / "run"
    options = [*TINY, "--batch-size", "4"]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    for task in ("1", "2"):
        found = script("shard.sbatch", run, "attack", *options, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
        assert found.returncode == 0, found.stderr
    again = script("shard.sbatch", run, "attack", *options, SLURM_ARRAY_TASK_ID="2", SHARDS="2")  # queued again
    assert "Shard 2/2 is finished" in again.stdout
    done = script("merge.sbatch", run, "attack")
    assert done.returncode == 0, done.stderr
    assert stored(run) == stored(tmp_path / "one")
    assert (run / "result.json").is_file()


@pytest.mark.slow
def test_the_merging_job_of_a_curve(tmp_path):
    run = tmp_path / "run"
    options = [*TINY, "--batch-size", "4", "--eps", "0.05,0.2"]
    for task in ("1", "2"):
        found = script("shard.sbatch", run, "attack", *options, SLURM_ARRAY_TASK_ID=task, SHARDS="2")
        assert found.returncode == 0, found.stderr
    done = script("merge.sbatch", run, "attack")
    assert done.returncode == 0, done.stderr
    assert list(json.loads((run / "result.json").read_text())["runs"]) == ["0.05", "0.2"]
    assert (run / "curve.png").is_file()


def test_submitting_checks_the_options_and_hands_them_on(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", 'echo "$@" >> "$LOG"; echo 77'), ("purify", 'echo "purify $@" >> "$LOG"')):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {"PATH": str(tmp_path / "bin"), "LOG": str(log), "SHARDS": "4"}
    assert script("submit.sh", "runs/A", "attack", "--eot", "2", **environment).returncode == 0
    assert log.read_text().replace(f"{SLURM}/", "").splitlines() == [
        "purify attack --eot 2 --shard 1/4 --out runs/A --device cpu --check",
        "--parsable --array=1-4 shard.sbatch runs/A attack --eot 2",
        "--dependency=afterok:77 merge.sbatch runs/A attack",
    ]
