"""What the subcommands share."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from purify.data import DATASETS, Dataset
from purify.evaluate.runner import Samples
from purify.sources import resolve_data

DATA_HELP = (
    f"{', '.join(DATASETS)}; or your own: a folder with a folder of pictures for each class, a .npz or .safetensors "
    "with images and labels, or file.py:function (default: digits)"
)

Run = Callable[[argparse.Namespace, str], int]  # arguments and the command -> exit status


def guarded(parser: argparse.ArgumentParser, run: Run, argv: list[str] | None) -> int:
    """Parse and run; returns the exit status. Bad input is one line on stderr and status 2."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # of --help, or of an error that is printed
        return int(done.code or 0)
    try:
        return run(args, shlex.join(sys.argv[1:] if argv is None else argv))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        advice = "lower --batch-size or --max-rows, or set a smaller memory budget; what was finished is on disk"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is on disk, the same command resumes", file=sys.stderr)
        return 130


class _Renamed(argparse.Action):
    """Stores the value; says so if an old name was used."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if option == "--preset":
            print("note: --preset is now called --budget; the old name goes with version 0.3.", file=sys.stderr)


def add_budget(group: argparse._ArgumentGroup, known: Iterable[str]) -> None:
    """The option that names a budget of attacks or draws."""
    text = f"one of {', '.join(known)} (default: quick); --preset is its old name"
    group.add_argument("--budget", "--preset", action=_Renamed, dest="preset", default="quick", help=text)


def add_run_options(p: argparse.ArgumentParser, batch_size: int, gpu_rows: int) -> argparse._ArgumentGroup:
    """The options of every runner, in a group of their own, which is returned."""
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="keys all randomness (default: 0)")
    g.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    g.add_argument("--batch-size", type=int, default=batch_size, help="samples at once (default: %(default)s)")
    g.add_argument(
        "--max-rows", type=int, help=f"images times draws in the model at once (default: CPU 256, GPU {gpu_rows})"
    )
    g.add_argument("--threads", type=int, help="CPU threads for torch")
    g.add_argument("--out", type=Path, help="folder of the run; the same command resumes (default: below runs/)")
    return g


def numbers(text: str, what: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{what} takes numbers separated by commas, got {text!r}.") from error


def resolve(args: argparse.Namespace) -> Dataset:
    """The data set of --data, kept as ``args.data``; says what data of one's own gets."""
    args.data = resolve_data(args.dataset)
    if args.data.like:
        print(f"note: {args.dataset} has the shape of {args.data.like} and gets its score network and settings.")
    return args.data


def called(args: argparse.Namespace) -> str:
    """What a run's folder calls the data."""
    return args.dataset if args.dataset in DATASETS else Path(args.dataset.partition(":")[0]).stem


def load_samples(args: argparse.Namespace, n: int, device: torch.device) -> Samples:
    """The first ``n`` test images with their positions as ids."""
    images, labels = args.data.load("test", args.data_dir)
    if args.dataset not in DATASETS and args.n_examples is None:
        n = min(n, len(images))
    if n > len(images):
        raise ValueError(f"{args.dataset} has {len(images)} test images; --n-examples {n} is too many.")
    return Samples(images[:n].to(device), labels[:n].to(device), torch.arange(n))
