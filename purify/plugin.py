"""A user's own part by name: ``file.py:function``.

The file and what it imports from beside it are loaded as modules of a package of their own, named after its path and
their text. So an edited file is another package, files whose neighbours are called alike do not meet, and nothing that
was imported elsewhere is replaced.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


MARK = "__purify_file__"  # what such a package carries: its file
PACKAGE = re.compile(r"\b\w+_[0-9a-f]{8}_[0-9a-f]{8}\.")


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
    package = _package(path.resolve())
    with beside_on_path(path), said(path):
        module = importlib.import_module(f"{package}.{_main(path)}")
    found = getattr(module, function, None)
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
    main = _file(kind.__module__.partition(".")[0])
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return f"{Path(file).relative_to(main.parent).as_posix()}:{kind.__qualname__}" if main and file else None


def call(name: str, *args: Any, **options: Any) -> Any:
    """What the function of ``file.py:function`` returns.

    Raises:
        ValueError: as :func:`load_function`; the function fails.
    """
    function, (path, _) = load_function(name), split(name)
    with beside_on_path(path), said(path):
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
        hashed.update(sha256(file.read_bytes()).digest())  # lines that move from one to the next are seen
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
        importer, package = left.pop()
        for name in _imported(importer.read_bytes(), package):
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


@functools.lru_cache(maxsize=1024)
def _imported(text: bytes, package: str) -> frozenset[str]:
    """What the text of a package ("" outside) imports, but this library; nothing where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading says them, too
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # which loading it tells
        return frozenset()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join(filter(None, [*above, node.module]))
            names |= {start, *(f"{start}.{alias.name}" if start else alias.name for alias in node.names)}
    return frozenset(name for name in names - {""} if name.split(".")[0] != "purify")


def _main(path: Path) -> str:
    return path.stem.replace(".", "_")


def _package(path: Path) -> str:
    """The name of the package that a file and what it imports from beside it are loaded into."""
    name = f"{_main(path)}_{sha256(str(path).encode()).hexdigest()[:8]}_{digest(path)[:8]}"
    if name not in sys.modules:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        package = ModuleType(name)
        package.__path__ = [str(path.parent)]
        own = {imported.partition(".")[0] for imported in _modules(path)} - sys.stdlib_module_names
        package.__dict__.update({MARK: path, "__builtins__": vars(builtins) | {"__import__": _importing(name, own)}})
        importlib.invalidate_caches()
        sys.modules.setdefault(name, package)
    return name


def _file(package: str) -> Path | None:
    """The file that such a package is of; None of any other, whose own ``__getattr__`` is not asked."""
    found: Path | None = getattr(sys.modules.get(package), "__dict__", {}).get(MARK)
    return found


def _importing(package: str, own: set[str]) -> Callable[..., Any]:
    """The import statement of the modules in such a package: what stands beside the file comes from the package."""

    def importing(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> Any:
        top = name.partition(".")[0]
        if level or top not in own:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{package}.{top}"]

    return importing


class _Finder:
    """Finds what is in such packages; has no state: they are in ``sys.modules``."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        file = _file(package)
        if file is None:
            return None
        if name == _main(file):
            return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """From the text, always: two edits within a second of one length look alike to what was compiled."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        package = sys.modules[module.__name__.partition(".")[0]]
        module.__dict__["__builtins__"] = package.__dict__["__builtins__"]
        super().exec_module(module)


@contextmanager
def beside_on_path(path: Path) -> Iterator[None]:
    """What a file imports by a name that its text does not tell is looked for beside it, too."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:  # which the file may have rebuilt
            sys.path.remove(folder)


@contextmanager
def said(path: Path) -> Iterator[None]:
    """Any error of the user's code as one sentence, with its kind and the line of their file."""
    whole = path.resolve()  # the file may change the working directory
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == whole]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        text = (PACKAGE.sub("", str(error)).strip() or "no message").splitlines()[0].rstrip(".")
        where = f", line {line}" if line else ""
        raise ValueError(f"{path}{where}, failed with {type(error).__name__}: {text}.") from error
