"""Parts in files of one's own: their code is part of what a run is, and an edited file is loaded again."""

import copy
import os
import pickle
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from purify import Evaluation
from purify.cli.attack import main
from purify.plugin import beside, call, code_of, load_class, load_function, name_of
from purify.registry import describe

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
    """And what was loaded stays; Python's own modules are never replaced."""
    others = {name: ModuleType(name) for name in ("scaling", "scaling.part", "scalingfree")} | {"random": random}
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


def test_imports_within_functions_find_what_stands_beside(tmp_path, monkeypatch):
    """Long after loading, whatever other files have under that name, and the very module that was there before."""
    late = (
        "import scaling, own\n\ndef value():\n    import scaling as s, late\n"
        "    return s.FACTOR, s is scaling, own.scaling is s\n"
    )
    for folder, factor in (("a", 1), ("b", 2)):
        values_of(tmp_path / folder, factor)
        write(tmp_path / folder / "late.py", late)
    monkeypatch.setitem(sys.modules, "scaling", None)  # of another test
    monkeypatch.delitem(sys.modules, "scaling")
    found = [load_function(f"{tmp_path}/{folder}/late.py:value") for folder in "ab"]
    assert [value() for value in found] == [(1, True, True), (2, True, True)]
    assert call(f"{tmp_path}/a/late.py:value") == (1, True, True)
    assert "scaling" not in sys.modules
    monkeypatch.setitem(sys.modules, "scaling", ModuleType("scaling"))
    assert [value() for value in found] == [(1, True, True), (2, True, True)]


def test_a_file_that_loads_another_keeps_its_own_modules(tmp_path):
    values_of(tmp_path / "b", 2)
    one = values_of(tmp_path / "a", 1)
    first = "from purify.plugin import load_function\n\nother = load_function('OTHER/b/own.py:value')\n"
    (tmp_path / "a/own.py").write_text(first.replace("OTHER", str(tmp_path)) + (tmp_path / "a/own.py").read_text())
    assert load_function(one)() == 1


def test_an_interrupt_leaves_nothing_half_loaded(tmp_path, monkeypatch):
    name = values_of(tmp_path / "a", 1)
    write(
        tmp_path / "a/own.py",
        "import sys\nK = 1\n\ndef value():\n    return K\n\nif sys.stop:\n    raise KeyboardInterrupt\nK = 2\n",
    )
    monkeypatch.setattr(sys, "stop", True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        load_function(name)
    monkeypatch.setattr(sys, "stop", False)
    assert load_function(name)() == 2


def test_threads_load_a_file_once(tmp_path):
    name = values_of(tmp_path / "a", 1)
    write(tmp_path / "a/own.py", "import time\ntime.sleep(0.2)\n\ndef value():\n    return 3\n")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_function(name), range(4)))
    assert len(set(found)) == 1
    assert found[0]() == 3


def test_lines_that_move_between_files_are_seen(tmp_path):
    name = values_of(tmp_path, 1)
    write(tmp_path / "own.py", "import one, two\n")
    digests = []
    for texts in (("a = 1\nb = 1\n", "c = 1\n"), ("a = 1\n", "b = 1\nc = 1\n")):
        for file, text in zip(("one.py", "two.py"), texts, strict=True):
            write(tmp_path / file, text)
        digests.append(code_of([name]))
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os\nos.chdir('..')\nraise OSError('no data')\n", "own.py, line 3, failed with OSError: no data"),
        ("import sys, parts.more\nsys.path = []\nimport parts.absent\n", "line 3, .*: No module named 'parts.absent'"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['x'])\n", "line 2, failed with SystemExit"),
    ],
)
def test_errors_of_own_files_name_the_line(text, said, own, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (own / "own.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_function("own.py:model")


def test_a_class_from_beside_the_file_has_a_name(tmp_path):
    write(tmp_path / "kinds.py", "from dataclasses import dataclass\n\n@dataclass\nclass Mine:\n    t: int = 3\n")
    write(tmp_path / "own.py", "from kinds import Mine\n")
    kind = load_class(f"{tmp_path}/own.py:Mine", object, "part")
    assert describe(kind(), {}) == {"kind": "kinds.py:Mine", "t": 3}
    write(tmp_path / "own.py", "from kinds import Mine  # edited\n")
    assert load_class(f"{tmp_path}/own.py:Mine", object, "part") is not kind
    assert copy.deepcopy(pickle.loads(pickle.dumps(kind(4)))) == kind(4)
    assert name_of(kind) == "kinds.py:Mine"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a compiler")
def test_networks_from_beside_the_file_compile(own):
    write(own / "deeper.py", "import torch\nFACTOR = 2.0\n\ndef wave(x):\n    return FACTOR * torch.sin(x)\n")
    write(own / "helping.py", "import deeper\nFACTOR = 3.0\n\ndef both(x):\n    return deeper.wave(x) * FACTOR\n")
    (own / "own.py").write_text("from helping import both as wave\n")
    x = torch.linspace(0, 1, 8)
    compiled = torch.compile(load_function("own.py:wave"), fullgraph=True)(x)
    torch.testing.assert_close(compiled, 6 * torch.sin(x))


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
