"""CONTRIBUTING.md followed to the letter, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {re.match(r"# ([\w/.]+)", block)[1]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^python benchmarks/run_autoattack.py (.*)$", PAGE, re.MULTILINE)

USE = """
import sys, shlex, json
import purify
from purify import Purifier, zoo
from purify.data import load_dataset
from purify.cli.attack import main

assert purify.__file__.startswith(sys.argv[1]), purify.__file__
few = ["--n-examples", "2", "--steps", "2", "--threads", "1"]
for command in sys.argv[2:]:
    assert main([*shlex.split(command), *few]) == 0, command
tiny = "--attacks pgd-eot --attack-steps 1 --eot 1 --judge-draws 2 --out run --set total-variation.full=20"
assert main([*shlex.split(tiny), *few, "--purifier", "total-variation,twice", "--noise-level", "total-variation"]) == 0
defences = json.load(open("run/manifest.json"))["config"]["defences"]
parts = {name: d["purifier"] for name, d in defences.items() if "purifier" in d}
assert [p["rounds"] for p in parts.values()] == [[1.0], [1.0, 1.0]], parts
for part in parts.values():
    assert part["level"] == {"kind": "total-variation", "t_max": 0.2, "full": 20}
    again = Purifier.from_config(part, zoo.score_model("digits")).config()
    assert json.loads(json.dumps(again)) == part

x = load_dataset("digits", "test")[0][:3]
for name, options in {"total-variation": {"full": 40.0}, "twice": {"t_star": purify.TotalVariation(full=40.0)}}.items():
    model = purify.wrap("digits-standard", "digits", purifier=name, steps=2, reverse="ddpm", **options)
    found = model.details(x, sample_ids=range(3)).t_star[:, 0]
    u = 2 * x - 1
    tv = (u[..., 1:] - u[..., :-1]).abs().sum((1, 2, 3)) + (u[..., 1:, :] - u[..., :-1, :]).abs().sum((1, 2, 3))
    assert (found - 0.2 * (tv.double() / 40).clamp(max=1)).abs().max() < 1e-9
print("all of it works")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with what the page adds to it."""
    root = tmp_path_factory.mktemp("copy")
    skipped = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "purify", root / "purify", ignore=skipped)
    (root / "purify" / "zoo" / "weights").symlink_to(ROOT / "purify" / "zoo" / "weights")
    shutil.copy(ROOT / "pyproject.toml", root)
    package = root / "purify" / "__init__.py"
    docstring, rest = package.read_text().split("\n\n", 1)
    package.write_text(f"{docstring}\n\n{BLOCKS['purify/__init__.py']}{rest}")  # first: the hardest for cycles
    (root / "purify" / "total_variation.py").write_text(BLOCKS["purify/total_variation.py"])
    with (root / "purify" / "presets.py").open("a") as f:
        f.write("\n\n" + BLOCKS["purify/presets.py"])
    return root


def test_the_page_has_its_blocks():
    assert set(BLOCKS) == {"purify/total_variation.py", "purify/__init__.py", "purify/presets.py"}
    assert len(COMMANDS) == 3


def test_the_command_line_and_wrap_take_what_the_page_adds(copy):
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE, str(copy), *COMMANDS],
        cwd=copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "all of it works" in run.stdout
    assert "diffpure total-variation" in run.stdout
    assert "twice total-variation" in run.stdout


def test_the_new_file_passes_ruff(copy):
    call = [sys.executable, "-m", "ruff", "check", "--no-cache", "purify/total_variation.py", "purify/presets.py"]
    run = subprocess.run(call, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
