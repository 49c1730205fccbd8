"""How much of an attack is done: attacks say it, whoever shows a bar hears it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

Listener = Callable[[int, int | None], None]

_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def count(rows: int, each: int | None = None) -> None:
    """Tell whoever listens that an attack took so many more gradients of images (queries, if it takes none).

    ``each``: network calls of a gradient; None: those of the model's.
    """
    for listener in _LISTENERS.get():
        listener(rows, each)


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """``listener`` hears all counts while this lasts."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def bar(name: str, total: int, shown: bool) -> Iterator[None]:
    """A bar of an attack's gradients, full at the end, if ``shown`` and there is anything to count."""
    if not shown or total == 0:
        yield
        return
    with tqdm(total=total, desc=name, unit="gradient", unit_scale=True, mininterval=0.5) as shown_bar:
        with heard(lambda rows, each: _advance(shown_bar, rows)):
            yield
        _advance(shown_bar, total)  # images that needed no more


def _advance(shown_bar: tqdm, rows: int) -> None:
    shown_bar.update(min(rows, shown_bar.total - shown_bar.n))
