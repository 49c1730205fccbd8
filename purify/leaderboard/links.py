"""Where the files of a row's run are, seen from the page, and its command without paths of one machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from purify.evaluate.records import curve_picture, samples_picture
from purify.leaderboard.certified import CertifiedRow
from purify.leaderboard.rows import Row

FILES = ("result.json", "records.jsonl", "manifest.json", "run.yaml")  # the last: what to run again
# the folders of an absolute path that begins a word, or follows = or a comma
ABSOLUTE = re.compile(r"""(?<![^\s=,'"])(?:[A-Za-z]:)?[/\\](?:[^\s=,'"]*[/\\])?(?=[^\s=,'"/\\])""")


def relative(path: Path, folder: Path) -> str:
    """The path, seen from ``folder``: valid as long as both are moved together."""
    return Path(os.path.relpath(path, folder)).as_posix()


def files(row: Row | CertifiedRow, folder: Path) -> dict[str, str]:
    """The files of a row's run that exist, by name."""
    return {name: relative(path, folder) for name in FILES if (path := Path(row.run) / name).is_file()}


def pictures(row: Row | CertifiedRow, folder: Path) -> list[dict[str, str]]:
    """The pictures that a row's run has of it: file and description."""
    run = Path(row.run)
    if isinstance(row, CertifiedRow):
        path, shown = curve_picture(run, row.norm), f"certified accuracy against {row.norm} radius"
    else:
        path, shown = samples_picture(run, row.name), "images before and after the attack, and purified"
    return [{"file": relative(path, folder), "title": f"{row.name}: {shown}"}] if path.is_file() else []


def portable(text: str) -> str:
    """The text with absolute paths cut to their last part: the folders of one machine say nothing on another."""
    return ABSOLUTE.sub("", text)


def command(row: Row | CertifiedRow) -> str:
    """What made a row's run: a command line, or what a run from Python says of itself."""
    script = "run_certify.py" if isinstance(row, CertifiedRow) else "run_autoattack.py"
    options = portable(row.command)
    return f"python benchmarks/{script} {options}".rstrip() if options[:1] in ("", "-") else options
