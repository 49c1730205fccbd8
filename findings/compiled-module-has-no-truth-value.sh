#!/usr/bin/env bash
# A module compiled by torch.compile has no truth value, unless it has a length.
#
# Seen with torch 2.14.1, Python 3.11. A torch.nn.Module has neither __bool__ nor __len__, so it is true. What torch.compile
# returns for a module defines __len__ for all, which hands on to the module and raises where that has none. So
# `if model:`, `model or default` and `bool(model)` raise a TypeError ("Linear does not support len()") as soon as a user
# compiles the model, while isinstance(model, torch.nn.Module) still holds. Containers with a length keep theirs.
# What a library should do: ask `model is not None`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install -q --disable-pip-version-check torch==2.14.1

python - <<'PY'
import torch

linear, two = torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
assert bool(linear)
assert bool(two)
compiled = torch.compile(linear)
assert isinstance(compiled, torch.nn.Module)
try:
    bool(compiled)
except TypeError as error:
    print(f"torch {torch.__version__}: bool of a compiled Linear raises TypeError: {error}")
else:
    raise SystemExit("a compiled Linear has a truth value now")
assert bool(torch.compile(two))
print("bool of a compiled Sequential of two:", bool(torch.compile(two)))
PY
