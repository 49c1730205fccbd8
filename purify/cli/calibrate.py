"""``purify calibrate``: measure the score norm on clean training images, for SSNI."""

from __future__ import annotations

import argparse

from purify.checkpoints import default_score_model
from purify.checks import check_count, check_writable, choose
from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.data import DATASETS, load_dataset
from purify.diffusion.resize import needs_resize
from purify.named import check_device, load_score
from purify.options import NUMBER, PATH, WHOLE
from purify.purification.scorenorm import FORMS, ScoreNorm, calibrate


def parser(prog: str = "purify calibrate") -> Parser:
    """All options."""
    default = ScoreNorm()
    c = Parser(prog=prog, description="Measure the score norm on clean training images, for SSNI.")
    c.add_argument("--dataset", default="digits", help=f"one of {', '.join(DATASETS)} (default: digits)")
    c.add_argument("--data-dir", type=taking(PATH), help="folder with the data set's files")
    c.add_argument(
        "--score-model", help="name or path, as for load_score_model, or file.py:function (default: the data set's)"
    )
    c.add_argument("--images", type=taking(WHOLE), default=1000, help="reference images (default: %(default)s)")
    c.add_argument("--form", default=default.form, help=f"one of {', '.join(FORMS)} (default: %(default)s)")
    c.add_argument("--draws", type=taking(WHOLE), default=default.draws, help="draws averaged (default: %(default)s)")
    c.add_argument("--t-min", type=taking(NUMBER), default=default.t_min, help="least time (default: %(default)s)")
    c.add_argument("--t-max", type=taking(NUMBER), default=default.t_max, help="greatest time (default: %(default)s)")
    c.add_argument("--seed", type=taking(WHOLE), default=0, help="keys the noise (default: 0)")
    c.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    c.add_argument("--out", type=taking(PATH), required=True, help="JSON file to write")
    return c


def run(args: argparse.Namespace, command: str) -> int:
    """Measure, write and print a calibration."""
    choose(args.dataset, DATASETS, "data set")
    check_count(args.images, "images", 2)
    check_count(args.seed, "--seed", 0)
    check_writable(args.out)
    norm = ScoreNorm(args.t_min, args.t_max, args.draws, args.form)
    device = check_device(args.device)
    model = load_score(args.score_model or default_score_model(args.dataset), args.dataset).to(device)
    resize = needs_resize(DATASETS[args.dataset].shape, model.image_shape)
    images = load_dataset(args.dataset, "train", args.data_dir)[0][: args.images].to(device)
    if len(images) < args.images:
        raise ValueError(f"{args.dataset} has {len(images)} training images; --images {args.images} is too many.")
    found = calibrate(model, images, norm, args.seed, progress=True, resize=resize)
    found.save(args.out)
    print(f"norm {found.mean:.4g} +- {found.std:.3g}, from {found.xi_min:.4g} to {found.xi_max:.4g}; wrote {args.out}")
    return 0


def main(argv: list[str] | None = None, prog: str = "purify calibrate") -> int:
    """Calibrate; returns the exit status."""
    return guarded(parser(prog), run, argv)
