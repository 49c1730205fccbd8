#!/usr/bin/env bash
# torchattacks' wheels carry top-level packages of other projects, and pin an old requests.
#
# Seen with torchattacks 3.5.1 and 3.3.0, robustbench 1.1.1, mkdocs-material 9.8.2, Python 3.11:
# 1. torchattacks 3.5.1 installs 25 files of a package `robustbench`, an old copy. Installed after the real robustbench
#    1.1.1 it replaces 11 files that differ, among them the model tables: 76 Linf models on CIFAR-10 become 57, and
#    `pip check` and `pip show` see nothing. Installed before it, the real one wins. Nothing in pip decides the
#    order of two packages that do not depend on each other.
# 2. torchattacks >= 3.4 requires requests~=2.25.1 (of 2020). Where anything else needs a newer one (mkdocs-material), pip does not
#    fail but goes back to 3.3.0, which has no requirements at all, and whose wheel also holds a package `autoattack`.
# What a user should do: install robustbench last, with --no-deps --force-reinstall; ask for torchattacks>=3.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
quiet() { pip install -q --no-deps --disable-pip-version-check "$@" 2>/dev/null; }

table() {  # Linf models of the CIFAR-10 table as it lies on disk
    python - <<'PY'
import ast
import importlib.util
from pathlib import Path

folder = Path(next(iter(importlib.util.find_spec("robustbench").submodule_search_locations)))
tree = ast.parse((folder / "model_zoo" / "cifar10.py").read_text())
value = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "linf")
pairs = value.args[0].elts if isinstance(value, ast.Call) else value.keys
print(len(pairs))
PY
}

quiet robustbench==1.1.1
before=$(table)
quiet torchattacks==3.5.1
after=$(table)
echo "Linf models of robustbench 1.1.1: $before; after installing torchattacks 3.5.1: $after"
pip show -q robustbench
[ "$before" -gt "$after" ]

chosen=$(pip install --dry-run --ignore-installed --no-deps --quiet --disable-pip-version-check --report - torchattacks==3.3.0 2>/dev/null |
    python -c "import json, sys; print(json.load(sys.stdin)['install'][0]['metadata'].get('requires_dist'))")
echo "requirements that torchattacks 3.3.0 declares: $chosen"
[ "$chosen" = None ]
quiet torchattacks==3.3.0
python - <<'PY'
from importlib import metadata

tops = {str(f).split("/")[0] for f in metadata.files("torchattacks") if not str(f).startswith("torchattacks")}
print("top-level packages of torchattacks 3.3.0 beside its own:", sorted(t for t in tops if "." not in t))
assert {"autoattack", "robustbench"} <= tops
PY
