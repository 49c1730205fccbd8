"""A run on disk: a manifest, one line of JSON per (defence, attack, sample), and the adversarial images.

Lines are appended whole and synced, so that a killed process loses nothing it had finished; the same command
resumes. A folder holds one configuration. Several processes of one run write files of their own, which are merged.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from purify.evaluate.ranks import Ranks

LOCK = ".lock"
FREE = {"memory_budget"}  # in the config of a gradient engine, and changes no result
MERGED = "records.jsonl"
SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
CURVE = re.compile(r"eps-[\d.e+-]+")
SCHEMA = 2  # of manifest.json and result.json; 1 had no schema, and its data set, seed and models in manifest.json only
RESTART_SECONDS = 20  # how long a process that torchrun restarted waits for its predecessor to be gone
FULL = "The records cannot be written ({}); make room and run the same command."


class RunFolder:
    """Open, or create, the folder of a run.

    Args:
        path: the folder.
        config: what decides the results, as plain data; must equal that of a run already in the folder.
        environment: versions, device, revision; stored, not compared.
        ranks: this process among those of the run.

    Raises:
        ValueError: the folder cannot be written, holds another run (the differing keys are named), holds other
            files, or its records were damaged by hand.

    As a context manager it gives the folder free on leaving, also where an error, kept by a notebook, keeps it alive.
    """

    _lock: IO[str] | None = None  # of the first rank

    def __init__(
        self, path: Path, config: dict[str, Any], environment: dict[str, Any], ranks: Ranks | None = None
    ) -> None:
        self.path = Path(path)
        self.ranks = ranks or Ranks()
        if self.ranks.first:
            check_folder(self.path, config)
            self._lock = self._claim()
        try:
            if self.ranks.first:
                self._open(json.loads(json.dumps(config)), environment)  # the config as it will be read back
            self._load()
        except BaseException:
            self.__exit__()
            raise

    def _open(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Check or write the manifest, and cut off what a killed process left half-written."""
        manifest = self.path / "manifest.json"
        sessions: list[dict[str, Any]] = []
        if manifest.exists():
            sessions = _sessions(manifest, config)
        else:
            _check_empty(self.path)
        if environment not in sessions:
            self._write_manifest(config, [*sessions, environment])
        for file in self._files():
            content = file.read_bytes()
            end = content.rfind(b"\n") + 1
            if parse(content[end:]) is not None:  # whole but for its end
                with open(file, "ab") as f:
                    f.write(b"\n")
            elif b"\r" not in content[end:]:
                os.truncate(file, end)

    def _write_manifest(self, config: dict[str, Any], sessions: list[dict[str, Any]]) -> None:
        write_json(self.path / "manifest.json", {"schema": SCHEMA, "config": config, "sessions": sessions})

    def add_sessions(self, sessions: Iterable[dict[str, Any]]) -> None:
        """Note environments in which part of the run was made elsewhere."""
        known = self.sessions
        self._write_manifest(self.config, [*known, *(s for s in sessions if s not in known)])

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def config(self) -> dict[str, Any]:
        """What decides the results."""
        return json.loads((self.path / "manifest.json").read_text())["config"]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The environments in which the run was made."""
        return json.loads((self.path / "manifest.json").read_text())["sessions"]

    def _files(self) -> list[Path]:
        """The merged records, then those of single ranks."""
        return sorted(self.path.glob("records*.jsonl"), key=lambda p: (p.name != MERGED, p.name))

    @property
    def _own(self) -> Path:
        return self.path / (MERGED if self.ranks.world == 1 else f"records.{self.ranks.rank}.jsonl")

    def _claim(self) -> IO[str]:
        """Make the folder and hold its lock."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "w")  # noqa: SIM115 - stays open
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written ({error.strerror}); choose another --out.") from error
        deadline = time.monotonic() + (RESTART_SECONDS if self.ranks.world > 1 else 0)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise ValueError(
                        f"Another process writes to {self.path}; wait for it or choose another --out."
                    ) from error
                time.sleep(0.1)
        return lock

    def _read(self, path: Path) -> None:
        merged = set(self._records)
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            record = parse(line)
            if record is None:
                raise ValueError(f"{path}, line {number}, is damaged; remove that line to have it redone.")
            if key(record) in merged and self._records[key(record)] == record:
                continue  # the process that merged was killed before it removed this file
            if key(record) in self._records:
                raise ValueError(f"{path}, line {number}, repeats an earlier record; remove one of them.")
            self._records[key(record)] = record

    def merge(self) -> None:
        """Wait for all ranks; then all know all records, which are in one file."""
        self.ranks.barrier()
        parts = [file for file in self._files() if file.name != MERGED]
        if self.ranks.first and parts:
            self._join(parts)
        self._load()

    def _load(self) -> None:
        """Read all records, once rank 0 has put the folder in order."""
        self.ranks.barrier()
        self._records: dict[tuple[str, str, int], dict[str, Any]] = {}
        for file in self._files():
            self._read(file)
        self.ranks.barrier()  # nobody appends while others read

    def _join(self, parts: Sequence[Path]) -> None:
        """Move the records of all files into one."""
        self._records.clear()
        for file in self._files():
            self._read(file)
        self._write_records()
        for file in parts:
            file.unlink()

    @property
    def records(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        """All records by their keys, in the order of the file."""
        return dict(self._records)

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Put these in place of all records, at once."""
        self._records = {key(record): record for record in records}
        self._write_records()

    def _write_records(self) -> None:
        partial = self.path / "records.partial"
        try:
            with open(partial, "w") as f:
                f.writelines(map(to_line, self._records.values()))
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise ValueError(FULL.format(error)) from error
        os.replace(partial, self.path / MERGED)

    def __contains__(self, record_key: tuple[str, str, int]) -> bool:
        return record_key in self._records

    def get(self, defence: str, attack: str, sample: int) -> dict[str, Any]:
        """The record with this key."""
        return self._records[(defence, attack, sample)]

    def append(self, record: dict[str, Any], image: np.ndarray | None = None) -> None:
        """Store the adversarial ``image`` (C, H, W), if any, and then the record, each atomically."""
        if image is not None:
            self._write_image(record, image)
        descriptor = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(descriptor, to_line(record).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._records[key(record)] = record

    def image(self, defence: str, attack: str, sample: int) -> np.ndarray:
        """The adversarial image of a record, float32 (C, H, W)."""
        return read_image(self.image_path(defence, attack, sample))

    def image_path(self, defence: str, attack: str, sample: int) -> Path:
        """Where the adversarial image of a record is."""
        return image_path(self.path, defence, attack, sample)

    def _write_image(self, record: dict[str, Any], image: np.ndarray) -> None:
        path = self.image_path(*key(record))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as f:
                np.save(f, image)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise ValueError(FULL.format(error)) from error
        os.replace(partial, path)


def image_path(run: Path, defence: str, attack: str, sample: int) -> Path:
    """Where a run's folder has an adversarial image."""
    return run / "adversarial" / defence / attack / f"{sample}.npy"


def read_image(path: Path) -> np.ndarray:
    """An adversarial image, float32 (C, H, W).

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged; remove its record's line to have it redone.") from error


def _sessions(manifest: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The sessions so far of the run in this folder, if its configuration is ``config``."""
    try:
        stored = json.loads(manifest.read_text())
        before, sessions = stored["config"], stored["sessions"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged; restore it or choose another --out.") from error
    different = list(differences(before, config))
    if different:
        raise ValueError(
            f"{manifest.parent} holds another run, which differs in {', '.join(different[:8])}; choose another --out."
        )
    return sessions


def _check_empty(path: Path) -> None:
    own = [p for p in path.iterdir() if p.name != LOCK and p.suffix != ".partial" and not is_shard(p)]
    if own:
        raise ValueError(f"{path} holds other files and no run; choose another --out.")


def check_folder(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if a run of this configuration could not go on, or begin, in ``path``; changes nothing."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{path} cannot be written; choose another --out.")
    if (path / "manifest.json").exists():
        _sessions(path / "manifest.json", json.loads(json.dumps(config)))
    elif path.exists():
        _check_empty(path)


def holds_run(path: Path, config: dict[str, Any]) -> bool:
    """Whether a run of this configuration was begun in ``path``."""
    manifest = path / "manifest.json"
    if not manifest.exists():
        return False
    try:
        _sessions(manifest, json.loads(json.dumps(config)))
    except ValueError:  # another one, or damaged: opening it says so
        return False
    return True


def is_shard(path: Path) -> bool:
    """Whether this is a shard's folder within that of its run."""
    return SHARD.fullmatch(path.name) is not None and path.is_dir()


def curve_folder(eps: float) -> str:
    """The folder of one radius within that of a curve over several."""
    return f"eps-{eps:g}"


def curve_folders(path: Path) -> list[Path]:
    """The folders of a curve's radii, from the smallest on; none in other folders."""
    found = {p: CURVE.fullmatch(p.name) for p in path.glob("eps-*") if p.is_dir()}
    return sorted((p for p, name in found.items() if name), key=lambda p: float(p.name.removeprefix("eps-")))


def samples_picture(folder: Path, defence: str) -> Path:
    """Where the picture of a defence's samples is."""
    return folder / f"samples-{defence.replace(' ', '-')}.png"


def averages_picture(folder: Path, defence: str) -> Path:
    """Where the picture of a defence's accuracy over purifications per answer is."""
    return folder / f"averaged-{defence.replace(' ', '-')}.png"


def curve_picture(folder: Path, norm: str) -> Path:
    """Where the picture of certified accuracy over the radius is."""
    return folder / f"certified-{norm}.png"


def parse(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None if it is not one."""
    try:
        record = json.loads(line)
        names = [record["defence"], record["attack"]]
        numbers = [record["sample"], record["label"], *(p + 1 for p in record["predictions"])]  # -1: no answer
    except (ValueError, TypeError, KeyError):
        return None
    whole = all(type(n) is int and n >= 0 for n in numbers) and len(numbers) > 2
    return record if whole and all(type(n) is str for n in names) else None


def to_line(record: dict[str, Any]) -> str:
    """A record as it stands in a file."""
    return json.dumps(record, allow_nan=False) + "\n"


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    """What identifies a record."""
    return record["defence"], record["attack"], record["sample"]


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes; if the disk fills up half-way, take the torn line back before raising."""
    start = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("the disk is full")
    except OSError as error:
        os.ftruncate(descriptor, start)
        raise ValueError(FULL.format(error)) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to, put in place of ``path`` when all of it is there.

    Raises:
        ValueError: the disk is full, or the folder cannot be written; names the file, nothing else is lost.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        advice = "make room, and the same command makes it from the records"
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); {advice}.") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either old or new, never half; raises as :func:`writing`."""
    with writing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def check_space(path: Path, needed: int) -> None:
    """Raise ValueError if less than ``needed`` bytes are free where the folder ``path`` is, or will be."""
    usage = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))
    free = usage.free if usage.total else needed  # a file system that does not tell
    if free < needed:
        raise ValueError(
            f"{path} needs about {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; make room, or choose "
            "another --out."
        )


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys in which two plain structures differ, beyond what changes no result."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b} - (FREE if where.endswith("gradient") else set())):
            yield from differences(a.get(name), b.get(name), f"{where}.{name}" if where else name)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from differences(left, right, f"{where}[{index}]")
    elif a != b:
        yield where
