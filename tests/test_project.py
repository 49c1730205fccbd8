"""The README's commands and the notebooks do what they say."""

import contextlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from conftest import load_script
from nbclient import NotebookClient

from purify.__main__ import main as purify_command

ROOT = Path(__file__).parent.parent


PAGES = [ROOT / "docs" / "index.md", ROOT / "docs" / "benchmark.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: Path) -> list[str]:
    """Lines of a page's fenced shell blocks, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


EXAMPLES = blocks(ROOT / "README.md", "python")


def test_ci_runs_the_readmes_install_and_test_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    readme = commands(ROOT / "README.md")
    assert 'pip install -e ".[test]"' in readme
    assert "python -m pytest -n 2" in readme
    assert 'pip install -q -e ".[test]"' in ci
    assert "\npython -m pytest -n 2\n" in ci


def test_ci_tests_the_oldest_torch_that_is_allowed():
    oldest = re.search(r"^ *torch>=(\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    assert f'"torch=={oldest}.*"' in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_a_pages_options_exist(page, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # some scripts use another
    for command in commands(page):
        words = command.split()
        script = next((w for w in words if w.startswith("benchmarks/")), None)
        if script is None and words[0] != "purify":
            continue
        start = words.index(script) + 1 if script else 2
        shown = script_help(script) if script else command_help(words[1], capsys)
        for word in words[start:]:  # what stands before is torchrun's
            option = word.partition("=")[0]
            assert not option.startswith("--") or option in shown, command


def command_help(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert purify_command([name, "--help"]) == 0
    return capsys.readouterr().out


@cache
def script_help(script: str) -> str:
    module, shown = load_script(Path(script).stem), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return shown.getvalue()


def test_the_readme_has_python_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_a_pages_python_runs(page, tmp_path, monkeypatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # one page reads the committed runs
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(blocks(page, "python")):
        module = ModuleType(f"block{i}")  # dataclasses look theirs up
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(block.replace('__name__ == "__main__"', "True"), vars(module))


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readmes_python_example_runs(example, tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", example], cwd=tmp_path, check=True, capture_output=True)


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
