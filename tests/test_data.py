"""Data sets: a fixed split, the idx format, and clear errors."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from purify.data import DATASETS, DEBIAN_FASHION_MNIST, load_dataset, read_idx

needs_fashion = pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not here: install Debian's dataset-fashion-mnist"
)


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, _ = load_dataset("digits", "train")
    test, test_labels = load_dataset("digits", "test")
    assert train.shape == (1297, 1, 8, 8)
    assert test.shape == (500, 1, 8, 8)
    assert train.dtype == torch.float32
    assert float(test.min()) == 0.0
    assert float(test.max()) == 1.0
    assert hashlib.sha256(test_labels.numpy().tobytes()).hexdigest()[:16] == "bd2e9b7c2aa9b6b5"
    assert (test_labels.bincount() >= 45).all()
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in test)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path):
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([4, 0, 9], dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_from_idx_files_zipped_or_not(folder):
    images, labels = load_dataset("fashion_mnist", "test", folder)
    assert images.shape == (3, 1, 28, 28)
    assert images[0, 0, 0, :3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])
    assert labels.tolist() == [4, 0, 9]


def test_torchvisions_layout_is_found(folder):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in list(folder.glob("t10k*")):
        path.rename(raw / path.name)
    assert len(load_dataset("fashion_mnist", "test", folder)[0]) == 3


@needs_fashion
def test_fashion_mnist_of_debian():
    images, labels = load_dataset("fashion_mnist", "test")
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10


def test_damaged_idx_files(tmp_path, folder):
    whole = idx(np.zeros((2, 28, 28), np.uint8))
    cases = {
        "short": (whole[:-5], "it is truncated"),
        "foreign": (b"PNG" + whole, "is not an idx file of 3-dimensional"),
        "empty": (b"", "is not an idx file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / name, 3)
    zipped = tmp_path / "cut.gz"
    zipped.write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(zipped, 3)
    content = bytearray(gzip.compress(whole))
    content[20:40] = b"\xff" * 20
    zipped.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(zipped, 3)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        load_dataset("fashion_mnist", "test", folder)


def test_other_idx_files_are_not_fashion_mnist(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([4, 77, 9], dtype=np.uint8)))
    with pytest.raises(ValueError, match="are not Fashion-MNIST"):
        load_dataset("fashion_mnist", "test", folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnist", "dataset-fashion-mnist"),
        ("cifar10", "download=True"),
        ("cifar100", "download=True"),
        ("imagenet", "validation images are not in"),
        ("svhn", "Unknown data set 'svhn'; known: cifar10"),
    ],
)
def test_missing_data(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(name, "test", tmp_path)


def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    """The real loader on a small folder made here (checksums of the real files are not to be had)."""
    import pickle

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    (base / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [3, 8]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    images, labels = load_dataset("cifar10", "test", tmp_path)
    assert labels.tolist() == [3, 8]
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, torch.from_numpy(data.reshape(2, 3, 32, 32)).float() / 255)


def test_metadata_is_consistent():
    for name, dataset in DATASETS.items():
        assert set(dataset.eps) <= {"Linf", "L2", "L1"}, name
        assert dataset.num_classes > 1
