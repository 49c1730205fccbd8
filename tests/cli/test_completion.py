"""What bash completes, asked of bash itself."""

import contextlib
import io
import subprocess

import pytest

from purify.__main__ import main
from purify.attacks import ATTACKS
from purify.cli import COMMANDS, completion

pytest.importorskip("shtab")


@pytest.fixture(scope="module")
def script():
    """The script as a session sources it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    return out.getvalue()


def complete(script, cwd, *words):
    """What bash offers for the last word."""
    ask = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_purify; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["purify", "c"], [name for name in COMMANDS if name.startswith("c")]),
        (["purify", "attack", "--attack-"], ["--attack-steps"]),
        (["purify", "attack", "--attacks", "pgd-eot-"], [name for name in ATTACKS if name.startswith("pgd-eot-")]),
        (["purify", "certify", "--data", "fash"], ["fashion_mnist"]),
        (["purify", "list", "atta"], ["attacks"]),
        (["purify", "image", "photo"], ["photo.png"]),
        (["purify", "completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes_commands_options_names_and_files(script, tmp_path, words, expected):
    (tmp_path / "photo.png").touch()
    assert sorted(complete(script, tmp_path, *words)) == sorted(expected)


def test_zsh_gets_a_script_and_a_missing_library_a_sentence(capsys, monkeypatch):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef purify")
    monkeypatch.setattr(completion, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
