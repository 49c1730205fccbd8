"""Records on disk: kills, damage, full disks, and the merge of what several processes wrote."""

import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from purify.evaluate import RunFolder
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import differences

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
    for cut in range(second, len(whole) - 1):
        path.write_bytes(whole[:cut])
        again = RunFolder(tmp_path / "run", CONFIG, {})
        assert ("d", "clean", 1) in again
        assert ("d", "clean", 2) not in again
        again.append(record(2))
        del again
        assert path.read_bytes() == whole


@pytest.mark.parametrize("end", [b"", b"\r"])
def test_a_whole_last_line_is_kept_whatever_its_end(end, tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, {})
    for i in range(3):
        folder.append(record(i))
    path = tmp_path / "run" / "records.jsonl"
    del folder
    path.write_bytes(path.read_bytes()[:-1].replace(b"\n", end or b"\n") + end)
    again = RunFolder(tmp_path / "run", CONFIG, {})
    again.append(record(3))
    del again
    last = RunFolder(tmp_path / "run", CONFIG, {})
    assert all(("d", "clean", i) in last for i in range(4))


def test_a_lost_image_is_one_sentence(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, {})
    folder.append(record(3, attack="pgd"), np.ones((1, 2, 2), np.float32))
    path = tmp_path / "adversarial" / "d" / "pgd" / "3.npy"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"3\.npy is missing or damaged; remove its record's line"):
        folder.image("d", "pgd", 3)
    path.unlink()
    with pytest.raises(ValueError, match=r"3\.npy is missing or damaged"):
        folder.image("d", "pgd", 3)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = RunFolder(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match="Another process writes to"):
        RunFolder(tmp_path, CONFIG, {})
    first.append(record(0))


def test_a_folder_is_free_once_left_however_long_its_object_lives(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG, {}) as left:
        left.append(record(0))
    with RunFolder(tmp_path / "run", CONFIG, {}) as again:
        assert len(left) == len(again) == 1
    (tmp_path / "run" / "records.jsonl").write_text("{damaged}\n")
    kept = []
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged") as error:
            RunFolder(tmp_path / "run", CONFIG, {})
        kept.append(error)


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
    assert list(differences({"a": [{"eps": 1}, 2]}, {"a": [{"eps": 3}, 2]})) == ["a[0].eps"]
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == ["a"]


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


class Threads(Ranks):
    """Ranks that are threads of this process, which meet at ``met``."""

    met = threading.Barrier(2, timeout=60)

    def barrier(self):
        self.met.wait()


def test_a_second_use_of_a_folder_loses_no_rank_s_records(tmp_path, monkeypatch):
    """Rank 1 goes on while rank 0 still merges, unless it waits."""
    join = RunFolder._join

    def slow(self, parts):
        join(self, [])
        time.sleep(0.5)
        for part in parts:
            part.unlink()

    def use(rank):
        folder = RunFolder(tmp_path, CONFIG, {}, Threads(rank, 2))
        for attack in ("first", "second"):
            folder.append({**record(rank), "attack": attack})
            folder.merge()
        return [(attack, i) for attack in ("first", "second") for i in range(2) if ("d", attack, i) in folder]

    monkeypatch.setattr(RunFolder, "_join", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(use, range(2)))
    assert found[0] == found[1] == [("first", 0), ("first", 1), ("second", 0), ("second", 1)]
    assert [p.name for p in tmp_path.glob("records*")] == ["records.jsonl"]


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
