"""Files from the web: explicit, cached, resumable and checked by sha256.

A file that is being fetched is called ``NAME.partial``; it gets its name when it is complete and its sha256 is right.
The sha256 is written beside it (``NAME.sha256``, as by ``sha256sum``, with the file's size and time in a comment).
Where the publisher states none, the first download is trusted and later ones are held to it. ``NAME.lock`` keeps other
processes away meanwhile; it stays, because a lock on a file that is removed or renamed locks nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError

from tqdm import tqdm

CHUNK = 2**20


def cache_folder() -> Path:
    """Where downloads go: ``$PURIFY_CACHE``, or ``purify`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if os.environ.get("PURIFY_CACHE"):
        return Path(os.environ["PURIFY_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purify"


def download(url: str, path: Path, sha256: str | None = None, timeout: float = 60.0, progress: bool = True) -> str:
    """Fetch ``url`` to ``path``, going on where an earlier attempt stopped; an existing file is only checked.

    Args:
        url: address of the file.
        path: where to put it; its folder is made.
        sha256: what the file must hash to; None: what ``path``.sha256 says, or anything at the first time.
        timeout: seconds without an answer after which the attempt stops.
        progress: show a bar.

    Returns:
        The sha256 of the file.

    Raises:
        ValueError: another sha256; a web page in place of the file; an answer that tells neither its length nor its
            end, where no sha256 is known; another process is fetching it; a folder that cannot be written to.
        OSError: no connection, or it broke; call again to go on.
    """
    if path.is_file():
        return check(path, sha256, progress)
    with _locked(path):
        if path.is_file():  # another process has finished it
            return check(path, sha256, progress)
        return _download(url, path, sha256 or _recorded(path), timeout, progress)


def check(path: Path, sha256: str | None = None, progress: bool = False) -> str:
    """The sha256 of a file, held to ``sha256`` or else to the one recorded beside it, and recorded where possible.

    Raises:
        ValueError: it is another one.
    """
    version = _version(path)
    wanted, found = sha256 or _recorded(path), hash_file(path, progress)
    if wanted is not None and found != wanted:
        raise ValueError(f"{path} has the sha256 {found} instead of {wanted}; delete it and download it again.")
    with suppress(OSError):  # a cache that only others write to
        _record(path, found, version)
    return found


def checked(path: Path, sha256: str | None = None) -> bool:
    """Whether ``path`` is there; it is hashed only if its size or time differs from those recorded with its sha256.

    Raises:
        ValueError: another sha256 than ``sha256``, or than the one recorded.
    """
    if not path.is_file():
        return False
    recorded = _recorded(path)
    same = recorded is not None and _line(recorded, path, _version(path)) == _record_of(path).read_text()
    if not same or (sha256 is not None and recorded != sha256):
        check(path, sha256, progress=True)
    return True


def hash_file(path: Path, progress: bool = False) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f, _bar(path.stat().st_size, 0, f"sha256 of {path.name}", progress) as bar:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(total: int | None, done: int, what: str, progress: bool) -> Any:
    disable = None if progress else True  # None: no bar where stderr is no terminal
    return tqdm(total=total, initial=done, desc=what, unit="B", unit_scale=True, disable=disable, leave=False)


def _version(path: Path) -> str:
    """What changes when the file is written again."""
    status = path.stat()
    return f"size {status.st_size} mtime_ns {status.st_mtime_ns}"


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _line(sha256: str, path: Path, version: str) -> str:
    return f"# {version}\n{sha256}  {path.name}\n"  # sha256sum skips the comment


def _recorded(path: Path) -> str | None:
    """The sha256 in the record beside ``path``; an empty record is none."""
    record = _record_of(path)
    lines = record.read_text().splitlines() if record.is_file() else []
    return next((line.split()[0] for line in lines if line.strip() and not line.startswith("#")), None)


def _record(path: Path, sha256: str, version: str) -> None:
    """Write the record if it changed: it is either old or new, never half."""
    record, line = _record_of(path), _line(sha256, path, version)
    if record.is_file() and record.read_text() == line:
        return
    partial = path.with_name(f"{record.name}.{os.getpid()}")
    try:
        partial.write_text(line)
        os.replace(partial, record)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Make the folder and hold ``path``.lock, a file that stays where it is, unlike the one that is fetched."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("a")
    except OSError as error:
        raise ValueError(
            f"{path.parent} cannot be written to ({error}); make it writable, or set PURIFY_CACHE to another folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is fetching {path}; wait for it.") from None
        yield


def _download(url: str, path: Path, wanted: str | None, timeout: float, progress: bool) -> str:
    partial = path.with_name(path.name + ".partial")
    if path.is_dir() or partial.is_dir():
        raise ValueError(f"{path} or its .partial is a folder; remove it, or name another file.")
    with partial.open("ab") as f:
        try:
            _fetch(url, f, path, timeout, progress, wanted is not None)
        except _CannotGoOn:
            _forget(f, path)
            _fetch(url, f, path, timeout, progress, wanted is not None)
        f.flush()
        os.fsync(f.fileno())
    found, version = hash_file(partial, progress), _version(partial)
    if wanted is not None and found != wanted:
        partial.unlink()
        _validator(path).unlink(missing_ok=True)
        raise ValueError(f"{url} has the sha256 {found} instead of {wanted}; it was deleted, download it again.")
    os.replace(partial, path)
    _validator(path).unlink(missing_ok=True)
    _record(path, found, version)
    return found


def _validator(path: Path) -> Path:
    """Holds the server's name for the version of the file that the partial one belongs to."""
    return path.with_name(path.name + ".etag")


def _forget(f: BinaryIO, path: Path) -> None:
    """What was fetched so far is of no use."""
    f.truncate(0)
    _validator(path).unlink(missing_ok=True)


class _CannotGoOn(Exception):
    """The server's answer does not continue what is here."""


def _fetch(url: str, f: BinaryIO, path: Path, timeout: float, progress: bool, known: bool) -> None:
    """Append what is missing to ``f``; start over if the server sends the whole file.

    ``known``: the sha256 will tell whether the file is right.
    """
    done, etag = f.seek(0, os.SEEK_END), _validator(path)
    held = etag.read_text() if done and etag.is_file() else ""
    headers = {"User-Agent": "purify"}
    if held:
        headers |= {"Range": f"bytes={done}-", "If-Range": held}
    total: int | None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} answered with a web page, not the file; put the file at {path} by hand.")
            if answer.status == 206:
                total = _continued(answer.headers, done, held)
            else:
                done, total = 0, _length(answer.headers)
                _forget(f, path)
                _keep(etag, answer.headers)
            if total is None and not known and not answer.chunked:  # chunks have an end of their own
                raise ValueError(f"{url} tells no length, and no sha256 is known; put the file at {path} by hand.")
            with _bar(total, done, path.name, progress) as bar:
                while chunk := answer.read(CHUNK):
                    f.write(chunk)
                    done += len(chunk)
                    bar.update(len(chunk))
    except HTTPError as error:
        if error.code == 416 and held:
            if known and _whole(error.headers) == done:  # nothing was missing
                return
            raise _CannotGoOn from error
        raise OSError(f"{url} answered {error.code} {error.reason}; put the file at {path} by hand.") from error
    except (HTTPException, OSError) as error:
        raise OSError(f"{url} broke off after {done} bytes ({error}); run it again to go on.") from error
    if total is not None and done > total:
        _forget(f, path)
        raise OSError(f"{url} sent {done} bytes instead of {total}; they were deleted, run it again.")
    if total is not None and done != total:
        raise OSError(f"{url} broke off after {done} of {total} bytes; run it again to go on.")


def _strong(headers: Any) -> str | None:
    """A strong validator of the version that is served; without one, a broken download starts over."""
    value: str | None = headers.get("ETag") or headers.get("Last-Modified")
    return None if value is None or value.startswith("W/") else value


def _keep(etag: Path, headers: Any) -> None:
    value = _strong(headers)
    if value is not None:
        etag.write_text(value)


def _continued(headers: Any, done: int, held: str) -> int:
    """Size of the whole file, if the answer is the rest of the version that is here."""
    content = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    if not held:
        raise OSError("it sent a part of the file that was not asked for")
    if content is None or _strong(headers) != held:
        raise _CannotGoOn
    start, end, total = map(int, content.groups())
    if (start, end) != (done, total - 1) or _length(headers) not in (None, total - done):
        raise _CannotGoOn
    return total


def _whole(headers: Any) -> int | None:
    """Size of the whole file in an answer that says that no such part exists."""
    whole = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
    return whole and int(whole[1])


def _length(headers: Any) -> int | None:
    length = headers.get("Content-Length")
    return int(length) if length and length.isdigit() else None
