"""Options of a description: dataclass fields that know what they take, for Python, YAML and the command line alike."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from purify.checks import is_number, short

T = TypeVar("T")
SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Kind:
    """What an option takes.

    Attributes:
        convert: from text or a Python value to the value; raises ValueError or TypeError.
        takes: what it takes, in words.
    """

    convert: Callable[[Any], Any]
    takes: str


def option(default: Any, kind: Kind, group: str, text: str, *names: str) -> Any:
    """A dataclass field: its default, what it takes, its group and explanation, and its options if not ``--name``."""
    how = {"kind": kind, "group": group, "help": text, "names": names}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=how)
    return dataclasses.field(default=default, metadata=how)


def options(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields of a description that are options."""
    return [f for f in dataclasses.fields(cls) if "kind" in f.metadata]


def flags(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """How a command line writes an option; first the name that messages use."""
    return field.metadata["names"] or (f"--{field.name.replace('_', '-')}",)


def convert(description: Any) -> None:
    """Turn every option of a frozen dataclass into what its kind says; None stays.

    Raises:
        ValueError: a value of another kind; names the option.
    """
    for field in options(type(description)):
        value, kind = getattr(description, field.name), field.metadata["kind"]
        if value is None:
            continue
        try:
            object.__setattr__(description, field.name, kind.convert(value))
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{flags(field)[0]} takes {kind.takes}, got {short(value)}.") from error


def note(text: str) -> None:
    """A sentence about an old name."""
    print(f"note: {text}; the old name goes with version 0.3.", file=sys.stderr)


def plain(description: Any) -> dict[str, Any]:
    """The options that are set, as YAML and JSON can hold them; building from it gives an equal description."""
    values = {f.name: getattr(description, f.name) for f in options(type(description))}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> float:
    found = float(Fraction(value)) if isinstance(value, str) and "/" in value else value
    found = float(found) if isinstance(found, str) else found
    if not is_number(found):
        raise ValueError
    return float(found)


def _whole(value: Any) -> int:
    found = int(value) if isinstance(value, str) else value
    if not is_number(found) or found != int(found):
        raise ValueError
    return int(found)


def _size(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if not isinstance(value, str):
        return _whole(value)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError
    return int(float(found[1]) * SIZES[found[2].upper()])


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)) and str(value).strip():
        return str(value)
    raise ValueError


def _listed(convert: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def of(value: Any) -> tuple[T, ...]:
        parts: Iterable[Any] = value.split(",") if isinstance(value, str) else value
        found = tuple(convert(p.strip() if isinstance(p, str) else p) for p in ([parts] if is_number(parts) else parts))
        if not found:
            raise ValueError
        return found

    return of


def _one_or_more(value: Any) -> float | tuple[float, ...]:
    found = _listed(_number)(value)
    return found if len(found) > 1 else found[0]


def _assignments(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {_text(key): given for key, given in value.items()}
    found: dict[str, Any] = {}
    for part in [value] if isinstance(value, str) else value:
        key, separator, text = part.partition("=")
        if not separator or not key.strip():
            raise ValueError
        found[key.strip()] = plain_value(text)
    return found


def plain_value(text: str) -> Any:
    """A number, list, true or false as JSON or Python write them; anything else is the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _shard(value: Any) -> str:
    found = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError
    return f"{int(found[1])}/{int(found[2])}"


NUMBER = Kind(_number, "a number, as 0.03 or 8/255")
WHOLE = Kind(_whole, "a whole number")
SIZE = Kind(_size, "bytes, as 1000000, 512M or 1.5G, or auto")
TEXT = Kind(_text, "a name")
SHARD = Kind(_shard, "a part of the whole, as 1/16 to 16/16")
PATH = Kind(lambda value: Path(_text(value)), "a path")
NAMES = Kind(_listed(_text), "names separated by commas")
WHOLES = Kind(_listed(_whole), "whole numbers separated by commas")
NUMBERS = Kind(_listed(_number), "numbers separated by commas")
RADII = Kind(_one_or_more, "a number, as 0.03 or 8/255, or several separated by commas")
ASSIGNMENTS = Kind(_assignments, "NAME=VALUE or PART.NAME=VALUE")
