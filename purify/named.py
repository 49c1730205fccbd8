"""Models named on a command line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from purify import zoo
from purify.checkpoints import load_score_model
from purify.checks import choose, nearest
from purify.compat import import_robustbench
from purify.diffusion.classes import ClassRule
from purify.diffusion.score import ScoreModel
from purify.fingerprint import weights_digest
from purify.plugin import call, is_in_file, split
from purify.purification.scorenorm import Calibration

N = TypeVar("N", bound=nn.Module)
WANTED = {nn.Module: "torch.nn.Module", ScoreModel: "purify.ScoreModel(network, schedule, prediction=...)"}


def load_classifier(name: str, dataset: str, threat_model: str) -> nn.Module:
    """A classifier by zoo name, path of a purify .safetensors, ``file.py:function``, or RobustBench name.

    In eval mode, weights frozen.

    Raises:
        ValueError: nothing of that name, the file or function does not give a module, or purify trained it on another
            data set.
    """
    check_dataset(name, dataset)
    if name in zoo.names("classifier") or name.endswith(".safetensors"):
        model = zoo.classifier(name)
    elif is_in_file(name):
        model = from_file(name, nn.Module)
    else:
        model = _from_robustbench(name, dataset, threat_model)
    return model.eval().requires_grad_(False)


def check_classifier(name: str, dataset: str, threat_model: str) -> None:
    """Raise ValueError as :func:`load_classifier` does where a name alone tells that nothing can be loaded."""
    check_dataset(name, dataset)
    if name in zoo.names("classifier") or name.endswith(".safetensors"):
        return
    if is_in_file(name):
        split(name)
    else:
        _entry(name, dataset, threat_model)


def load_score(name: str, dataset: str, classes: ClassRule | str | None = None) -> ScoreModel:
    """A score model by name or path as :func:`~purify.checkpoints.load_score_model` takes it, or ``file.py:function``.

    In eval mode, weights frozen. ``classes``: what a class-conditional one is told.

    Raises:
        ValueError: as that function; the file or function does not give a :class:`~purify.diffusion.score.ScoreModel`;
            or purify trained it on another data set.
    """
    check_dataset(name, dataset)
    if is_in_file(name):
        model = from_file(name, ScoreModel)
        model = model if classes is None else model.with_settings(classes=classes)
        return model.eval().requires_grad_(False)
    settings: dict[str, Any] = {} if classes is None else {"classes": classes}
    return load_score_model(name, **settings)


def load_networks(options: Mapping[str, Any], dataset: str, threat_model: str) -> dict[str, Any]:
    """A preset's options, with the network where ``auxiliary`` names one as :func:`load_classifier` takes it."""
    auxiliary = options.get("auxiliary")
    if not isinstance(auxiliary, str):
        return dict(options)
    return {**options, "auxiliary": load_classifier(auxiliary, dataset, threat_model)}


def check_dataset(name: str, dataset: str) -> None:
    """Raise ValueError if purify trained the network of this name, or path, on another data set."""
    saved = name.endswith(".safetensors") and Path(name).with_suffix(".json").is_file()
    if saved or name in zoo.names():
        trained = zoo.describe(name).get("dataset", dataset)
        if trained != dataset:
            wanted = f"take a network of {dataset}" if dataset else "for images of another shape take one of your own"
            raise ValueError(f"{name} was trained on {trained}; {wanted}, or --dataset {trained}.")


def load_calibration(path: Path | None, score_model: str) -> Calibration:
    """A calibration from a file, or the embedded one of a zoo score model."""
    if path is not None:
        return Calibration.load(path)
    if score_model not in zoo.calibrations():
        raise ValueError(
            f"SSNI on {score_model} needs a calibration; make one with `purify calibrate --score-model {score_model} "
            "--dataset ... --out FILE` and pass --calibration FILE."
        )
    return zoo.calibration(score_model)


def from_file(name: str, kind: type[N]) -> N:
    """What the function of ``file.py:function`` returns, called without arguments.

    Raises:
        ValueError: there is no such file or function, it fails, or does not return a ``kind``.
    """
    model = call(name)
    if not isinstance(model, kind):
        raise ValueError(f"{name} returned {type(model).__name__}; it must return a {WANTED[kind]}.")
    return model


def _entry(name: str, dataset: str, threat_model: str) -> dict[str, Any]:
    """What RobustBench says about a model."""
    if dataset not in ("cifar10", "cifar100", "imagenet"):
        embedded = zoo.names("classifier")
        hint = nearest(name, embedded)
        raise ValueError(f"Unknown model {name!r} for {dataset}{hint}; known: {', '.join(embedded)}.")
    package = import_robustbench()
    models = importlib.import_module("robustbench.model_zoo").model_dicts
    threats = {threat.value: m for threat, m in models[package.model_zoo.enums.BenchmarkDataset(dataset)].items()}
    known = choose(threat_model, threats, f"threat model of RobustBench's {dataset} models")
    if name not in known:
        raise ValueError(f"RobustBench has no {dataset} {threat_model} model {name!r}; known: {', '.join(known)}.")
    return dict(known[name])


def _from_robustbench(name: str, dataset: str, threat_model: str) -> nn.Module:
    entry = _entry(name, dataset, threat_model)
    folders = [Path("models", dataset, threat_model), Path("models", dataset), Path("models")]
    made = [folder for folder in folders if not folder.exists()]  # it makes them before it downloads
    try:
        return import_robustbench().utils.load_model(name, dataset=dataset, threat_model=threat_model)
    except Exception as error:
        for folder in made:
            with suppress(OSError):  # something is in it, or it was not made
                folder.rmdir()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"RobustBench's {name} could not be loaded ({reason}); without a network, put "
            f"{_robustbench_files(entry, f'models/{dataset}/{threat_model}/{name}.pt')}."
        ) from error


def _robustbench_files(entry: dict[str, Any], path: str) -> str:
    """Which file RobustBench looks for, and where."""
    drive = entry["gdrive_id"]
    if not drive:
        return f"the file that it downloads into {torch.hub.get_dir()}/checkpoints"
    if isinstance(drive, str):
        return f"the file of Google Drive id {drive} at {path}"
    return " and ".join(f"that of Google Drive id {one} at {path}_m{i}.pt" for i, one in enumerate(drive))


def fingerprint(model: nn.Module) -> str:
    """sha256 of the weights."""
    return weights_digest(model)


def check_device(name: str) -> torch.device:
    """The device, or a ValueError if this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}; use cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Unknown device {name!r}; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"There is no GPU {name!r} here ({torch.cuda.device_count()} found); use --device cpu.")
    return device
