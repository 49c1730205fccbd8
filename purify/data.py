"""Data sets as tensors: images float32 (N, C, H, W) in [0, 1] and labels int64 (N,)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from purify.checks import choose, short

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
IDX_FILES = {"train": "train", "test": "t10k"}

Loaded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Dataset:
    """A data set: how to load a split, and the facts that commands need before loading it.

    Attributes:
        load: (split, data_dir) -> images, labels.
        shape: (C, H, W); for ImageNet after RobustBench's resize and crop.
        eps: the usual radius per threat model.
        like: of data of one's own: the built-in data set of the same shape, whose networks and settings it gets.
        score_model: public or embedded score network that was trained on it; None: none is known.
    """

    load: Callable[[str, Path | None], Loaded]
    shape: tuple[int, int, int]
    num_classes: int
    eps: dict[str, float] = field(default_factory=dict)
    score_model: str | None = None
    like: str | None = None


def load_dataset(name: str, split: str = "test", data_dir: str | Path | None = None) -> Loaded:
    """Images and labels of a split (``train`` or ``test``) of one of ``DATASETS``.

    Raises:
        ValueError: unknown name or split, files missing (says which and where to put them), truncated or foreign.
    """
    dataset = choose(name, DATASETS, "data set")
    choose(split, IDX_FILES, "split")
    if not isinstance(data_dir, str | Path | None):
        raise ValueError(f"data_dir must be a folder with the data set's files, got {short(data_dir)}.")
    return dataset.load(split, None if data_dir is None else Path(data_dir))


def load_digits(split: str, data_dir: Path | None) -> Loaded:
    """scikit-learn's bundled 8x8 digits; a fixed stratified split into 1297 training and 500 test images."""
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    digits = bundled()
    images = torch.from_numpy(digits.images).float().div(16)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=500, random_state=0, stratify=digits.target)
    rows = torch.from_numpy(np.sort(train) if split == "train" else test)
    return images[rows], labels[rows]


def load_fashion_mnist(split: str, data_dir: Path | None) -> Loaded:
    """Fashion-MNIST from idx files (plain or .gz) in ``data_dir``, torchvision's layout below it, or Debian's."""
    folders = [DEBIAN_FASHION_MNIST] if data_dir is None else [data_dir, data_dir / "FashionMNIST" / "raw"]
    prefix = IDX_FILES[split]
    images = read_idx(_find(folders, f"{prefix}-images-idx3-ubyte"), ndim=3)
    labels = read_idx(_find(folders, f"{prefix}-labels-idx1-ubyte"), ndim=1)
    if len(images) != len(labels):
        raise ValueError(f"Fashion-MNIST has {len(images)} images but {len(labels)} labels; fetch the files again.")
    if images.shape[1:] != (28, 28) or (len(labels) and labels.max() > 9):
        raise ValueError(f"The files in {folders[0]} are not Fashion-MNIST (28x28 images, labels 0 to 9).")
    return torch.from_numpy(images).float().div(255)[:, None], torch.from_numpy(labels).long()


def _find(folders: list[Path], name: str) -> Path:
    for folder in folders:
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"Fashion-MNIST is not in {' or '.join(map(str, folders))}: put {name}.gz (and the other idx files) there, "
        "install Debian's package dataset-fashion-mnist, or let torchvision.datasets.FashionMNIST(root, download=True) "
        "fetch it and pass --data-dir root."
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An unsigned-byte idx file (the MNIST format), gzipped or not, as a writable array of ``ndim`` dimensions."""
    opener: Callable[[Path], gzip.GzipFile] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    try:
        with opener(path, "rb") as f:  # type: ignore[call-arg]
            content = f.read()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch the file again.") from error
    if len(content) < 4 + 4 * ndim or content[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(f"{path} is not an idx file of {ndim}-dimensional unsigned bytes; fetch the file again.")
    shape = tuple(np.frombuffer(content, ">u4", count=ndim, offset=4).astype(int))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} bytes instead of {shape}: it is truncated; fetch it again.")
    return values.reshape(shape).copy()


def load_cifar(kind: str) -> Callable[[str, Path | None], Loaded]:
    """Loader of torchvision's ``CIFAR10`` or ``CIFAR100``; ``data_dir`` holds its extracted folder."""

    def load(split: str, data_dir: Path | None) -> Loaded:
        from torchvision import datasets

        root = data_dir or Path("data")
        try:
            data = getattr(datasets, kind)(root=str(root), train=split == "train", download=False)
        except RuntimeError as error:
            raise ValueError(
                f"{kind} is not in {root}: pass --data-dir with torchvision's files, or fetch them once with "
                f"torchvision.datasets.{kind}({str(root)!r}, download=True)."
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float().div(255)
        return images.contiguous(), torch.tensor(data.targets, dtype=torch.int64)

    return load


def load_imagenet(split: str, data_dir: Path | None) -> Loaded:
    """ImageNet's first 5000 images in RobustBench's order, resized to 256 and cropped to 224."""
    if split == "train":
        raise ValueError("ImageNet's training split does not fit in memory; only split='test' (val) is offered.")
    root = data_dir or Path("data")
    if not (root / "val").is_dir():
        raise ValueError(f"ImageNet's validation images are not in {root / 'val'}: put the class folders there.")
    from purify.compat import import_robustbench

    data = import_robustbench().data
    try:
        images, labels = data.load_imagenet(5000, str(root), data.PREPROCESSINGS["Res256Crop224"])
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{root / 'val'} lacks some of ImageNet's 1000 class folders ({error}).") from error
    return images, labels


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(load_digits, (1, 8, 8), 10, {"Linf": 0.3, "L2": 1.0, "L1": 4.0}, "digits"),
    "fashion_mnist": Dataset(
        load_fashion_mnist, (1, 28, 28), 10, {"Linf": 0.1, "L2": 1.5, "L1": 10.0}, "fashion_mnist"
    ),
    "cifar10": Dataset(
        load_cifar("CIFAR10"), (3, 32, 32), 10, {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}, "score-sde-cifar10"
    ),
    "cifar100": Dataset(load_cifar("CIFAR100"), (3, 32, 32), 100, {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}),
    "imagenet": Dataset(load_imagenet, (3, 224, 224), 1000, {"Linf": 4 / 255, "L2": 3.0}, "guided-imagenet256"),
}
