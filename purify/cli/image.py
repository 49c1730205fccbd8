"""``purify image``: purify pictures of one's own and see what became of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from purify.checks import check_count, choose
from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.data import DATASETS
from purify.evaluate.pictures import panels, save, show_image
from purify.named import check_device
from purify.options import NUMBER, PATH, WHOLE
from purify.presets import find_preset
from purify.purification.outcomes import Purified
from purify.purification.purifier import Purifier
from purify.sources import read_arrays, read_picture, to_images
from purify.wrap import build_purifier

PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npz", ".safetensors")


@dataclass(frozen=True)
class Input:
    """Images (N, C, H, W) in [0, 1] of one file."""

    path: Path
    images: Tensor

    @property
    def is_picture(self) -> bool:
        return self.path.suffix.lower() in PICTURES


def parser(prog: str = "purify image") -> Parser:
    """All options."""
    p = Parser(prog=prog, description="Purify pictures: PNG, JPEG, folders of them, .npz or .safetensors with images.")
    p.add_argument("inputs", nargs="+", type=taking(PATH), help="files or folders")
    p.add_argument("--out", type=taking(PATH), required=True, help="folder for the purified images")
    p.add_argument("--overwrite", action="store_true", help="replace files in --out that are there already")
    p.add_argument("--picture", action="store_true", help="also a picture of before, diffused and after")
    p.add_argument("--purifications", type=taking(WHOLE), default=1, help="purifications of each image (default: 1)")
    p.add_argument("--dataset", default="digits", help="whose network and settings (default: digits)")
    p.add_argument("--score-model", help="name or path, as for load_score_model, or file.py:function")
    p.add_argument("--purifier", default="diffpure", help="as for purify attack (default: diffpure)")
    p.add_argument("--t-star", type=taking(NUMBER), help="noise level in (0, 1] (default: see purify list purifiers)")
    p.add_argument("--steps", type=taking(WHOLE), help="reverse steps")
    p.add_argument("--resize", action="store_true", help="bring pictures to the network's size, and back afterwards")
    p.add_argument("--grey", action="store_true", help="show coloured pictures to a network of one channel as grey")
    p.add_argument("--seed", type=taking(WHOLE), default=0, help="keys the noise (default: 0)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--batch-size", type=taking(WHOLE), default=16, help="images at once (default: 16)")
    return p


def main(argv: list[str] | None = None, prog: str = "purify image") -> int:
    """Purify pictures; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: argparse.Namespace, command: str) -> int:
    """Read everything, purify, write, and say what each image went through."""
    check_count(args.purifications, "purifications")
    check_count(args.batch_size, "batch size")
    check_count(args.seed, "--seed", 0)
    choose(args.dataset, DATASETS, "data set")
    find_preset(args.purifier)
    device = check_device(args.device)
    inputs = [read(path) for path in files(args.inputs)]
    targets = [target(args.out, one.path, r, args.purifications) for one in inputs for r in range(args.purifications)]
    pictures = [before_after(args.out, one.path) for one in inputs if args.picture]
    check_targets(targets + pictures, [one.path for one in inputs], args.out, args.overwrite)
    options = {name: getattr(args, name) for name in ("t_star", "steps") if getattr(args, name) is not None}
    purifier = build_purifier(args.purifier, args.score_model, args.dataset, **options).to(device)
    purifier = purifier.with_resize(args.resize)
    inputs = [fitted(one, purifier, args.resize, args.grey) for one in inputs]
    args.out.mkdir(parents=True, exist_ok=True)
    first = 0  # the sample id of a file's first image
    with tqdm(total=sum(len(one.images) for one in inputs) * args.purifications, unit="image") as bar:
        for one in inputs:
            results = [purified(purifier, one.images, first, r, args, bar) for r in range(args.purifications)]
            for r, result in enumerate(results):
                write(target(args.out, one.path, r, args.purifications), one, result.images)
                bar.write(summary(one, r, result))
            if args.picture:
                draw(before_after(args.out, one.path), purifier, one, results[0], first, args.seed)
            first += len(one.images)
    print(f"Wrote {len(targets)} file{'s' if len(targets) > 1 else ''} to {args.out}.")
    return 0


def files(inputs: Sequence[Path]) -> list[Path]:
    """The files that are named, and those in folders that are, sorted.

    Raises:
        ValueError: there is no such file, it is of another kind, or a folder holds none.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            own = sorted(p for p in path.iterdir() if p.suffix.lower() in (*PICTURES, *ARRAYS))
            if not own:
                raise ValueError(f"{path} holds no PNG, JPEG, .npz or .safetensors files; subfolders are not searched.")
            found += own
        elif not path.is_file():
            raise ValueError(f"There is no file {path}.")
        elif path.suffix.lower() not in (*PICTURES, *ARRAYS):
            raise ValueError(f"{path} is of no kind that is known; give PNG, JPEG, .npz or .safetensors.")
        else:
            found.append(path)
    return found


def read(path: Path) -> Input:
    """The images of a file."""
    if path.suffix.lower() in PICTURES:
        return Input(path, read_picture(path)[None].float().div(255))
    arrays = read_arrays(path)
    if "images" not in arrays:
        raise ValueError(f"{path} lacks images; it has {', '.join(arrays) or 'nothing'}.")
    return Input(path, to_images(arrays["images"], str(path)))


def target(out: Path, path: Path, purification: int, of: int) -> Path:
    """Where a purification of a file goes: its name, as PNG for pictures, numbered if there are several."""
    suffix = ".png" if path.suffix.lower() in PICTURES else path.suffix
    return out / f"{path.stem}{f'-{purification + 1}' if of > 1 else ''}{suffix}"


def before_after(out: Path, path: Path) -> Path:
    """Where the picture of a file's first purification goes."""
    return out / f"{path.stem}-before-after.png"


