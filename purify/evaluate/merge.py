"""Shards of a run, or runs of the same configuration on parts of its images, put together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from purify.evaluate.records import FULL, SHARD, RunFolder, check_folder, check_space, differences, is_shard, writing

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Merged:
    """What merging came to.

    Attributes:
        folder: the whole run's.
        records: how many it holds now, and how many of them are new.
        lacking: shards that have no folder yet, and records that an evaluation lacks; in words, none if it is complete.
        command: what makes tables, self-checks and result.json of it.
    """

    folder: Path
    records: int
    new: int
    lacking: str | None
    command: str


def parts_of(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold records: each itself if a run was begun in it, or its shards, or both.

    Raises:
        ValueError: a folder with neither.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        shards = sorted(filter(is_shard, folder.iterdir()), key=_number) if folder.is_dir() else []
        begun = [p for p in (folder, *shards) if (p / "manifest.json").is_file()]
        if not begun:
            raise ValueError(f"{folder} holds no run and no shards of one; give the --out of the commands that ran.")
        found |= dict.fromkeys(begun)
    return list(found)


def merge(folders: Sequence[Path], out: Path | None = None) -> Merged:
    """Put the records and images of runs of one configuration into ``out``; default: the only folder, of its shards.

    It changes no part, and may be repeated when they have gone on. Records are those of one process, in its order.

    Raises:
        ValueError: no runs, runs of different configurations or records, a part that is being written to; before
            anything is written, but for different records.
    """
    if out is None and len(folders) > 1:
        raise ValueError("Several folders are merged into another one; say into which by --out.")
    whole = folders[0] if out is None else out
    parts = [p for p in parts_of(folders) if p.absolute() != whole.absolute()]
    manifests = {part: _manifest(part) for part in parts}
    config = next(iter(manifests.values()))["config"] if parts else _manifest(whole)["config"]
    for part, manifest in manifests.items():
        different = list(differences(config, manifest["config"]))
        if different:
            raise ValueError(f"{part} and {parts[0]} are different runs; they differ in {', '.join(different[:8])}.")
    check_folder(whole, config)
    check_space(whole, sum(f.stat().st_size for part in parts for f in part.glob("records*.jsonl")))
    sessions = (manifests[parts[0]] if parts else _manifest(whole))["sessions"]
    with RunFolder(whole, config, sessions[0]) as folder:
        before = len(folder)
        for part in parts:
            with RunFolder(part, config, manifests[part]["sessions"][0]) as other:
                adopt(folder, other)
        command = _run_yaml(parts, whole)
        return Merged(whole, len(folder), len(folder) - before, _lacking(folder, parts), command)


def adopt(folder: RunFolder, other: RunFolder) -> None:
    """Take the records and images of another folder of this configuration.

    Raises:
        ValueError: both hold a record that differs by more than the time it took; names it.
    """
    own, theirs = folder.records, other.records
    for k in own.keys() & theirs.keys():
        if any(differences(_timeless(own[k]), _timeless(theirs[k]))):
            raise ValueError(
                f"{folder.path} and {other.path} have different records of {k[0]}, {k[1]}, sample {k[2]}; they were "
                "made by different versions, or on different machines."
            )
    for k in theirs.keys() - own.keys():
        if other.image_path(*k).exists():
            _link_or_copy(other.image_path(*k), folder.image_path(*k))
    records = {**theirs, **own}
    folder.rewrite(records[k] for k in in_order(records, folder.config))
    folder.add_sessions(other.sessions)


def in_order(keys: Iterable[Key], config: dict[str, Any]) -> list[Key]:
    """Keys of records in the order in which one process makes them; stages of which it says nothing, as they come."""
    keys = list(keys)
    defences = list(config.get("defences", config.get("systems", {})))
    attacks = {name: [b["attack"] for b in budgets] for name, budgets in config.get("attacks", {}).items()}
    known = {(name, a): i for name in defences for i, a in enumerate(attacks.get(name, []), 1)}
    came = {stage: i for i, stage in enumerate(dict.fromkeys(k[:2] for k in keys))}

    def place(k: Key) -> tuple[int, int, int, int]:
        defence = defences.index(k[0]) if k[0] in defences else len(defences)
        return defence, known.get(k[:2], 0), came[k[:2]], k[2]

    return sorted(keys, key=place)


def _lacking(folder: RunFolder, parts: Sequence[Path]) -> str | None:
    """What a complete run has beyond this one: shards without a folder; records, where their number is known."""
    config, said = folder.config, []
    counts = {found[2] for p in parts if (found := SHARD.fullmatch(p.name))}
    if len(counts) == 1:
        count, there = int(counts.pop()), {_number(p) for p in parts if is_shard(p)}
        missing = [str(n) for n in range(1, count + 1) if n not in there]
        said += [f"the shards {', '.join(missing)} of {count}"] if missing else []
    if "attacks" in config and not config["worst_only"]:
        stages = sum(1 + len(budgets) for budgets in config["attacks"].values())
        left = stages * config["n_examples"] - len(folder)
        said += [f"{left} of {stages * config['n_examples']} records"] if left else []
    return " and ".join(said) or None


def _number(shard: Path) -> int:
    found = SHARD.fullmatch(shard.name)
    return int(found[1]) if found else 0


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text())
        return {"config": dict(found["config"]), "sessions": list(found["sessions"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'manifest.json'} cannot be read; is this the folder of a run?") from error


def _run_yaml(parts: Sequence[Path], whole: Path) -> str:
    """Give the whole run the options of its parts, less what made parts of them; returns the command that ends it."""
    kinds = {"systems": "certify", "distortion": "distortion"}
    kind = next((kind for key, kind in kinds.items() if key in _manifest(whole)["config"]), "attack")
    source = next((p / "run.yaml" for p in parts if (p / "run.yaml").is_file()), None)
    if source is not None and not (whole / "run.yaml").exists():
        options = {name: v for name, v in yaml.safe_load(source.read_text()).items() if name != "shard"}
        _write_yaml(whole, options)
    return f"purify {kind} --config {whole / 'run.yaml'}"


def end_curve(radii: Sequence[Path]) -> str:
    """Give a curve the options of its radii, which are below it; returns these radii, and the command that ends it."""
    whole = radii[0].parent
    files = [file for file in (whole / "run.yaml", *(radius / "run.yaml" for radius in radii)) if file.is_file()]
    options = [yaml.safe_load(file.read_text()) for file in files]
    # 0, clean images, tells a curve of one radius from a run
    eps = sorted({0.0}.union(*(own["eps"] if isinstance(own["eps"], list) else [own["eps"]] for own in options)))
    _write_yaml(whole, {**options[-1], "eps": eps})
    return f"of eps {', '.join(f'{e:g}' for e in eps[1:])}: purify attack --config {whole / 'run.yaml'}"


def _write_yaml(folder: Path, options: dict[str, Any]) -> None:
    with writing(folder / "run.yaml") as partial:
        partial.write_text(yaml.safe_dump({**options, "out": str(folder)}, sort_keys=False, width=120))


def _link_or_copy(source: Path, target: Path) -> None:
    """``target`` as another name of the file ``source``, or a copy where that cannot be; all of it or nothing."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        try:
            shutil.copyfile(source, partial)
        except OSError as error:
            raise ValueError(FULL.format(error)) from error
    os.replace(partial, target)


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}
