"""What the subcommands share."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch

from purify.data import DATASETS, Dataset
from purify.evaluate.description import Description
from purify.evaluate.dryrun import duration
from purify.evaluate.ranks import Shard
from purify.evaluate.records import RunFolder

Run = Callable[[Any, str], int]  # arguments and the command -> exit status


def guarded(parser: argparse.ArgumentParser, run: Run, argv: list[str] | None) -> int:
    """Parse and run; returns the exit status. Bad input is one line on stderr and status 2."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # of --help, or of an error that is printed
        return int(done.code or 0)
    try:
        return run(args, shlex.join(sys.argv[1:] if argv is None else argv))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for what Python flushes at the end
        return 0
    except OSError as error:
        if error.filename is None and error.strerror is None:  # a network's, in its own words
            print(f"error: {error}", file=sys.stderr)
            return 2
        what = f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error})"
        print(f"error: {what}; what was finished is on disk.", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        advice = "lower --max-rows or --memory-budget and go on with the same --out; what was finished is on disk"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk, the same command resumes", file=sys.stderr)
        return 130


def note_shard(shard: Shard, folder: RunFolder) -> None:
    """Say what to do with a shard that is finished."""
    print(f"Shard {shard} is finished, {len(folder)} records; once all are: purify merge {folder.path.parent}")


def note_part(shard: Shard, own: int, samples: int, seconds: float) -> None:
    """Say what a shard takes, which has ``own`` of the samples."""
    print(f"Shard {shard} has {own} of {samples} samples: about {duration(seconds)}.")


def note_data(asked: Description, data: Dataset) -> None:
    """Say what data of one's own gets."""
    if asked.dataset not in DATASETS and data.like:
        print(f"note: {asked.dataset} has the shape of {data.like} and gets its score network and settings.")
