"""The command ``purify`` (or ``python -m purify``)."""

from __future__ import annotations

import sys
from importlib import import_module

from purify.checks import nearest

# Subcommand -> (module with main(argv, prog), what it does); imported when it is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "attack": ("purify.cli.attack", "attack a purified classifier and report what holds"),
    "certify": ("purify.cli.certify", "certify smoothed classifiers, and attack them inside their radii"),
    "image": ("purify.cli.image", "purify pictures of your own"),
    "merge": ("purify.cli.merge", "shards of a run, run by independent processes, to the whole run"),
    "leaderboard": ("purify.cli.leaderboard", "finished runs to a page, Markdown, JSON and plots"),
    "compare": ("purify.cli.compare", "by how much defences of finished runs differ, image by image"),
    "list": ("purify.cli.list", "models, score models, purifiers, noise levels, attacks and data sets by name"),
    "calibrate": ("purify.cli.calibrate", "measure the score norm on clean images, for SSNI"),
    "check": ("purify.cli.check", "whether a diffusion model is wired as it was trained"),
    "download": ("purify.cli.download", "fetch public score networks"),
    "train": ("purify.train.__main__", "train a network of the embedded default, or one like it"),
}


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
