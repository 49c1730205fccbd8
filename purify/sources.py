"""Data of one's own: a folder of pictures, arrays in a file, or a function, as a :class:`~purify.data.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purify.checks import check_images, check_labels, nearest, short
from purify.data import DATASETS, Dataset, Loaded
from purify.plugin import call, is_in_file

SPLITS = ("train", "test")


def resolve_data(source: str | Path) -> Dataset:
    """The data set of this name, or one of one's own.

    Args:
        source: a name in ``purify.data.DATASETS``; a folder with a folder of PNG or JPEG files for each class
            (torchvision's ``ImageFolder``; with folders ``train`` and ``test`` these are its splits); a ``.npz`` or
            ``.safetensors`` with ``images`` and ``labels``; or ``file.py:function``, which returns both.

    Own images are float in [0, 1] or 8-bit, (N, C, H, W), (N, H, W, C) or (N, H, W); labels whole numbers (N,).
    Their shape and number of classes follow from them; radii, score network and settings are those of the built-in
    data set of the same shape, if there is one.

    Raises:
        ValueError: nothing of this name (the nearest is named), or what is there cannot be used.
    """
    if not isinstance(source, str | Path):
        raise ValueError(f"A data set is a name or a path, as 'digits' or 'arrays.npz', got {short(source)}.")
    source = str(source)
    if source in DATASETS:
        return DATASETS[source]
    load = loader(source)
    images, labels = load("test", None)
    shape, classes = (images.shape[1], images.shape[2], images.shape[3]), int(labels.max()) + 1
    like = next((name for name, known in DATASETS.items() if known.shape == shape), None)
    usual = DATASETS[like] if like else Dataset(load, shape, classes)
    return replace(usual, load=load, num_classes=classes, like=like)


class loader:
    """(split, data_dir) -> images, labels of a source; loads each split once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._loaded: dict[Path | str, Loaded] = {}

    def __call__(self, split: str, data_dir: Path | None) -> Loaded:
        place = self._place(split)
        if place not in self._loaded:
            self._loaded[place] = checked(*read(place), str(place))
        return self._loaded[place]

    def _place(self, split: str) -> Path | str:
        if is_in_file(self.source):
            return self.source
        path = Path(self.source)
        whole = all((path / name).is_dir() for name in SPLITS)
        return path / split if whole else path


def read(place: Path | str) -> tuple[Any, Any]:
    """Images and labels as they are stored."""
    if isinstance(place, str):
        found = call(place)
        if not (isinstance(found, (tuple, list)) and len(found) == 2):
            raise ValueError(f"{place} returned {type(found).__name__}; it must return (images, labels).")
        return found[0], found[1]
    if place.is_dir():
        return read_folder(place)
    if place.suffix in (".npz", ".safetensors") and place.is_file():
        arrays = read_arrays(place)
        missing = [name for name in ("images", "labels") if name not in arrays]
        if missing:
            raise ValueError(f"{place} lacks {' and '.join(missing)}; it has {', '.join(arrays) or 'nothing'}.")
        return arrays["images"], arrays["labels"]
    raise ValueError(
        f"Unknown data set {str(place)!r}{nearest(place, DATASETS)}; known: {', '.join(sorted(DATASETS))}, a folder of "
        "pictures in classes, a .npz or .safetensors with images and labels, or file.py:function."
    )


def read_arrays(path: Path) -> Mapping[str, Any]:
    """The arrays of a ``.npz`` or ``.safetensors``; no code runs.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # each library has kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read ({reason}).") from error


def read_folder(path: Path) -> tuple[Tensor, Tensor]:
    """Pictures in a folder for each class, in torchvision's order; grey where all of them are."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(path), loader=lambda name: read_picture(Path(name)))
        pictures = [found[i] for i in range(len(found))]
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} has no folder of PNG or JPEG files for each class ({reason}).") from error
    images = [picture for picture, _ in pictures]
    channels = max(len(image) for image in images)
    images = [image.expand(channels, -1, -1) for image in images]
    for (name, _), image in zip(found.samples, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{name} is {size(image)} pixels but {found.samples[0][0]} is {size(images[0])}; bring all pictures to "
                "one size."
            )
    return torch.stack(images), torch.tensor([label for _, label in pictures])


def size(image: Tensor) -> str:
    """Width x height."""
    return f"{image.shape[-1]} x {image.shape[-2]}"


def read_picture(path: Path) -> Tensor:
    """A PNG or JPEG as 8-bit values (C, H, W), turned as its EXIF says; one channel if it is grey.

    Raises:
        ValueError: it is no picture, truncated, has transparent pixels, or more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            stored = {str(tile[3]) for tile in opened.tile}  # how values are coded, until they are decoded
            picture = ImageOps.exif_transpose(opened)
            mode, clear = picture.mode, _transparent(picture, stored)
            plain = picture.convert("L" if mode in ("1", "L", "LA") or _grey_palette(picture) else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read ({str(error).splitlines()[0]}).") from error
    if mode.startswith(("I", "F")) or any(kind.endswith(";16B") for kind in stored):
        raise ValueError(f"{path} has more than 8 bits per channel; convert it to 8 bits first.")
    if clear:
        raise ValueError(f"{path} has transparent pixels, whose colour nobody sees; put it on a background first.")
    return torch.from_numpy(np.atleast_3d(np.array(plain))).permute(2, 0, 1).contiguous()


def _grey_palette(picture: Any) -> bool:
    """Whether a PIL picture has a palette, of greys alone: whatever its pixels take of it."""
    colours = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
    return len(colours) > 0 and bool((colours == colours[:, :1]).all())


def _transparent(picture: Any, stored: set[str]) -> bool:
    """Whether a pixel of a PIL picture is not opaque, or may not be: PIL misses transparent grey of 2 and 4 bits."""
    if stored & {"L;2", "L;4"}:
        return "transparency" in picture.info
    return bool(picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255)


def to_images(values: Any, what: str) -> Tensor:
    """Images as float (N, C, H, W) in [0, 1].

    Raises:
        ValueError: another shape, type or range.
    """
    x = _numbers(values, f"The images of {what}")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(f"The images of {what} have shape {tuple(x.shape)}; give (N, C, H, W) with 1 or 3 channels.")
    x = x.float().div(255) if x.dtype == torch.uint8 else x
    try:
        check_images(x)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return x.float().contiguous()


def _numbers(values: Any, which: str) -> Tensor:
    """Values as a tensor; ValueError for text and other objects."""
    if isinstance(values, Tensor):
        return values
    array = np.array(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{which} are of type {array.dtype} and no numbers; give numbers (labels from 0).")
    return torch.as_tensor(array)


def checked(values: Any, labels: Any, what: str) -> Loaded:
    """Images and labels of a source, as data sets have them."""
    images = to_images(values, what)
    y = _numbers(labels, f"The labels of {what}")
    try:
        check_labels(y.long() if not y.is_floating_point() and y.dtype != torch.bool else y, len(images))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return images, y.long()
