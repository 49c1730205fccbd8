"""What every run has in common, as options: data, model, device, folder and shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from purify.checks import check_count, choose, nearest
from purify.data import DATASETS, Dataset
from purify.evaluate.ranks import Shard
from purify.options import PATH, SHARD, TEXT, WHOLE, convert, flags, option, options, plain
from purify.plugin import code_of, is_in_file

DATA = (
    f"{', '.join(DATASETS)}; or your own: a folder with a folder of pictures for each class, a .npz or .safetensors "
    "with images and labels, or file.py:function"
)
MODEL = (
    "zoo name, path of a purify .safetensors, RobustBench name, or file.py:function (default: DATASET-standard, or "
    "RobustBench's Standard)"
)
WHAT, RUN = "what is evaluated", "run"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What attacks and certificates have in common. Options that are None are the data set's usual ones."""

    dataset: str = option("digits", TEXT, WHAT, DATA, "--data", "--dataset")
    data_dir: Path | None = option(None, PATH, WHAT, "folder with the data set's files")
    model: str | None = option(None, TEXT, WHAT, MODEL)
    n_examples: int | None = option(None, WHOLE, WHAT, "test images (default: the budget's)")
    seed: int = option(0, WHOLE, RUN, "keys all randomness")
    device: str = option("cpu", TEXT, RUN, "cpu, cuda, cuda:1, ...")
    batch_size: int = option(64, WHOLE, RUN, "samples at once")
    max_rows: int | None = option(None, WHOLE, RUN, "images times draws in the model at once (default: CPU 256)")
    threads: int | None = option(None, WHOLE, RUN, "CPU threads for torch")
    out: Path | None = option(None, PATH, RUN, "folder of the run; the same command resumes (default: below runs/)")
    shard: str | None = option(
        None, SHARD, RUN, "part of the images, as 3/16: the third of 16 independent processes; see `purify merge`"
    )

    def __new__(cls, *args: Any, **given: Any) -> Any:
        """Names the option that was meant by a name that is none."""
        if args:
            raise ValueError(f"The options of {cls.__name__} have names, as {cls.__name__}(dataset='digits').")
        known = {f.name for f in options(cls)}
        for name in given:
            if name not in known:
                raise ValueError(f"Unknown option {name!r} of {cls.__name__}{nearest(name, known)}; see its help().")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        convert(self)
        check_count(self.seed, "--seed", 0)
        for name in ("n_examples", "batch_size", "max_rows", "threads"):
            value = getattr(self, name)
            if value is not None:
                check_count(value, f"--{name.replace('_', '-')}")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Any:
        """The description of a ``run.yaml``.

        Raises:
            ValueError: no such file, no YAML mapping, an unknown option, or a value that it cannot take.
        """
        try:
            found = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]}).") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold NAME: VALUE lines, the options of a run.")
        known, found = {f.name for f in options(cls)}, cls.renamed(found)
        for name in found:
            if name not in known:
                raise ValueError(f"{path} has an unknown option {name!r}{nearest(name, known)}.")
        return cls(**found)

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options by the names they have today; notes what had an old one."""
        return dict(given)

    def to_yaml(self) -> str:
        """The options that are set, as :meth:`from_yaml` takes them."""
        return yaml.safe_dump(plain(self), sort_keys=False, width=120)

    def code(self) -> dict[str, Any]:
        """What a run's config says of models' and attacks' code in files of the user's own; nothing without any."""
        given = {f.name: getattr(self, f.name) for f in options(type(self))}
        del given["dataset"]  # its images are known
        found = {
            "attack_code": code_of(filter(is_in_file, _texts(given.pop("attacks", None)))),
            "code": code_of(filter(is_in_file, _texts(given))),
        }
        return {name: files for name, files in found.items() if files}

    @property
    def part(self) -> Shard | None:
        """The shard that was asked for."""
        return None if self.shard is None else Shard.parse(self.shard)

    def check_whole(self) -> None:
        """Raise ValueError for a shard, which has no results before it is merged with the others."""
        if self.shard is not None:
            raise ValueError(
                "A shard has no results of its own; run it by `purify attack` or `purify certify`, then `purify merge`."
            )

    def replace(self, **changes: Any) -> Any:
        """The same with some options changed."""
        return dataclasses.replace(self, **changes)

    @property
    def title(self) -> str:
        """What a run's folder calls the data."""
        return self.dataset if self.dataset in DATASETS else Path(self.dataset.partition(":")[0]).stem

    def known(self, data: Dataset) -> str:
        """The built-in data set, or the one whose networks and settings one's own ``data`` gets; "" if none."""
        return self.dataset if self.dataset in DATASETS else data.like or ""

    def _choose(self, name: str, known: Any) -> None:
        field = next(f for f in options(type(self)) if f.name == name)
        value = getattr(self, name)
        if value is not None:
            choose(value, dict.fromkeys(known), flags(field)[0])


def _texts(value: Any) -> Iterator[str]:
    """Every text among options; paths are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inside)
