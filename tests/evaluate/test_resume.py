"""The attack benchmark killed, resumed, shared out by torchrun and restarted: always the same records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kills import count, kill_again_and_again, lines, undisturbed

from purify.cli.attack import main

TINY = [
    *("--n-examples", "48", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--batch-size", "4"),
    *("--steps", "3", "--threads", "1", "--noise-level", "constant", "--calls", "100"),
    *("--attacks", "random-noise,transfer,pgd-eot,adaptive"),
]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "run_autoattack.py"
whole = undisturbed(main, TINY)


def test_twenty_kills_leave_the_same_records(whole, tmp_path):
    """SIGKILL at random moments, each time the same command again, and at last in peace."""
    kill_again_and_again(main, "purify.cli.attack", TINY, tmp_path / "killed", 20)
    assert 0 < count(tmp_path / "killed") < count(whole)
    assert main([*TINY, "--out", str(tmp_path / "killed")]) == 0
    assert lines(tmp_path / "killed") == lines(whole)  # none lost, none twice, none different
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["results"] == json.loads((whole / "result.json").read_text())["results"]
    assert result["budgets"]["diffpure"]["pgd-eot"]["steps"] == 2


@pytest.mark.parametrize("processes", [2, 4])
def test_torchrun_shares_the_samples_out(processes, whole, tmp_path):
    """The same records as one process gives, in one file."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*launch, BENCHMARK, *TINY, "--out", tmp_path / "many"], check=True, capture_output=True)
    assert lines(tmp_path / "many") == lines(whole)
    assert [p.name for p in (tmp_path / "many").glob("records*")] == ["records.jsonl"]
    assert json.loads((tmp_path / "many" / "manifest.json").read_text())["sessions"][0]["processes"] == processes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_restarted_and_picks_its_samples_up(rank, whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    process = subprocess.Popen(
        [*launch, BENCHMARK, *TINY, "--out", tmp_path / "many"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while count(tmp_path / "many") < 20 and process.poll() is None:
        time.sleep(0.001)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[rank]), signal.SIGKILL)
    assert count(tmp_path / "many") < count(whole) / 2  # so somebody must go on
    assert process.wait(timeout=180) == 0
    assert lines(tmp_path / "many") == lines(whole)


def test_several_nodes_with_a_shared_store_are_refused(monkeypatch):
    """Where a restart would hang."""
    from purify.evaluate import ranks

    monkeypatch.setattr(ranks.dist, "rendezvous", lambda url, timeout: iter([(None, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks.join(torch.device("cpu"))
