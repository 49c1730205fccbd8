"""Makes ``import robustbench`` work on a plain install, where its dependency ``autoattack`` cannot be had by pip.

``import purify`` appends a finder to ``sys.meta_path``: where no installed package provides ``autoattack``, the
name resolves to a stand-in over ``pyautoattack`` with the original's interface. An installed ``autoattack`` always
comes first. This is the one thing that purify changes outside itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, util
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


def install() -> None:
    """Append the finder, once."""
    if not any(isinstance(finder, AutoAttackFinder) for finder in sys.meta_path):
        sys.meta_path.append(AutoAttackFinder())


def import_robustbench() -> ModuleType:
    """The ``robustbench`` package.

    Raises:
        ImportError: it, or what it needs, is not installed; the message says what to do.
    """
    install()
    try:
        return import_module("robustbench")
    except ModuleNotFoundError as error:
        if error.name == "pkg_resources":
            raise ImportError("robustbench needs pkg_resources; run `pip install 'setuptools<81'`.") from error
        raise ImportError(f"robustbench cannot be imported ({error}); run `pip install robustbench`.") from error
