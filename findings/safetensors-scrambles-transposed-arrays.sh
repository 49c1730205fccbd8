#!/usr/bin/env bash
# safetensors.numpy writes transposed arrays in the order of their memory: images saved as N x C x H x W come back as mosaics,
# of the right shape, type and range, and without a word.
#
# Seen with safetensors 0.8.0, numpy 2.4.6, Python 3.11; 0.7.0 wrote them right (safetensors issue 825). numpy's transpose moves no
# data, it only changes the strides. Since 0.8.0 `save` and `save_file` hand on an array's address and length and leave the
# strides out. What pictures pass through on the way to a network is of that kind: images of Pillow, OpenCV or medmnist
# with `.transpose(0, 3, 1, 2)`, a tensor's `.permute(...).numpy()`, channels-last tensors, Fortran order (scikit-learn), slices of
# columns. Labels are contiguous and stay right, so an evaluation runs and gives numbers: a classifier's 92.6 % of coloured digits
# become 6.9 %. safetensors.torch refuses such tensors; numpy.savez writes them right.
# What a user should do: np.ascontiguousarray before saving, or read back and compare. Files of 0.8.0 with such arrays are spoilt.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 scikit-learn==1.9.1

cd "$work"
python - <<'PY'
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


def through(images, labels):
    save_file({"images": images, "labels": labels}, "set.safetensors")
    return load_file("set.safetensors")


digits = load_digits()
tint = np.random.default_rng(0).uniform(0.3, 1, (len(digits.images), 1, 1, 3))
pictures = (digits.images[..., None] / 16 * tint).astype(np.float32)  # N x H x W x C, as pictures are read
images, labels = pictures.transpose(0, 3, 1, 2), digits.target
classifier = LogisticRegression(max_iter=200).fit(images[:1000].reshape(1000, -1), labels[:1000])


def accuracy(stored):
    x, y = stored["images"][1000:], stored["labels"][1000:]
    return classifier.score(x.reshape(len(x), -1), y)


print(f"safetensors {version('safetensors')}, numpy {np.__version__}")
seen = {}
for name, given in (
    ("contiguous", np.ascontiguousarray(images)),
    ("transposed", images),
    ("Fortran order", np.asfortranarray(images)),
):
    stored = through(given, labels)
    assert stored["images"].shape == images.shape
    assert stored["images"].dtype == images.dtype
    assert np.array_equal(stored["labels"], labels)
    seen[name] = np.array_equal(stored["images"], images), accuracy(stored)
    low, high = stored["images"].min(), stored["images"].max()
    print(f"{name}: images as saved: {seen[name][0]}, range {low:.2f} to {high:.2f}, accuracy {seen[name][1]:.1%}")

np.savez("set.npz", images=images)
with np.load("set.npz") as file:
    print("numpy.savez, transposed: images as saved:", np.array_equal(file["images"], images))
if not seen["contiguous"][0] or seen["contiguous"][1] < 0.9:
    raise SystemExit("contiguous images do not come back either: this shows nothing")
if any(same or right > 0.5 for same, right in (seen["transposed"], seen["Fortran order"])):
    raise SystemExit("safetensors writes transposed arrays as they are now, or refuses them")
PY
