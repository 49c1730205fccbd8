"""Small immutable parts as plain data: {"kind": name, **fields}, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from purify.checks import choose, nearest
from purify.fingerprint import weights_digest
from purify.plugin import name_of

T = TypeVar("T")


def describe(part: Any, registry: Mapping[str, type]) -> dict[str, Any]:
    """The registered name (or ``file.py:Class``) and the dataclass fields of ``part``; of a network the fingerprint of
    its weights."""
    own = name_of(type(part))
    names = [name for name, kind in registry.items() if type(part) is kind] + ([own] if own else [])
    if not names:
        raise ValueError(f"{type(part).__name__} is not registered; add it to the registry to save it as a config.")
    return {"kind": names[0], **{f.name: _plain(getattr(part, f.name)) for f in dataclasses.fields(part)}}


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return weights_digest(value)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def build(config: Mapping[str, Any] | str, registry: Mapping[str, type[T]], what: str, beside: Iterable[str] = ()) -> T:
    """The part that ``describe`` described; a bare name stands for the part with its defaults.

    ``beside``: what may be meant by an unknown parameter, too, as the caller takes it itself.
    """
    fields = {"kind": config} if isinstance(config, str) else dict(config)
    kind = choose(fields.pop("kind", ""), registry, what)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        known |= set(beside)
        hint = nearest(unknown[0], known)
        raise ValueError(f"Unknown {what} parameter {', '.join(unknown)}{hint}; known: {', '.join(sorted(known))}.")
    missing = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.name not in fields and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"The {what} {config!r} lacks {', '.join(missing)}.")
    return kind(**fields)
