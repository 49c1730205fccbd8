"""Makes ``import robustbench`` work on a plain install, where its dependency ``autoattack`` cannot be had by pip.

``import purify`` appends a finder to ``sys.meta_path``: where no installed package provides ``autoattack``, the
name resolves to a stand-in over ``pyautoattack`` with the original's interface. An installed ``autoattack`` always
comes first. This is the one thing that purify changes outside itself.

A second finder resolves the module names of version 0.1, with a DeprecationWarning, until 0.3.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module, metadata, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _StandIn(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "autoattack":
            from purify.attacks.autoattack import AutoAttack

            module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
        else:
            module.EvaluationState = _state_class()  # type: ignore[attr-defined]


def _state_class() -> type:
    """pyautoattack's state of an evaluation, read back with flags of which RobustBench can take the mean."""
    base: Any = import_module("pyautoattack.state").EvaluationState

    class EvaluationState(base):
        @classmethod
        def from_disk(cls, path: Path) -> Any:
            found = super().from_disk(path)
            found._robust_flags = found._robust_flags.float()
            return found

    return EvaluationState


class AutoAttackFinder(MetaPathFinder):
    """Finds ``autoattack`` and ``autoattack.state`` last, and only where ``pyautoattack`` is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ("autoattack", "autoattack.state") or util.find_spec("pyautoattack") is None:
            return None
        return ModuleSpec(fullname, _StandIn(), origin="purify", is_package=fullname == "autoattack")


# Modules of version 0.1 -> where they are now.
MOVED = {
    **{name: f"diffusion.{name}" for name in ("schedule", "noise", "precision", "score", "reverse", "resize")},
    **{name: f"purification.{name}" for name in ("scorenorm", "levels", "guidance", "process", "plans")},
    **{name: f"purification.{name}" for name in ("gradients", "purifier", "defended")},
    "downloads": "weights.downloads",
    "networks.files": "weights.files",
    "networks.loading": "weights.loading",
    "zoo.architectures": "networks.embedded",
    "evaluate.models": "named",
    "evaluate.command": "cli.attack",
    "evaluate.certify_command": "cli.certify",
    "evaluate.shell": "cli.shell",
}


class _Moved(Loader):
    """Hands out the module of the new name."""

    def __init__(self, now: str) -> None:
        self.now = now

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.now}; the old name goes with 0.3.", DeprecationWarning, stacklevel=2)
        return import_module(self.now)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = util.spec_from_file_location(self.now, module.__file__)  # the import set it to the old one


class MovedFinder(MetaPathFinder):
    """Finds the modules of version 0.1 by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, _Moved(f"purify.{MOVED[name]}")) if package == "purify" and name in MOVED else None


def install() -> None:
    """Append the finders, once."""
    for finder in (AutoAttackFinder, MovedFinder):
        if not any(isinstance(present, finder) for present in sys.meta_path):
            sys.meta_path.append(finder())


def import_robustbench() -> ModuleType:
    """The ``robustbench`` package.

    Raises:
        ImportError: it, or what it needs, is not installed; the message says what to do.
    """
    install()
    try:
        package = import_module("robustbench")
    except ModuleNotFoundError as error:
        if error.name == "pkg_resources":
            raise ImportError("robustbench needs pkg_resources; run `pip install 'setuptools<81'`.") from error
        raise ImportError(f"robustbench cannot be imported ({error}); run `pip install robustbench`.") from error
    if replaced("robustbench", TABLE):
        raise ImportError(
            "robustbench's model tables were overwritten by another package (torchattacks carries an old copy); run "
            "`pip install --force-reinstall --no-deps robustbench`."
        )
    return package


TABLE = "robustbench/model_zoo/cifar10.py"


def replaced(package: str, file: str) -> bool:
    """Whether an installed package's file is no longer the one that its wheel had."""
    found = next((f for f in metadata.files(package) or () if str(f) == file), None)
    if found is None or found.hash is None or found.hash.mode != "sha256":
        return False  # installed from its sources
    digest = hashlib.sha256(Path(str(found.locate())).read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != found.hash.value