def check_targets(targets: Sequence[Path], inputs: Sequence[Path], out: Path, overwrite: bool) -> None:
    """Raise ValueError if a result would replace another, an input, or without ``overwrite`` anything."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder.")
    sources = {path.resolve() for path in inputs}
    for path in targets:
        if path.resolve() in sources:
            raise ValueError(f"{path} is an input and would be replaced; choose another --out.")
        if targets.count(path) > 1:
            raise ValueError(f"Two inputs would be written to {path}; purify them into two folders.")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is there already; pass --overwrite, or choose another --out.")


def fitted(one: Input, purifier: Purifier, resize: bool, grey: bool) -> Input:
    """The images with the network's channels.

    Raises:
        ValueError: they are of another size or colour than it takes, and nothing was said about it.
    """
    shape = purifier.score_model.image_shape
    images = one.images
    if shape is None:
        return one
    if images.shape[1] == 3 and shape[0] == 1:
        if not grey:
            raise ValueError(f"{one.path} is coloured but the network takes grey images; pass --grey.")
        images = images.mean(1, keepdim=True)
    if images.shape[1] == 1 and shape[0] == 3:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(shape[1:]) and not resize:
        raise ValueError(
            f"{one.path} is {images.shape[3]} x {images.shape[2]} pixels but the network takes {shape[2]} x {shape[1]};"
            " pass --resize to bring it to that size and back, or take another --score-model."
        )
    return Input(one.path, images.contiguous())


def purified(
    purifier: Purifier, images: Tensor, first: int, draw: int, args: argparse.Namespace, bar: tqdm
) -> Purified:
    """One purification of each image, in batches; noise by the position of the image among all."""
    parts = []
    device = next(purifier.parameters()).device
    for start in range(0, len(images), args.batch_size):
        batch = images[start : start + args.batch_size].to(device)
        ids = range(first + start, first + start + len(batch))
        with torch.no_grad():
            parts.append(purifier.purify(batch, sample_ids=ids, draw=draw, seed=args.seed))
        bar.update(len(batch))
    return Purified.joined(parts)


def write(path: Path, one: Input, images: Tensor) -> None:
    """A PNG of 8 bits, or the arrays in the kind of file that they came from.

    Raises:
        ValueError: it cannot be written; names the file.
    """
    try:
        if one.is_picture:
            from torchvision.transforms.functional import to_pil_image

            to_pil_image((images[0] * 255).round().to(torch.uint8)).save(path)
        elif path.suffix == ".npz":
            np.savez(path, images=images.numpy())
        else:
            from safetensors.torch import save_file

            save_file({"images": images.contiguous()}, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}).") from error


def summary(one: Input, purification: int, result: Purified) -> str:
    """A line on a purification: t* and network calls."""
    t, calls = result.t_star, result.network_calls
    levels = f"{float(t.min()):.3f}" if bool(t.min() == t.max()) else f"{float(t.min()):.3f} to {float(t.max()):.3f}"
    cost = "" if calls is None else f", {int(calls.max())} network calls"
    change = float((result.images - one.images).abs().mean())
    return f"{one.path.name}, purification {purification + 1}: t* {levels}{cost}, mean change {change:.3f}"


@torch.no_grad()
def draw(path: Path, purifier: Purifier, one: Input, result: Purified, first: int, seed: int) -> None:
    """Before, diffused to t* by the noise of the first purification if they were, and after; eight images at most."""
    n = min(8, len(one.images))
    device = next(purifier.parameters()).device
    noise = purifier.noise(n, device, range(first, first + n), 0, seed)
    u = 2 * purifier.resized(one.images[:n].to(device)) - 1
    shown: list[tuple[str, Tensor]] = [("before", one.images[:n]), ("after", result.images[:n])]
    if not purifier.rule.held:
        diffused = purifier.process(result.t_star[:n].to(device), noise, images=u).rounds[0].diffuse(u)
        shown.insert(1, ("diffused", ((diffused + 1) / 2).clamp(0, 1).cpu()))
    fig, axes = panels(1.6 * len(shown) + 0.4, 1.7 * n + 0.4, n, len(shown), squeeze=False)
    for column, (name, images) in enumerate(shown):
        axes[0][column].set_title(name, fontsize=9)
        for row in range(n):
            show_image(axes[row][column], images[row])
            if name == "diffused":
                axes[row][column].set_xlabel(f"t* {float(result.t_star[row]):.3f}", fontsize=8)
    save(fig, path)
