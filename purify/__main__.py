"""The command ``purify`` (or ``python -m purify``)."""

from __future__ import annotations

import sys
from importlib import import_module

from purify.checks import nearest
from purify.cli import COMMANDS


def usage() -> str:
    """The list of subcommands."""
    lines = (f"  {name:12} {text}" for name, (_, text) in COMMANDS.items())
    about = "Diffusion-based adversarial purification: attacked with exact gradients, certified, compared."
    return "\n".join([f"usage: purify COMMAND [OPTION ...]\n\n{about}\n", *lines, "\npurify COMMAND --help"])


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; bad input is one line on stderr and status 2."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        import purify

        print(f"purify {purify.__version__}")
        return 0
    if words[0] not in COMMANDS:
        hint = nearest(words[0], COMMANDS)
        print(f"error: Unknown command {words[0]!r}{hint}; known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[words[0]][0])
    return module.main(words[1:], f"purify {words[0]}")


if __name__ == "__main__":
    sys.exit(main())
