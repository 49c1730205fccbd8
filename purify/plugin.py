"""A user's own part by name: ``file.py:function``."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


MARK = "__purify_file__"  # what modules loaded from here carry
LOADED = "__purify_loaded__"  # what those carry that they import from beside them


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
        for older in [loaded for loaded in sys.modules if loaded.startswith(place)]:
            del sys.modules[older]
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
    """The files that a file and these import from its folder."""
    return sorted({file.resolve() for file in _modules(path).values()} - {path.resolve()})


def _modules(path: Path) -> dict[str, Path]:
    """The modules and packages in its folder that a file and these import, by the text of their import statements.

    Python's modulefinder ends in an error where a folder of data is called like a module.
    """
    folder, found, left = path.resolve().parent, dict[str, Path](), [(path, "")]
    while left:
        for name in _imported(*left.pop()):
            parts = name.split(".")
            for dotted in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
                if dotted not in found and (file := _module(folder, dotted)):
                    found[dotted] = file
                    left.append((file, dotted if file.name == "__init__.py" else dotted.rpartition(".")[0]))
    return found


def _module(folder: Path, dotted: str) -> Path | None:
    """The file of a module that is looked up in ``folder`` first; a package goes before a module."""
    place = folder.joinpath(*dotted.split("."))
    return next((f for f in (place / "__init__.py", place.parent / f"{place.name}.py") if f.is_file()), None)


def _imported(path: Path, package: str) -> set[str]:
    """What a file of a package ("" outside) imports, but this library; nothing where it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # which loading it tells
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join(filter(None, [*above, node.module]))
            names |= {start, *(f"{start}.{alias.name}" if start else alias.name for alias in node.names)}
    return {name for name in names - {""} if name.split(".")[0] != "purify"}


def _note(path: Path) -> None:
    """Mark the modules beside a file with what they were when they were loaded."""
    for name, file in _modules(path).items():
        module = sys.modules.get(name)
        if module is not None and _file_of(module) == file.resolve() and not hasattr(module, LOADED):
            setattr(module, LOADED, sha256(file.read_bytes()).hexdigest())


def _forget(path: Path) -> None:
    """Have modules imported again that stand beside a file and were loaded from other text."""
    files = {file: sha256(file.read_bytes()).hexdigest() for file in beside(path)}
    known = _below(name for name in _modules(path))
    noted = [module for module in known.values() if hasattr(module, LOADED)]
    if any(files.get(_file_of(module) or path) != getattr(module, LOADED) for module in noted):
        for name in known:
            del sys.modules[name]
    importlib.invalidate_caches()


def _others(path: Path) -> dict[str, ModuleType]:
    """The modules loaded from elsewhere, but Python's own, that are called like one beside a file."""
    folder, modules = path.resolve().parent, _modules(path)
    own = {name.partition(".")[0]: _module(folder, name.partition(".")[0]) for name in modules} | modules
    return _below(
        name
        for name, file in own.items()
        if name in sys.modules
        and _file_of(sys.modules[name]) != (file and file.resolve())
        and name.partition(".")[0] not in sys.stdlib_module_names
    )


def _below(names: Iterable[str]) -> dict[str, ModuleType]:
    """All that is loaded of the packages of these modules."""
    tops = {name.partition(".")[0] for name in names}
    return {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] in tops}


def _file_of(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


@contextmanager
def siblings(path: Path) -> Iterator[None]:
    """Modules beside the file can be imported, and go before others that are called like them, which then are back."""
    folder, written, others = str(path.resolve().parent), sys.dont_write_bytecode, _others(path)
    for name in others:
        del sys.modules[name]
    _forget(path)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # of two edits within a second Python would not notice the second
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = written
        _note(path)
        for name in _below(others):
            del sys.modules[name]
        sys.modules.update(others)


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
