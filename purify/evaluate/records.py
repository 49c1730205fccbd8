"""A run on disk: a manifest, one line of JSON per (defence, attack, sample), and the adversarial images.

Lines are appended whole and synced, so that a killed process loses nothing it had finished; the same command
resumes. A folder holds one configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KEY = ("defence", "attack", "sample")
REQUIRED = {*KEY, "label", "predictions"}


class RunFolder:
    """Open, or create, the folder of a run.

    Args:
        path: the folder.
        config: what decides the results, as plain data; must equal that of a run already in the folder.
        environment: versions, device, revision; stored, not compared.

    Raises:
        ValueError: the folder cannot be written, holds another run (the differing keys are named), holds other
            files, or its records were damaged by hand.
    """

    def __init__(self, path: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = Path(path)
        config = json.loads(json.dumps(config))  # as it will be read back
        self._claim()
        manifest = self.path / "manifest.json"
        if manifest.exists():
            self._check(manifest, config)
        elif any(p for p in self.path.iterdir() if p.name != ".writable"):
            raise ValueError(f"{self.path} holds other files and no run; choose another --out.")
        else:
            write_json(manifest, {"config": config, "environment": environment})
        self.config = config
        self._records = {key(r): r for r in self._read()}

    def _claim(self) -> None:
        probe = self.path / ".writable"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written ({error.strerror}); choose another --out.") from error

    def _check(self, manifest: Path, config: dict[str, Any]) -> None:
        try:
            stored = json.loads(manifest.read_text())["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged; restore it or choose another --out.") from error
        different = list(differences(stored, config))
        if different:
            raise ValueError(
                f"{self.path} holds another run, which differs in {', '.join(different[:8])}; choose another --out."
            )

    def _read(self) -> Iterator[dict[str, Any]]:
        path = self.path / "records.jsonl"
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a killed process was in the middle of this line
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                missing = REQUIRED - set(record)
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is damaged; remove that line to have it redone.") from error
            if missing:
                raise ValueError(f"{path}, line {number}, lacks {', '.join(sorted(missing))}; remove that line.")
            yield record

    def __contains__(self, record_key: tuple[str, str, int]) -> bool:
        return record_key in self._records

    def get(self, defence: str, attack: str, sample: int) -> dict[str, Any]:
        """The record with this key."""
        return self._records[(defence, attack, sample)]

    def append(self, record: dict[str, Any], image: np.ndarray | None = None) -> None:
        """Store the adversarial ``image`` (C, H, W), if any, and then the record, each atomically."""
        if image is not None:
            self._write_image(record, image)
        line = json.dumps(record, allow_nan=False) + "\n"
        descriptor = os.open(self.path / "records.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._records[key(record)] = record

    def image(self, defence: str, attack: str, sample: int) -> np.ndarray:
        """The adversarial image of a record, float32 (C, H, W)."""
        return np.load(self._image_path(defence, attack, sample), allow_pickle=False)

    def _image_path(self, defence: str, attack: str, sample: int) -> Path:
        return self.path / "adversarial" / defence / attack / f"{sample}.npy"

    def _write_image(self, record: dict[str, Any], image: np.ndarray) -> None:
        path = self._image_path(*key(record))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as f:
            np.save(f, image)
        os.replace(partial, path)


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
        raise ValueError(f"The records cannot be written ({error}); make room and run the same command.") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either old or new, never half."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys in which two plain structures differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            yield from differences(a.get(name), b.get(name), f"{where}.{name}" if where else name)
    elif a != b:
        yield where
