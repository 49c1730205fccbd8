"""Parsing of every command line: one sentence for what is wrong, with the nearest name that is right."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NoReturn

from purify.checks import nearest

SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Parser(argparse.ArgumentParser):
    """An argument parser that takes options whole and prints one sentence instead of its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message[:1].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As usual; an unknown option is named with the one that it resembles."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = unknown[0].partition("=")[0]
            hint = nearest(first, self._option_string_actions) if first.startswith("-") else ""
            self.error(f"unknown {'option' if first.startswith('-') else 'argument'} {first}{hint}")
        return found


def number(text: str) -> float:
    """A number or a fraction: 0.3 or 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 0.03 or 8/255") from None


def size(text: str) -> int:
    """Bytes: 1000000, 512M, 1.5G (powers of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, 512M or 1.5G")
    return int(float(found[1]) * SIZES[found[2].upper()])
