"""Parts in files of one's own: their code is part of what a run is, and an edited file is loaded again."""

import os
import sys
from types import ModuleType

import pytest

from purify import Evaluation
from purify.cli.attack import main
from purify.plugin import beside, call, code_of, load_function

TINY = ["--n-examples", "2", "--attack-steps", "1", "--eot", "1", "--judge-draws", "2", "--steps", "2"]
TINY += ["--attacks", "pgd-eot", "--noise-level", "constant"]


def write(path, text):
    """A file that is newer than what was compiled of an older one."""
    path.parent.mkdir(exist_ok=True)
    later = path.stat().st_mtime + 2 if path.exists() else None
    path.write_text(text)
    if later:
        os.utime(path, (later, later))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A classifier in a file that imports a module, which imports another, and a package, from beside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("helping", "deeper", "parts", "parts.more"):  # of another test's folder
        monkeypatch.delitem(sys.modules, name, raising=False)
    write(tmp_path / "parts/more.py", "SHIFT = 0.0\n")
    write(tmp_path / "helping.py", "import deeper\n\nFACTOR = deeper.FACTOR\n")
    write(tmp_path / "deeper.py", "FACTOR = 1.0\n")
    write(tmp_path / "other.py", "nobody = 'imports this'\n")
    write(
        tmp_path / "own.py",
        "import helping\nfrom parts.more import SHIFT\nfrom torch import nn\n\nfrom purify import zoo\n\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = zoo.classifier('digits-standard')\n\n"
        "    def forward(self, x):\n        return self.net(x * helping.FACTOR - SHIFT)\n\n\n"
        "def model():\n    return Net().eval()\n\n\ndef values():\n    return helping.FACTOR, SHIFT\n",
    )
    return tmp_path


def test_files_beside_are_those_that_are_imported(own):
    names = [str(path.relative_to(own.resolve())) for path in beside(own / "own.py")]
    assert names == ["deeper.py", "helping.py", "parts/more.py"]


@pytest.mark.parametrize("file", ["own.py", "deeper.py", "parts/more.py"])
def test_a_run_whose_code_was_edited_since_is_another(own, file, capsys):
    run = [*TINY, "--model", "own.py:model", "--out", "run"]
    assert main(run) == 0
    assert main([*run, "--memory-budget", "64K"]) == 0  # changes no result, and is what helps where memory ends
    capsys.readouterr()
    write(own / file, (own / file).read_text() + "# edited\n")
    assert main(run) == 2
    assert "holds another run, which differs in code.own.py; choose another --out" in capsys.readouterr().err


def test_an_edited_file_is_loaded_again_with_what_stands_beside_it(own):
    before, values = code_of(["own.py:values", "own.py:model"]), load_function("own.py:values")
    assert load_function("own.py:values") is values
    assert values() == (1.0, 0.0)
    write(own / "deeper.py", "FACTOR = 3.0\n")
    write(own / "parts/more.py", "SHIFT = 2.0\n")
    assert load_function("own.py:values")() == (3.0, 2.0)
    assert before.keys() == {"own.py"}
    assert before != code_of(["own.py:values"])


def test_what_is_beside_is_what_would_be_imported(tmp_path):
    """Of a package and a module the package, of folders without __init__ the modules, of packages what is asked for."""
    for name, text in {
        "own.py": "import both, spaces.inner, linked\nfrom pack import used as other\nimport purify.zoo, absent\n",
        "both.py": "",
        "both/__init__.py": "from . import near\nfrom .deep.leaf import x\n",
        "both/near.py": "from .. import beyond\nimport own\n",
        "both/deep/__init__.py": "",
        "both/deep/leaf.py": "from ..near import y\n",
        "spaces/inner.py": "this is no Python",
        "spaces/outer.py": "",
        "pack/__init__.py": "",
        "pack/used.py": "",
        "pack/plots.py": "",
        "elsewhere/real.py": "",
        "purify/zoo.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pack" / ".#used.py").symlink_to("nowhere")  # an editor's lock
    (tmp_path / "linked.py").symlink_to(tmp_path / "elsewhere" / "real.py")
    names = [path.relative_to(tmp_path.resolve()).as_posix() for path in beside(tmp_path / "own.py")]
    assert names == [
        *("both/__init__.py", "both/deep/__init__.py", "both/deep/leaf.py", "both/near.py"),
        *("elsewhere/real.py", "pack/__init__.py", "pack/used.py", "spaces/inner.py"),
    ]


def values_of(folder, factor):
    """A file that returns the factor of a module beside it, whose name other folders have, too."""
    write(folder / "own.py", "import scaling\n\ndef value():\n    return scaling.FACTOR\n")
    write(folder / "scaling.py", f"FACTOR = {factor}\n")
    return f"{folder}/own.py:value"


def test_modules_of_one_name_beside_two_files_are_two(tmp_path):
    one, two = (values_of(tmp_path / name, factor) for name, factor in (("a", 1), ("b", 2)))
    assert [load_function(name)() for name in (one, two, one)] == [1, 2, 1]


def test_what_is_beside_goes_before_what_is_loaded_under_its_name(tmp_path, monkeypatch):
    """And what was loaded stays where whoever loaded it finds it; Python's own modules are never replaced."""
    others = {name: ModuleType(name) for name in ("scaling", "scaling.part", "scalingfree")}
    for name, module in others.items():
        monkeypatch.setitem(sys.modules, name, module)
    name = values_of(tmp_path / "a", 1)
    write(tmp_path / "a/random.py", "raise RuntimeError\n")
    with (tmp_path / "a/own.py").open("a") as f:
        f.write("import random\n\ndef late(add):\n    from scaling import FACTOR\n    return FACTOR + add\n")
    for factor in (1, 2):
        write(tmp_path / "a/scaling.py", f"FACTOR = {factor}\n")
        assert load_function(name)() == factor
        assert call(name.replace("value", "late"), 3) == factor + 3
        assert {name: sys.modules[name] for name in others} == others


def test_edits_within_a_second_reverts_and_failures_are_seen(tmp_path):
    name = values_of(tmp_path / "a", 1)
    for factor in (1, 2, 1, 3):
        (tmp_path / "a/scaling.py").write_text(f"FACTOR = {factor}\n")
        assert load_function(name)() == factor
    (tmp_path / "a/scaling.py").write_text("FACTOR = 4\nraise RuntimeError\n")
    with pytest.raises(ValueError, match="failed with RuntimeError"):
        load_function(name)
    (tmp_path / "a/scaling.py").write_text("FACTOR = 5\n")
    assert load_function(name)() == 5


def test_code_is_that_of_parts_and_of_attacks_and_no_path_is_a_part(own):
    asked = Evaluation(model="own.py:model", attacks=("pgd-eot", "own.py:Mine@3"), out="runs/own.py:model")
    assert asked.code() == {"attack_code": code_of(["own.py:Mine"]), "code": code_of(["own.py:model"])}
    assert Evaluation(attacks="pgd-eot", dataset="own.py:images", out="runs/a.py:1").code() == {}
