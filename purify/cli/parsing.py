"""Parsing of every command line: one sentence for what is wrong, with the nearest name that is right.

jsonargparse reads YAML files (``--config``) into the same options and reports every error through one method; tyro,
the other library of this kind, prints boxes of several lines and reads no files.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

import jsonargparse

from purify.checks import choose, nearest
from purify.evaluate.description import Description
from purify.options import ASSIGNMENTS, Kind, flags, note, options, plain_value

D = TypeVar("D", bound=Description)
UNKNOWN = re.compile(r"(?:Option|Key) '([^']+)' is not accepted|does not accept.*option '([^']+)'")


class Parser(jsonargparse.ArgumentParser):
    """An argument parser that takes options whole and prints one sentence instead of its usage."""

    def __init__(self, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, default_env=False, formatter_class=formatter, **settings)
        self.recipes: Mapping[str, Mapping[str, Any]] = {}  # defaults of the options, by the names that --recipe takes

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = UNKNOWN.search(message)
        if unknown:  # in a YAML file
            names = [action.dest for action in self._actions]
            message = f"unknown option {unknown[1]!r} in --config{nearest(unknown[1], names)}"
        if "arguments are required: " in message:
            start, _, lacking = message.partition(": ")
            flags_of = {a.dest: (a.option_strings or [a.dest])[0] for a in self._actions}
            message = f"{start}: {', '.join(flags_of.get(name, name) for name in lacking.split(', '))}"
        sentence = " ".join(message.replace('Parser key "config": ', "").split()).rstrip(".")
        print(f"error: {sentence[:1].upper()}{sentence[1:]}; see {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        """As usual; an unknown option is named with the one that it resembles."""
        given = sys.argv[1:] if args is None else list(args)
        for word in given:
            first = word.partition("=")[0]
            if first.startswith("--") and first != "--" and first not in self._option_string_actions:
                self.error(f"unknown option {first}{nearest(first, self._option_string_actions)}")
        if self.recipes:
            self._take_recipe(given)
        return super().parse_args(given, **settings)

    def _take_recipe(self, given: Sequence[str]) -> None:
        """What --recipe names becomes the default, wherever it stands: other options go before it."""
        for word, after in pairwise([*given, ""]):
            name = after if word == "--recipe" else word.removeprefix("--recipe=")
            if word.partition("=")[0] == "--recipe" and name:
                try:
                    self.set_defaults(dict(choose(name, self.recipes, "recipe")))
                except ValueError as error:
                    self.error(str(error))


class _Assign(argparse.Action):
    """Collects NAME=VALUE over several options."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            new = ASSIGNMENTS.convert(values)
        except (ValueError, AttributeError) as error:
            raise argparse.ArgumentError(None, f"{option} takes {ASSIGNMENTS.takes}, got {values!r}") from error
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), **new})


class _Renamed(argparse.Action):
    """Stores the value; says so if an old name was used."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        if option != self.option_strings[0]:
            note(f"{option} is now called {self.option_strings[0]}")


class _NowSet(argparse.Action):
    """An option of version 0.1 that is a setting now."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name = self.option_strings[0].removeprefix("--").removeprefix("ssni-").replace("-", "_")
        note(f"{option} {values} is now called --set {name}={values}")
        namespace.settings = {**(namespace.settings or {}), name: plain_value(values)}


def describe_parser(cls: type, prog: str, text: str, examples: str) -> Parser:
    """The command line of a description: an option for each of its fields, and ``--config`` for all of them."""
    p = Parser(prog=prog, description=text, epilog=examples)
    p.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file of options, as a run's run.yaml")
    groups: dict[str, Any] = {}
    for field in options(cls):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = p.add_argument_group(title)
        add_option(groups[title], field)
    if any(field.name == "settings" for field in options(cls)):
        for old in ("--ssni-bias", "--ssni-t-max", "--ssni-tau", "--tau-unit"):
            p.add_argument(old, action=_NowSet, dest=f"old{old}".replace("-", "_"), help=argparse.SUPPRESS)
    return p


def add_option(group: Any, field: dataclasses.Field[Any]) -> None:
    """One option; the description converts and checks its value."""
    kind: Kind = field.metadata["kind"]
    default = None if field.default is dataclasses.MISSING else field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    text = field.metadata["help"].replace("%", "%%") + ("" if shown is None else f" (default: {shown})")
    names = flags(field)
    metavar = "NAME=VALUE" if kind is ASSIGNMENTS else field.name.upper()
    action: dict[str, Any] = {"action": _Assign} if kind is ASSIGNMENTS else {}
    if "--preset" in names:
        action = {"action": _Renamed}
    group.add_argument(*names, dest=field.name, default=default, metavar=metavar, help=text, **action)


def described(cls: type[D], args: Any, old: Sequence[str] = ()) -> D:
    """The description that was parsed; ``old`` are names that its options had.

    Raises:
        ValueError: a value that an option cannot take; names the option.
    """
    values = {name: getattr(args, name) for name in [*(field.name for field in options(cls)), *old]}
    return cls(**cls.renamed({name: value for name, value in values.items() if value is not None}))


def taking(kind: Kind) -> Any:
    """What an option of a command without a description takes, as argparse has it."""

    def convert(text: str) -> Any:
        try:
            return kind.convert(text)
        except (ValueError, TypeError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"takes {kind.takes}, got {text!r}") from None

    return convert
