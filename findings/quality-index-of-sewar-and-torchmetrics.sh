#!/usr/bin/env bash
# The universal quality index of a picture with itself is 1. torchmetrics gives 0.770, 0.309 or many millions below 0.
# sewar gives 1, but 0.88 behind noise where 0.26 is right, and 0.78 with the contrast turned round, where -0.69 is.
#
# Seen with torchmetrics 1.9.0, sewar 0.4.10, PyTorch 2.14.1, scipy 1.17.1, Python 3.11. The index compares means,
# variances and the covariance of two windows, and nothing is documented or said of either:
# 1. torchmetrics takes E[xy] - E[x]E[y] in the pictures' float32 and cuts variances at 0, but not the covariance. In a
#    flat window of 0 to 255 rounding leaves a negative number over an eps of 1e-7, and outweighs all other windows. In
#    black and dark windows of [0, 1] the eps is the larger: they count as 0 or little, so that digits fall with the
#    width of their frame. The index has no scale; torchmetrics' differs between the two.
# 2. sewar has the formula for sums over N = 64 pixels, N * sum(xy) - sum(x) * sum(y), but fills in means (scipy's
#    uniform_filter). The product of the means has 1 / 64 of its weight, and what is left is how alike the brightness
#    is. A blur passes for better than noise, where it is the other way round. With sums under the same function its
#    values are right.
# What a user should do: SSIM, whose constants are made for flat windows; or the index in float64, of windows that
# vary.
# shellcheck disable=SC1091
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torchmetrics==1.9.0 sewar==0.4.10 torch==2.14.1 scipy==1.17.1 numpy==2.4.6 \
    scikit-learn==1.9.1 pillow==13.0.0

python - <<'PY'
from importlib.metadata import version

import numpy as np
import sewar.full_ref
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import uniform_filter
from sewar.full_ref import uqi
from sklearn.datasets import load_digits, load_sample_image
from torch.nn.functional import interpolate, pad
from torchmetrics.functional.image import universal_image_quality_index

torch.set_num_threads(1)
china, flower = (load_sample_image(name) for name in ("china.jpg", "flower.jpg"))
noise = np.random.default_rng(0).normal(0, 1, china.shape)


def by_hand(x, y):
    """The index of each window of 8 x 8 and each colour, averaged; the brightness alone where nothing varies."""
    found = []
    for c in range(x.shape[2]):
        u, v = (sliding_window_view(i[..., c].astype(float), (8, 8)) for i in (x, y))
        a, b = u.mean((2, 3)), v.mean((2, 3))
        covariance = (u * v).mean((2, 3)) - a * b
        contrast, light = u.var((2, 3)) + v.var((2, 3)), a**2 + b**2
        flat = np.where(light > 0, 2 * a * b / np.maximum(light, 1e-12), 1)
        varied = 4 * covariance * a * b / np.maximum(contrast * light, 1e-12)
        found.append(np.where(contrast > 1e-9, varied, flat).mean())
    return np.mean(found)


def tensor(picture, scale):
    return torch.tensor(picture.transpose(2, 0, 1)[None], dtype=torch.float32) / scale


def torchmetric(x, y):
    return universal_image_quality_index(x, y).item()


print(f"torchmetrics {version('torchmetrics')}, sewar {version('sewar')}")
print(f"PyTorch {torch.__version__}, scipy {version('scipy')}")
digits = interpolate(torch.tensor(load_digits().images[:100, None] / 16, dtype=torch.float32), scale_factor=4)
same = {
    "china, 0 to 255": tensor(china, 1),
    "china, [0, 1]": tensor(china, 255),
    "flower, 0 to 255": tensor(flower, 1),
    "flower, [0, 1]": tensor(flower, 255),
    "100 digits of 32 x 32": digits,
    "in a black frame of 16": pad(digits, (16, 16, 16, 16)),
}
seen = {}
for name, picture in same.items():
    seen[name] = torchmetric(picture, picture)
    windows = universal_image_quality_index(picture, picture, reduction="none")
    print(
        f"torchmetrics, {name}, with itself: {seen[name]:.3f}; "
        f"windows from {windows.min():.3g} to {windows.max():.3g}, median {windows.median():.3f}"
    )
noisy = torchmetric(tensor(china + 10 * noise, 1), tensor(china, 1))
print(f"torchmetrics, china, 0 to 255, with noise of 10: {noisy:.3f}")


def sums(image, size):
    return uniform_filter(image, size) * size**2


local = uniform_filter(china.astype(float), (15, 15, 0))
pictures = {
    "itself": china,
    "with noise of 50": (china + 50 * noise).clip(0, 255).astype(np.uint8),
    "blurred over 15 pixels": local.astype(np.uint8),
    "contrast turned round": (2 * local - china).clip(0, 255).astype(np.uint8),
    "another picture": flower,
}
found, right = {}, {}
for name, picture in pictures.items():
    sewar.full_ref.uniform_filter = sums
    mended = uqi(china, picture)
    sewar.full_ref.uniform_filter = uniform_filter
    found[name], right[name] = uqi(china, picture), by_hand(china, picture)
    print(f"sewar, china, {name}: {found[name]:.3f}; by hand {right[name]:.3f}, sewar with sums {mended:.3f}")
    if abs(mended - right[name]) > 0.02:
        raise SystemExit("sewar with sums is something else, too: this shows nothing")

low = seen["flower, [0, 1]"], seen["in a black frame of 16"]
if seen["china, 0 to 255"] > -1 or max(low) > 0.9 or noisy < 0.4:
    raise SystemExit("torchmetrics knows a picture again now")
if abs(found["itself"] - 1) > 1e-6 or any(found[n] < right[n] + 0.2 for n in pictures if n != "itself"):
    raise SystemExit("sewar sees structure now")
blur, noise = "blurred over 15 pixels", "with noise of 50"
if found[blur] < found[noise] or right[blur] > right[noise]:
    raise SystemExit("sewar does not put the blur first now")
PY
