"""A user's own part by name: ``file.py:function``."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


MARK = "__purify_file__"  # what modules loaded from here carry


def is_in_file(name: str) -> bool:
    """Whether this names something in a file of the user's own: ``file.py:function``."""
    return isinstance(name, str) and ".py:" in name


def split(name: str) -> tuple[Path, str]:
    """File and function of ``file.py:function``.

    Raises:
        ValueError: there is no such file.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}; a part of your own is file.py:function.")
    return Path(path), function


def load_function(name: str) -> Callable[..., Any]:
    """The function, or class, of ``file.py:function``. The file may import modules that stand beside it.

    A file that was edited since is loaded again, with these.

    Raises:
        ValueError: there is no such file or function, or the file fails; names the error and its line.
    """
    path, function = split(name)
    place = f"{path.stem}_{sha256(str(path.resolve()).encode()).hexdigest()[:8]}_"
    unique = f"{place}{digest(path)[:8]}"
    if unique not in sys.modules:
        if any(loaded.startswith(place) for loaded in sys.modules):
            _forget(beside(path))
        spec = importlib.util.spec_from_file_location(unique, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__[MARK] = path.name
        sys.modules[unique] = module  # dataclasses look their module up
        try:
            with siblings(path), said(path):
                spec.loader.exec_module(module)
        except ValueError:
            del sys.modules[unique]
            raise
    found = getattr(sys.modules[unique], function, None)
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r}.")
    return found


def load_class(name: str, base: type[T], what: str) -> type[T]:
    """The class of ``file.py:Class``, a dataclass below ``base``.

    Raises:
        ValueError: as :func:`load_function`; it is no such class.
    """
    found: Any = load_function(name)
    if not (isinstance(found, type) and issubclass(found, base) and dataclasses.is_dataclass(found)):
        place = f"{base.__module__}.{base.__qualname__}"
        raise ValueError(f"{name} is no {what}; it must be a dataclass that inherits from {place}.")
    return found  # type: ignore[return-value]


def name_of(kind: type) -> str | None:
    """``file.py:Class`` of a class that came from a file of the user's own; None for any other."""
    file = getattr(sys.modules.get(kind.__module__), MARK, None)
    return f"{file}:{kind.__qualname__}" if file else None


def call(name: str, *args: Any, **options: Any) -> Any:
    """What the function of ``file.py:function`` returns.

    Raises:
        ValueError: as :func:`load_function`; the function fails.
    """
    function, (path, _) = load_function(name), split(name)
    with siblings(path), said(path):
        return function(*args, **options)


def code_of(names: Iterable[str]) -> dict[str, str]:
    """What tells the code of parts ``file.py:function`` from other code: a hash by file name."""
    found: dict[str, str] = {}
    for path in sorted({split(name)[0].resolve() for name in names}):
        found[path.name] = found.get(path.name, "") + digest(path)
    return found


def digest(path: Path) -> str:
    """sha256 over the bytes of a file and of what it imports from beside it."""
    hashed = sha256(path.read_bytes())
    for file in beside(path):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def beside(path: Path) -> list[Path]:
    """The modules, and files of packages, that a file and these import from its folder."""
    folder, found, left = path.resolve().parent, set[Path](), [path]
    while left:
        for name in _imported(left.pop()):
            file, package = folder / f"{name}.py", folder / name
            files = [file] if file.is_file() else list(package.rglob("*.py")) if package.is_dir() else []
            left += (new := set(files) - found)
            found |= new
    return sorted(found - {path.resolve()})


def _imported(path: Path) -> set[str]:
    """First names of the modules that a file imports, but this library; none where it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # which loading it tells
        return set()
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - {"", "purify"}


def _forget(files: list[Path]) -> None:
    """Have these modules imported again."""
    for name, module in list(sys.modules.items()):
        if (file := getattr(module, "__file__", None)) and Path(file).resolve() in files:
            del sys.modules[name]


@contextmanager
def siblings(path: Path) -> Iterator[None]:
    """Modules beside the file can be imported."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def said(path: Path) -> Iterator[None]:
    """Any error of the user's code as one sentence, with its kind and the line of their file."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
        where = f", line {line}" if line else ""
        raise ValueError(f"{path}{where}, failed with {type(error).__name__}: {text}.") from error
