#!/usr/bin/env bash
# Probabilities averaged over ten draws, as `total += p / 10`, can be 1.0000001; torchmetrics takes these, and all others of the
# batch, for logits: a calibration error of 0.045 becomes 0.703.
#
# Seen with torchmetrics 1.9.0, PyTorch 2.14.1, Python 3.11. A randomised defence is judged by its mean answer over draws. Where a
# network is sure, each draw's softmax is exactly 1, and in float32 ten times 0.1 add up to 1.0000001 (as 11, 14, 18, 20, 22,
# 24, 25, 26, 29 and 30 equal shares exceed 1; 8, 16, 32, 50 and 100 do not). torchmetrics looks whether a batch lies in
# [0, 1]; if one number does not, by one bit, it puts softmax over all of the batch's rows, or sigmoid over its scores, after
# which each score above 1e-7 is on the positive side of 0.5. The rule for logits is documented; that means of probabilities fall under it is
# not, and nothing is said. What it changes hangs on the surest image, the number of draws and the batches: scores of one
# data set, some batches with the sigmoid and some without, are ranked against each other.
# What a user should do: torch.stack(draws).mean(0), which stays at 1, or clamp to [0, 1] before any metric.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torchmetrics==1.9.0 torch==2.14.1 numpy==2.4.6 scikit-learn==1.9.1

python - <<'PY'
from importlib.metadata import version

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassCalibrationError

torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
steps = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(150):
    for batch in torch.randperm(1200).split(100):
        steps.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        steps.step()
net.requires_grad_(False)
images, labels = x[1200:], y[1200:]


def draw():
    """Probabilities behind one draw of a randomised defence."""
    return net(images + 0.05 * torch.randn_like(images)).softmax(1)


def measured(p, batch):
    """Calibration error of all classes; accuracy and AUROC of "this is a 4", by the probability of that class."""
    metrics = MulticlassCalibrationError(10), BinaryAccuracy(), BinaryAUROC()
    for q, truth in zip(p.split(batch), labels.split(batch), strict=True):
        metrics[0].update(q, truth)
        for metric in metrics[1:]:
            metric.update(q[:, 4], (truth == 4).long())
    return tuple(metric.compute().item() for metric in metrics)


print(f"torchmetrics {version('torchmetrics')}, PyTorch {torch.__version__}; {len(images)} images")
seen = {}
for draws in (8, 10):
    torch.manual_seed(1)
    stack = torch.stack([draw() for _ in range(draws)])
    total = torch.zeros_like(stack[0])
    for p in stack:
        total += p / draws
    mean = stack.mean(0)
    assert torch.allclose(total, mean, rtol=0, atol=1e-6)
    for name, p in (("total += p / draws", total), ("stack.mean(0)", mean)):
        for batch in (len(images), 100):
            seen[draws, name, batch] = ece, accuracy, auroc = measured(p, batch)
            above, most = int((p > 1).any(1).sum()), p.max().item()
            print(
                f"{draws} draws, {name}, batches of {batch}: largest {most:.7f}, {above} images above 1; "
                f"ECE {ece:.3f}, accuracy of 'is a 4' {accuracy:.1%}, AUROC {auroc:.3f}"
            )
wrong, right = ([v for k, v in seen.items() if (k[:2] == (10, "total += p / draws")) == w] for w in (True, False))
if max(v[0] for v in right) > 0.1 or min(v[1] for v in right) < 0.95:
    raise SystemExit("the other means measure badly, too: this shows nothing")
if min(v[0] for v in wrong) < 0.3 or max(v[1] for v in wrong) > min(v[1] for v in right) - 0.02:
    raise SystemExit("torchmetrics takes a mean of 1.0000001 for a probability now")
PY
