"""Files from the web: explicit, cached, resumable and checked by sha256.

A file that is being fetched is called ``NAME.partial``; it gets its name when it is complete and its sha256 is right.
The sha256 is written beside it (``NAME.sha256``, as by ``sha256sum``). Where the publisher states none, the first
download is trusted and later ones are held to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import urllib.request
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
        ValueError: another sha256; a web page in place of the file; another process is fetching it.
        OSError: no connection, or it broke; call again to go on.
    """
    if path.is_file():
        return check(path, sha256, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is fetching {path}; wait for it.") from None
        _fetch(url, f, path, timeout, progress)
        f.flush()
        os.fsync(f.fileno())
        found = hash_file(partial, progress)
        wanted = sha256 or _recorded(path)
        if wanted is not None and found != wanted:
            partial.unlink()
            _validator(path).unlink(missing_ok=True)
            raise ValueError(f"{url} has the sha256 {found} instead of {wanted}; it was deleted, download it again.")
        os.replace(partial, path)
    _validator(path).unlink(missing_ok=True)
    _record(path, found)
    return found


def check(path: Path, sha256: str | None = None, progress: bool = False) -> str:
    """The sha256 of a file, held to ``sha256`` or else to the one recorded beside it, and recorded.

    Raises:
        ValueError: it is another one.
    """
    wanted, found = sha256 or _recorded(path), hash_file(path, progress)
    if wanted is not None and found != wanted:
        raise ValueError(f"{path} has the sha256 {found} instead of {wanted}; delete it and download it again.")
    _record(path, found)
    return found


def checked(path: Path, sha256: str | None = None) -> bool:
    """Whether ``path`` is there; it is hashed the first time only, when no sha256 is recorded beside it.

    Raises:
        ValueError: another sha256 than ``sha256``.
    """
    if not path.is_file():
        return False
    recorded = _recorded(path)
    if recorded is None or (sha256 is not None and recorded != sha256):
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


def _recorded(path: Path) -> str | None:
    record = path.with_name(path.name + ".sha256")
    return record.read_text().split()[0] if record.is_file() else None


def _record(path: Path, sha256: str) -> None:
    path.with_name(path.name + ".sha256").write_text(f"{sha256}  {path.name}\n")


def _validator(path: Path) -> Path:
    """Holds the server's name for the version of the file that the partial one belongs to."""
    return path.with_name(path.name + ".etag")


def _fetch(url: str, f: BinaryIO, path: Path, timeout: float, progress: bool) -> None:
    """Append what is missing to ``f``; start over if the server has another version or sends the whole file."""
    done, etag = f.tell(), _validator(path)
    headers = {"User-Agent": "purify"}
    if done and etag.is_file():
        headers |= {"Range": f"bytes={done}-", "If-Range": etag.read_text()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} answered with a web page, not the file; put the file at {path} by hand.")
            if answer.status != 206:
                done = 0
                f.truncate(0)
            total = _total(answer.headers, done)
            _keep(etag, answer.headers)
            with _bar(total, done, path.name, progress) as bar:
                while chunk := answer.read(CHUNK):
                    f.write(chunk)
                    done += len(chunk)
                    bar.update(len(chunk))
    except HTTPError as error:
        if error.code == 416 and _total(error.headers, 0) == done:  # nothing was missing
            return
        raise OSError(f"{url} answered {error.code} {error.reason}; put the file at {path} by hand.") from error
    except (HTTPException, OSError) as error:
        raise OSError(f"{url} broke off after {done} bytes ({error}); run it again to go on.") from error
    if total is not None and done != total:
        raise OSError(f"{url} broke off after {done} of {total} bytes; run it again to go on.")


def _keep(etag: Path, headers: Any) -> None:
    """Remember a strong validator; without one, a broken download starts over."""
    value = headers.get("ETag") or headers.get("Last-Modified")
    if value is None or value.startswith("W/"):
        etag.unlink(missing_ok=True)
    else:
        etag.write_text(value)


def _total(headers: Any, done: int) -> int | None:
    """Size of the whole file, if the server tells."""
    whole = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    if whole:
        return int(whole[1])
    length = headers.get("Content-Length")
    return None if length is None else done + int(length)
