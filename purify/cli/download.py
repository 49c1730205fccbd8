"""``purify download``: fetch public score networks, going on where an earlier attempt stopped."""

from __future__ import annotations

import argparse

from purify.checkpoints.public import PUBLIC, fetch, path_of
from purify.cli.parsing import Parser
from purify.cli.shell import guarded


def parser(prog: str = "purify download") -> Parser:
    """All options."""
    d = Parser(prog=prog, description="Fetch public score networks, going on where an earlier attempt stopped.")
    d.add_argument("names", nargs="*", help=f"{', '.join(PUBLIC)}, or OWNER/REPOSITORY of diffusers (none: list them)")
    return d


def run(args: argparse.Namespace, command: str) -> int:
    """Fetch what is named and say where it is and what it hashes to; or list what there is."""
    for name in args.names:
        path_of(name)  # an unknown name stops everything
    for name in args.names:
        print(f"{name}: {fetch(name)}")
    if not args.names:
        print("\n".join(f"{name}: {entry.about}; {entry.file} from {entry.page}" for name, entry in PUBLIC.items()))
    return 0


def main(argv: list[str] | None = None, prog: str = "purify download") -> int:
    """Download; returns the exit status."""
    return guarded(parser(prog), run, argv)
