"""``purify completion``: what a shell needs to complete commands, options and names; written by shtab."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from purify import zoo
from purify.attacks import ATTACKS
from purify.checkpoints.public import PUBLIC
from purify.cli import COMMANDS
from purify.cli.list import KINDS
from purify.cli.parsing import Parser
from purify.cli.shell import guarded
from purify.data import DATASETS
from purify.evaluate.budgets import BUDGETS
from purify.presets import PURIFIERS
from purify.purification.levels import LEVELS

try:
    import shtab  # of the extra "completion"
except ImportError:
    shtab = None  # type: ignore[assignment]

SHELLS = ("bash", "zsh")
NAMES = {
    "attacks": tuple(ATTACKS),
    "budget": tuple(BUDGETS),
    "dataset": tuple(DATASETS),
    "kinds": tuple(KINDS),
    "model": tuple(zoo.names("classifier")),
    "noise_level": tuple(LEVELS),
    "purifier": tuple(PURIFIERS),
    "score_model": (*zoo.names("score"), *PUBLIC),
}


def parser(prog: str = "purify completion") -> Parser:
    """One argument: the shell."""
    text = "Print what a shell needs to complete purify: eval it, or keep it where the shell looks for completions."
    p = Parser(prog=prog, description=text)
    p.add_argument("shell", choices=SHELLS, help="the shell that reads it")
    return p


def main(argv: list[str] | None = None, prog: str = "purify completion") -> int:
    """Print the script; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: Any, command: str) -> int:
    """Print the script."""
    if shtab is None:
        raise ValueError("Completion is written by shtab, which is not there; pip install shtab.")
    functions: Any = {args.shell: preamble(args.shell)}
    print(shtab.complete(whole(), args.shell, preamble=functions))
    return 0


def whole() -> argparse.ArgumentParser:
    """One parser of all commands, each option that takes a name with the names that it takes."""
    root = argparse.ArgumentParser("purify")
    commands = root.add_subparsers()
    for name, (module, text) in COMMANDS.items():
        part = import_module(module).parser(f"purify {name}")
        commands.add_parser(name, help=text, add_help=False, parents=[plain(part)])
    return root


def plain(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser's options as argparse's own, which is what shtab reads."""
    found = argparse.ArgumentParser(add_help=False)
    for action in parser._actions:
        shown = action.help if action.help != argparse.SUPPRESS else argparse.SUPPRESS
        flag = action.nargs == 0
        options: dict[str, Any] = {"action": "store_true"} if flag else {"nargs": action.nargs}
        names = action.option_strings or [action.dest]
        if action.option_strings:
            options["dest"] = action.dest
        elif flag:
            continue
        if action.choices and not flag:
            options["choices"] = list(action.choices)
        added = found.add_argument(*names, help=shown, **options)
        if not flag and not action.choices:
            known = {shell: function(action.dest) for shell in SHELLS} if action.dest in NAMES else shtab.FILE
            added.complete = known  # type: ignore[attr-defined]
    return found


def function(option: str) -> str:
    """The shell function that completes this option's names."""
    return f"_purify_names_{option}"


def preamble(shell: str) -> str:
    """The shell functions of ``NAMES``."""
    bodies = {
        "bash": '{name}() {{ compgen -W "{words}" -- "$1"; }}',
        "zsh": "{name}() {{ compadd -- {words}; }}",
    }
    return "\n".join(bodies[shell].format(name=function(o), words=" ".join(names)) for o, names in NAMES.items())
