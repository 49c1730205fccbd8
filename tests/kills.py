"""What tests of both benchmarks ask of runs: how many records, which, and what a kill leaves."""

import json
import time
from collections.abc import Callable
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest


def count(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("records*.jsonl"))


def lines(path: Path):
    """Records without their timings but with digests of their images, sorted."""
    found = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    for r in found:
        image = path / "adversarial" / r["defence"] / r["attack"] / f"{r['sample']}.npy"
        r["image"] = sha256(image.read_bytes()).hexdigest() if image.exists() else None
    return sorted(
        ({k: v for k, v in r.items() if k != "seconds"} for r in found),
        key=lambda r: (r["defence"], r["attack"], r["sample"]),
    )


def undisturbed(main: Callable, arguments: list[str]) -> Callable:
    """A fixture of the module that asks for it: the folder of a run that nobody disturbed."""

    @pytest.fixture(scope="module")
    def whole(tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        assert main([*arguments, "--out", str(folder)]) == 0
        return folder

    return whole


def kill_again_and_again(
    main: Callable, module: str, arguments: list[str], folder: Path, times: int, records: Path | None = None
) -> None:
    """Run the command in ``folder``, its records in ``records``, and SIGKILL it at random moments, ``times`` times."""
    records = records or folder
    context = get_context("forkserver")  # children that need not import everything again
    context.set_forkserver_preload([module, "diffusers.models.unets.unet_2d", "sklearn.datasets"])
    g = np.random.default_rng(0)
    for _ in range(times):
        process = context.Process(target=main, args=([*arguments, "--out", str(folder)],))
        process.start()
        aim = count(records) + int(g.integers(0, 9))
        while count(records) < aim and process.is_alive():
            time.sleep(0.001)
        time.sleep(g.random() / 100)
        assert process.is_alive()  # there is work left
        process.kill()
        process.join()
