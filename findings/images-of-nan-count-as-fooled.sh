#!/usr/bin/env bash
# Attacks return images of nothing but NaN, and foolbox counts these as fooled, unless their class is number 0.
#
# Seen with foolbox 3.3.4, torchattacks 3.5.1, PyTorch 2.14.1, Python 3.11:
# 1. foolbox' NewtonFoolAttack divides by the fourth power of the gradient's norm. Its first step leaps to the ends of the pixel
#    range; where the network is sure of its answer there, the divisor underflows to 0, and 0 / 0 takes the image. A plainly
#    trained network on digits: most images, whatever eps.
# 2. torchattacks' DeepFool divides by the gradient's norm, which is 0 behind a defence that rounds its input: all images.
# NaN pixels make NaN logits, and argmax of these is 0. So foolbox' `success` and a user's `argmax(1) != y` alike call such an
# image fooled if its class is 1 to 9 and robust if it is 0; neither library says a word, and clipping to eps or to [0, 1]
# keeps NaN. What reads as a broken defence is one without gradients.
# What a library should do: ask for finite images before it counts, and refuse others.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 foolbox==3.3.4 torchattacks==3.5.1 numpy==2.4.6 \
    scikit-learn==1.9.1

python - <<'PY'
from importlib.metadata import version

import foolbox
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

torch.set_num_threads(1)
digits = load_digits()
x = interpolate(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), scale_factor=2)
y = torch.tensor(digits.target)
torch.manual_seed(0)
first, second = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
steps = torch.optim.Adam(net.parameters(), 3e-3)
for _ in range(30):
    for batch in torch.randperm(1500).split(100):
        steps.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        steps.step()
net.eval()


class Rounded(nn.Module):
    """The network behind a reduction of pixels to 4 bits."""

    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, v):
        return self.net((v * 15).round() / 15)


rounded = Rounded().eval()
images, labels = x[1500:1600], y[1500:1600]
right = (net(images).argmax(1) == labels) & (rounded(images).argmax(1) == labels)
images, labels = images[right], labels[right]


def judge(name, found, fooled):
    gone = found.isnan().flatten(1).all(1)
    zeros, others = gone & (labels == 0), gone & (labels != 0)
    print(f"{name}: {len(found)} images, {int(gone.sum())} of them NaN all over; of these are counted as fooled")
    for kind, which in (("classes 1 to 9", others), ("class 0", zeros)):
        print(f"    {int(fooled[which].sum())} of {int(which.sum())} of {kind}")
    if not (int(gone.sum()) > len(found) / 2 and zeros.any() and fooled[others].all() and not fooled[zeros].any()):
        raise SystemExit(f"{name} gives other images or counts them otherwise now")


print(f"foolbox {version('foolbox')}, torchattacks {version('torchattacks')}, PyTorch {torch.__version__}")
assert net(torch.full_like(images[:1], torch.nan)).argmax().item() == 0

attack = foolbox.attacks.NewtonFoolAttack(steps=5)
_, (loose, tight), success = attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), images, labels, epsilons=[2.0, 0.01])
judge("foolbox NewtonFool, plain network, eps 2", loose, success[0])
judge("foolbox NewtonFool, plain network, eps 0.01", tight, success[1])

found = torchattacks.DeepFool(rounded)(images, labels)
judge("torchattacks DeepFool, rounded input", found, rounded(found).argmax(1) != labels)
PY
