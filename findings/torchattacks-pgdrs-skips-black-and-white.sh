#!/usr/bin/env bash
# torchattacks' attacks on smoothed classifiers, PGDRS and PGDRSL2, no longer move a pixel that is black or white: since
# PyTorch 2.14 they leave most of a digit alone, and a classifier that they broke with 2.13 looks robust.
#
# Seen with torchattacks 3.5.1, PyTorch 2.14.1, Python 3.11. Both attacks clamp the image to [0, 1] before they add the noise,
# inside the graph. Up to PyTorch 2.13 the slope of clamp at its bounds is 1; from 2.14 on it is 0. So the gradient is exactly 0
# at pixels of 0 and 1, their step is sign(0) = 0, and it stays so in every later step. Nothing is said, the other pixels move
# as ever, and an image of black and white only comes back as it was. Of the digits that a network smoothed by noise of 0.25
# gets right, 43.4 % are left at L_inf 0.2, where PyTorch 2.13.0 leaves 5.1 %. Started a millionth inside [0, 1], the same
# attacks are as strong as before. Attacks that clamp outside the graph (torchattacks' PGD) keep their strength.
# What a library should do: clamp without a gradient, or start inside; a user: look for pixels that no attack ever moves.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 torchattacks==3.5.1 numpy==2.4.6 scikit-learn==1.9.1

python - <<'PY'
from importlib.metadata import version

import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, one_hot

torch.set_num_threads(1)
sigma = 0.25
digits = load_digits()
x = interpolate(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), scale_factor=2)
y = torch.tensor(digits.target)
torch.manual_seed(0)
first, second = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
steps = torch.optim.Adam(net.parameters(), 3e-3)
for _ in range(20):
    for batch in torch.randperm(1500).split(100):
        steps.zero_grad()
        cross_entropy(net(x[batch] + sigma * torch.randn_like(x[batch])), y[batch]).backward()
        steps.step()
net.eval().requires_grad_(False)


def smoothed(images):
    """The class with most votes of 100 noisy copies."""
    votes = [one_hot(net(images + sigma * torch.randn_like(images)).argmax(1), 10) for _ in range(100)]
    return torch.stack(votes).sum(0).argmax(1)


right = smoothed(x[1500:]) == y[1500:]
images, labels = x[1500:][right], y[1500:][right]
ends = (images == 0) | (images == 1)
print(f"torchattacks {version('torchattacks')}, PyTorch {torch.__version__}")
print(f"{len(images)} digits, all right; {ends.float().mean():.1%} of their pixels are black or white")
pixels = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
print("slope of clamp(x, 0, 1) at 0, 0.5, 1:", torch.autograd.grad(pixels.clamp(0, 1).sum(), pixels)[0].tolist())

seen = {}
for attack, eps in ((torchattacks.PGDRS, 0.2), (torchattacks.PGDRSL2, 2.0)):
    for where, start in (("as they are", images), ("a millionth inside", images.clamp(1e-6, 1 - 1e-6))):
        torch.manual_seed(1)
        found = attack(net, eps=eps, alpha=eps / 4, steps=10, noise_sd=sigma)(start, labels)
        moved = found != start
        left = (smoothed(found) == labels).float().mean().item()
        seen[attack, where] = left, moved[ends].float().mean().item()
        print(
            f"{attack.__name__}, eps {eps}, images {where}: {left:.1%} still right; "
            f"moved {moved[ends].float().mean():.1%} of black and white pixels, {moved[~ends].float().mean():.1%} of others"
        )

for attack in (torchattacks.PGDRS, torchattacks.PGDRSL2):
    (left, moved), (left_inside, moved_inside) = (seen[attack, w] for w in ("as they are", "a millionth inside"))
    if moved_inside < 0.4 or left_inside > 0.2:
        raise SystemExit(f"{attack.__name__} is weak inside [0, 1] too: this shows nothing")
    if moved > 0 or left < left_inside + 0.1:
        raise SystemExit(f"{attack.__name__} moves black and white pixels now")
PY
