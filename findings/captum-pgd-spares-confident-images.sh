#!/usr/bin/env bash
# Captum's FGSM and PGD leave a pixel as it is where its gradient is below 1e-6: images that a network is sure of come back
# untouched, and an undefended network passes for robust.
#
# Seen with Captum 0.9.0, PyTorch 2.14.1, Python 3.11. A step of sign(gradient) asks only for signs, so the scale of the loss
# should not matter. Captum first compares each pixel's gradient with 1e-6: an attribute of FGSM, `zero_thresh`, which PGD steps
# by as well and its documentation does not name. The surer a network, the smaller its gradients: of digits of 16 x 16 pixels,
# half come back without one pixel changed, at eps 0.3, and all of these are still classified right. With the threshold set to 0,
# the same attack fools the network on every image. Training for longer makes it "more robust", and so do logits times 2,
# which change no answer.
# What a library should do: step wherever the gradient is not exactly 0, and say which images got none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check captum==0.9.0 torch==2.14.1 numpy==2.4.6 scikit-learn==1.9.1

python - <<'PY'
import warnings
from importlib.metadata import version

import torch
from captum.robust import PGD
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

warnings.simplefilter("ignore")
torch.set_num_threads(1)
digits = load_digits()
x = interpolate(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), scale_factor=2)
y = torch.tensor(digits.target)


def trained(epochs):
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    steps = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):
            steps.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            steps.step()
    return net.requires_grad_(False)


def left(net, scale, threshold):
    """Of the images that are classified right: how many still are, and how many have no pixel changed."""
    right = net(x[1500:]).argmax(1) == y[1500:]
    images, labels = x[1500:][right], y[1500:][right]
    attack = PGD(lambda v: scale * net(v), nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
    if threshold is not None:
        attack.fgsm.zero_thresh = threshold
    found = attack.perturb(images, radius=0.3, step_size=0.05, step_num=20, target=labels)
    same = (found == images).flatten(1).all(1)
    return (net(found).argmax(1) == labels).float().mean().item(), same.float().mean().item()


print(f"Captum {version('captum')}, PyTorch {torch.__version__}")
seen = {}
for epochs, scale in ((15, 1), (60, 1), (60, 2)):
    net = trained(epochs)
    for threshold in (None, 0):
        seen[epochs, scale, threshold] = robust, same = left(net, scale, threshold)
        said = "as it comes" if threshold is None else "threshold 0"
        print(f"{epochs} epochs, logits x {scale}, {said}: {robust:.1%} still right, {same:.1%} of the images untouched")

short, long, doubled = (seen[key] for key in seen if key[2] is None)
if max(robust for key, (robust, _) in seen.items() if key[2] == 0) > 0.05:
    raise SystemExit("the attack fails without the threshold too: this shows nothing")
if not 0.05 < short[0] < long[0] < doubled[0] or min(short[1], long[1], doubled[1]) < 0.05:
    raise SystemExit("Captum's PGD steps on small gradients now")
PY
