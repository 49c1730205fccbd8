"""``purify check``: whether a diffusion model is wired as it was trained."""

from __future__ import annotations

import argparse

import pandas as pd

from purify.checkpoints import default_score_model
from purify.checks import check_count, check_writable
from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.data import DATASETS
from purify.diffusion.health import Health, plot
from purify.diffusion.resize import needs_resize, resized
from purify.named import check_device, load_score
from purify.options import PATH, WHOLE
from purify.sources import resolve_data

ABOUT = """Denoise a few clean images at several noise levels, and compare the error with that of trivial denoisers and
of other readings of the network's output (prediction, schedule, time scale, range and order of channels). Ends with
status 1 if the network denoises no better than trivial ones, or another reading does much better."""


def parser(prog: str = "purify check") -> Parser:
    """All options."""
    c = Parser(prog=prog, description=ABOUT)
    data = f"one of {', '.join(DATASETS)}, or your own, as for purify attack (default: digits)"
    c.add_argument("--data", "--dataset", dest="dataset", default="digits", help=data)
    c.add_argument("--data-dir", type=taking(PATH), help="folder with the data set's files")
    c.add_argument(
        "--score-model", help="name or path, as for load_score_model, or file.py:function (default: the data set's)"
    )
    c.add_argument("--images", type=taking(WHOLE), default=32, help="images; fewer of large ones (default: 32)")
    c.add_argument("--seed", type=taking(WHOLE), default=0, help="keys the noise (default: 0)")
    c.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    c.add_argument("--out", type=taking(PATH), help="PNG file for a plot of the error against the noise level")
    return c


def run(args: argparse.Namespace, command: str) -> int:
    """Check, print and plot."""
    check_count(args.images, "images")
    data, device = resolve_data(args.dataset), check_device(args.device)
    check_count(args.seed, "--seed", 0)
    if args.out is not None:
        if args.out.suffix.lower() != ".png":
            raise ValueError(f"--out takes a .png file, got {args.out}.")
        check_writable(args.out)
    known = args.dataset if args.dataset in DATASETS else data.like or ""
    name = args.score_model or default_score_model(known)
    model = load_score(name, known).to(device)
    images = data.load("test", args.data_dir)[0][: args.images].to(device)
    if needs_resize(data.shape, model.image_shape):
        images = resized(images, model.image_shape or data.shape)
    found = model.check(images, args.images, seed=args.seed)
    print(f"{found.sentence}\n\nMean squared error in [-1, 1] space, {found.images} images\n{table(found).to_string()}")
    if args.out is not None:
        plot(found, args.out, f"{name} on {args.dataset}")
        print(f"Wrote {args.out}.")
    return 0 if found.passed else 1


def table(found: Health) -> pd.DataFrame:
    """Errors by noise level."""
    columns = {"noisy image, scaled": found.scaled, "mean image": found.mean, "as declared": found.declared.errors}
    if found.best != found.declared:
        columns["best reading"] = found.best.errors
    shown = {name: [f"{error:.4f}" for error in errors] for name, errors in columns.items()}
    return pd.DataFrame(shown, index=pd.Index([f"{s:.3g}" for s in found.levels], name="sigma / alpha"))


def main(argv: list[str] | None = None, prog: str = "purify check") -> int:
    """Check; returns the exit status."""
    return guarded(parser(prog), run, argv)
