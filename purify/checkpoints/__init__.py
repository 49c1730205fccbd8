"""Score networks from elsewhere: ``load_score_model`` reads what others published, strictly and without their code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purify import zoo
from purify.checkpoints import openai, score_sde
from purify.checkpoints.diffusers import read_folder
from purify.checkpoints.layout import Format, Layout
from purify.checkpoints.public import PUBLIC, fetch, find, is_hub_name
from purify.checks import choose
from purify.data import DATASETS
from purify.diffusion.score import ScoreModel, check_settings
from purify.weights.files import read
from purify.weights.loading import assign

__all__ = ["FORMATS", "PUBLIC", "Format", "Layout", "default_score_model", "fetch", "find", "load_score_model"]

SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors", ".json"}  # of files, not of names on the Hub
FORMATS: dict[str, Format] = {"score_sde": score_sde.FORMAT, "openai": openai.FORMAT}


def load_score_model(name_or_path: str | Path, *, head_channels: int | None = None, **settings: Any) -> ScoreModel:
    """A score model from a public checkpoint, or from a file or folder of one of their formats.

    Nothing is downloaded here; ``purify download NAME`` or :func:`fetch` does that. The network is built on the meta
    device and takes the file's tensors as they are, mapped from disk where the format allows; files run no code.

    Args:
        name_or_path: an embedded network (``digits``), a public one (``score-sde-cifar10``, ``guided-imagenet256``,
            ``improved-cifar10``), a repository of diffusers (``google/ddpm-cifar10-32``), a folder that diffusers
            saved, a file of score_sde, guided-diffusion or improved-diffusion (.pth, .pt, or the same keys as
            .safetensors), or a .safetensors file that purify saved, with its .json.
        head_channels: channels per attention head, which a U-Net of guided-diffusion or improved-diffusion does not
            tell. None: the published 64, or a quarter of the width.
        settings: of :class:`~purify.diffusion.score.ScoreModel`, where they differ from what the format says:
            ``schedule``, ``prediction``, ``image_shape``, ``time_scale``, ``time_offset``, ``autocast``, ``classes``.

    Returns:
        The model in eval mode with frozen weights.

    Raises:
        ValueError: settings of other names or types; nothing of that name here (the message says what to fetch and
            where to put it), an unknown format, keys that are missing or unexpected (listed), shapes that differ, NaN,
            a file that would run code.
    """
    check_settings(settings)
    if not isinstance(name_or_path, str | Path):
        kind = type(name_or_path).__name__
        raise ValueError(
            f"A score model is a name, a path or a purify.ScoreModel, got {kind}; wrap a network of your own in "
            "purify.ScoreModel(network, schedule, prediction=...)."
        )
    if str(name_or_path) in zoo.names("score") or _is_ours(Path(name_or_path)):
        if head_channels is not None:
            raise ValueError("head_channels is for files of guided-diffusion and improved-diffusion only.")
        return zoo.score_model(name_or_path).with_settings(**settings).eval()
    path = _locate(name_or_path)
    layout = _layout(path, head_channels, settings)
    assign(layout.network, layout.weights, path)
    return ScoreModel(layout.network, **{**layout.settings, **settings}).eval().requires_grad_(False)


def default_score_model(dataset: str) -> str:
    """Name, for :func:`load_score_model`, of the public or embedded score network of a data set.

    Raises:
        ValueError: unknown data set, or none is known.
    """
    if not dataset:
        raise ValueError("No score network of images of this shape is known; pass a score model, see docs/weights.md.")
    name = choose(dataset, DATASETS, "data set").score_model
    if name is None:
        raise ValueError(f"No score network of {dataset} is known; pass a score model, see docs/weights.md.")
    return name


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.with_suffix(".json").is_file()


def _locate(name_or_path: str | Path) -> Path:
    name, path = str(name_or_path), Path(name_or_path)
    if name in PUBLIC:
        return find(name)
    if path.exists():
        return path
    if isinstance(name_or_path, str) and is_hub_name(name) and path.suffix not in SUFFIXES:
        return find(name)
    known = ", ".join([*zoo.names("score"), *PUBLIC])
    raise ValueError(f"There is no score network {name!r}: no file or folder of that path, and none of {known}.")


def _layout(path: Path, head_channels: int | None, settings: Mapping[str, Any]) -> Layout:
    if path.is_dir():
        if head_channels is not None:
            raise ValueError("A folder of diffusers tells its head width; leave head_channels out.")
        return read_folder(path, with_schedule="schedule" not in settings, with_classes="classes" in settings)
    content = read(path)
    for format in FORMATS.values():
        if format.recognises(content):
            return format.read(content, path, head_channels)
    raise ValueError(
        f"{path} is of no known format ({', '.join(FORMATS)}, diffusers folder, purify .safetensors with .json): its "
        f"first keys are {', '.join(map(str, list(content)[:3]))}; wrap the network in purify.ScoreModel yourself."
    )
