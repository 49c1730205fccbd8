#!/usr/bin/env bash
# torch.manual_seed does not seed torchsde: its noise hangs on numpy's old global generator, and on nothing else.
#
# Seen with torchsde 0.2.6, PyTorch 2.14.1, numpy 2.4.6, Python 3.11. Unless it is given a Brownian motion, sdeint draws one
# seed of 31 bits by np.random.randint and makes all noise of torch tensors from it. So:
# 1. after torch.manual_seed(0) two runs differ, where a loop of one's own with torch.randn repeats;
# 2. a run leaves torch's generator as it was and moves numpy's, which torch.random.fork_rng around it does not put back;
# 3. code that calls np.random.seed for its own ends, to choose a subset of images, say, makes the noise of unrelated
#    calls equal: draws that are averaged or counted as independent are one draw.
# What a library should do: pass bm=torchsde.BrownianInterval(..., entropy=...) with a seed drawn from torch's generator.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torchsde==0.2.6 torch==2.14.1 numpy==2.4.6

python - <<'PY'
from importlib.metadata import version

import numpy as np
import torch
import torchsde


class Noise(torch.nn.Module):
    """No drift, unit diffusion: the solution is the Brownian motion itself."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, x):
        return torch.zeros_like(x)

    def g(self, t, x):
        return torch.ones_like(x)


sde, start, times = Noise(), torch.zeros(4, 192), torch.tensor([0.0, 1.0])


def end(**options):
    return torchsde.sdeint(sde, start, times, method="euler", dt=0.1, **options)[-1]


def chosen(seed, of=1000):
    """Indices of a subset of images, the same in each call."""
    np.random.seed(seed)
    return np.random.choice(of, 16, replace=False)


def repeats(prepare):
    ends = []
    for _ in range(2):
        prepare()
        ends.append(end())
    return torch.equal(*ends)


def own_seed():
    seed = int(torch.randint(2**31 - 1, ()))
    return torchsde.BrownianInterval(0.0, 1.0, size=tuple(start.shape), entropy=seed)


print(f"torchsde {version('torchsde')}, PyTorch {torch.__version__}, numpy {np.__version__}")
np.random.seed()  # as a program starts
torch.manual_seed(0)
before = torch.get_rng_state()
place = np.random.get_state()[2]
with torch.random.fork_rng(devices=[]):
    end()
    untouched = torch.equal(before, torch.get_rng_state())
moved = np.random.get_state()[2] != place
print(f"a run moves torch's generator: {not untouched}; numpy's, though within torch.random.fork_rng: {moved}")
by_torch = repeats(lambda: torch.manual_seed(0))
print("torch.manual_seed(0) before each run, runs equal:", by_torch)
by_numpy = repeats(lambda: np.random.seed(0))
print("numpy.random.seed(0) before each run, runs equal:", by_numpy)

torch.manual_seed(0)
draws = []
for _ in range(8):  # eight "independent" draws, each beside a look at the same images
    chosen(3)
    draws.append(end())
spread, mean = torch.stack(draws).std(0).max().item(), torch.stack(draws).mean(0).std().item()
print(f"eight draws, a subset chosen before each: largest spread {spread:.3f}; std of their mean {mean:.3f}, not {8**-0.5:.3f}")

ends = []
for _ in range(2):
    torch.manual_seed(0)
    ends.append(end(bm=own_seed()))
print("with a Brownian motion seeded from torch, runs equal:", torch.equal(*ends))
assert torch.equal(*ends)
if not untouched or not moved or by_torch or not by_numpy or spread != 0:
    raise SystemExit("torchsde takes its seed from elsewhere now")
PY
