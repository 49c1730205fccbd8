#!/usr/bin/env bash
# Copies of a compiled module, by copy.deepcopy or torch.save, lose the hooks that were registered on it: they compute
# something else, without a word.
#
# Seen with PyTorch 2.14.1, Python 3.11. torch.compile(module) returns a module, on which forward hooks can be registered
# and run, as on any: one that normalises the input, say. A copy of a plain module keeps its hooks. A copy of a compiled one, deep
# or saved and loaded, is compiled again and looks the same, attributes included (these are the inner module's), but no hook of
# the compiled module is left: its __reduce__ tells what was compiled and how, and no state. Hooks of the module inside,
# registered before it was compiled, are kept.
# What a library should do: copy the module inside (`_orig_mod`) and compile the copy, or refuse hooks on the outside.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torch==2.14.1 numpy

python - <<'PY'
import copy
import io

import torch
from torch import nn


def doubled(module, inputs):
    return (2 * inputs[0],)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # of our own making


def compiled(module):
    return torch.compile(module, backend="eager")


class Identity(nn.Module):
    def forward(self, x):
        return x


def made(around, inside):
    """An identity with a hook that doubles, inside or outside."""
    module = Identity()
    (module if inside else (module := around(module))).register_forward_pre_hook(doubled)
    module = around(module) if inside else module
    module.note = "kept"
    return module


print(f"PyTorch {torch.__version__}")
one = torch.ones(1)
for name, around, inside, expected in (
    ("plain module, hook", lambda module: module, False, 2),
    ("compiled module, hook inside", compiled, True, 2),
    ("compiled module, hook on it", compiled, False, 1),
):
    module = made(around, inside)
    copies = copy.deepcopy(module), saved(module)
    found = [int(m(one)) for m in (module, *copies)]
    print(f"{name}: it says {found[0]}, its deep copy {found[1]}, saved and loaded {found[2]}")
    assert found[0] == 2
    assert all(m.note == "kept" and type(m) is type(module) for m in copies)
    if found[1:] != [expected, expected]:
        raise SystemExit("copies of compiled modules treat hooks otherwise now")
PY
