"""The README's commands and the notebooks do what they say."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def readme_commands() -> list[str]:
    """Lines of the README's fenced shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_ci_runs_the_readmes_install_and_test_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = readme_commands()
    assert 'pip install -e ".[test]"' in commands
    assert "python -m pytest -n 4" in commands
    assert 'pip install -q -e ".[test]"' in ci
    assert "\npython -m pytest -n 4\n" in ci


def test_the_readmes_options_exist():
    helps = {}
    for command in readme_commands():
        script = next((p for p in command.split() if p.startswith("benchmarks/")), None)
        if script is None:
            continue
        if script not in helps:
            helps[script] = subprocess.run(
                [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
            ).stdout
        for option in re.findall(r"--[a-z-]+", command.split(script)[1]):  # what stands before is torchrun's
            assert option in helps[script], command
    assert set(helps) >= {"benchmarks/run_autoattack.py", "benchmarks/gradient_fidelity.py"}


def test_the_readme_has_python_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readmes_python_example_runs(example):
    subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=ROOT, check=True, capture_output=True)


def test_the_page_on_attacks_runs(tmp_path, monkeypatch):
    """An attack of one's own, its test, and an evaluation from Python."""
    own, test, python = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attacks.md").read_text(), re.S)
    module = ModuleType("purify.attacks.translation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(own, vars(module))
    exec(test, {})
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    assert list(tmp_path.glob("runs/from-python/records.jsonl"))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()


def test_what_the_package_offers_is_there():
    import purify

    assert all(hasattr(purify, name) for name in purify.__all__)
    assert purify.__all__ == sorted(purify.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
