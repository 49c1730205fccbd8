"""A defended classifier in one call: any RobustBench model, or a module, behind a purifier."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from purify import zoo
from purify.checkpoints import default_score_model, load_score_model
from purify.checks import choose
from purify.data import DATASETS
from purify.diffusion.resize import needs_resize
from purify.diffusion.score import ScoreModel
from purify.presets import default_level, find_preset
from purify.purification.defended import DefendedClassifier
from purify.purification.levels import LEVELS, Settings, build_level
from purify.purification.purifier import Purifier
from purify.purification.scorenorm import Calibration


def wrap(
    model: str | nn.Module,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    purifier: str | Purifier = "diffpure",
    score_model: str | Path | ScoreModel | None = None,
    purifications: int = 1,
    aggregate: str = "logits",
    **options: Any,
) -> DefendedClassifier:
    """A classifier behind a purifier.

    A classifier that draws random numbers of its own takes them from torch's generator at each call.

    Args:
        model: name of a RobustBench model (or of an embedded classifier, or ``file.py:function``), or a module from
            images (N, C, H, W) in [0, 1] to logits, in eval mode. RobustBench's normalise inside.
        dataset: ``cifar10``, ``cifar100``, ``imagenet`` as in RobustBench, or an embedded data set. Behind a preset,
            images must have its shape.
        threat_model: of the RobustBench model: ``Linf``, ``L2``, ``corruptions``.
        purifier: name of a preset (``purify.PURIFIERS``), of a noise level (``ssni-l``, ``ssni-n``, ...; DiffPure
            there), or a purifier.
        score_model: as for :func:`~purify.load_score_model`, or ``file.py:function``, or a model. None: the data set's
            public one.
        purifications, aggregate: of :class:`~purify.purification.defended.DefendedClassifier`.
        options: arguments of the preset: ``t_star``, ``steps``, ``reverse``, ``gradient``, ... (an ``auxiliary`` may
            be named like ``model``); behind the name of a noise level also the level's: ``calibration``, ``tau``, ...
            SSNI finds the calibration of an embedded score model itself, and on CIFAR-10 takes the paper's tau.

    Behind a preset, images are resized to the score model's size and back where that is larger (ImageNet: 224 to 256).

    Raises:
        ValueError: unknown names; a file that is not here (the message says what to fetch); a module in train mode; a
            score model of other channels or for smaller images; at the call: images of another shape.
    """
    shape = choose(dataset, DATASETS, "data set").shape
    if isinstance(model, str):
        _check_classifier(model, dataset, threat_model)  # before the score network is loaded, which may be large
    if isinstance(purifier, Purifier):
        if options or score_model is not None:
            given = [*options, *(["score_model"] if score_model is not None else [])]
            raise ValueError(f"This purifier is complete; leave {', '.join(given)} out, or name a preset instead.")
        defence, takes = purifier, None
    else:
        defence, takes = _defence(purifier, score_model, dataset, threat_model, options), shape
    classifier = model if isinstance(model, nn.Module) else _classifier(model, dataset, threat_model)
    return DefendedClassifier(classifier, defence, purifications, aggregate, takes)


def _defence(
    name: str, score_model: str | Path | ScoreModel | None, dataset: str, threat_model: str, options: dict[str, Any]
) -> Purifier:
    """The preset, which resizes where it must."""
    preset, level = find_preset(name)
    parameters = inspect.signature(preset).parameters
    known = set(parameters) - {"score_model"} | (LEVELS[level].parameters() if level else set())
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            choose(option, dict.fromkeys(known), f"option of {name}")
    network = _score(score_model, dataset)
    resize = needs_resize(DATASETS[dataset].shape, network.image_shape)
    if level is not None:
        source = default_score_model(dataset) if score_model is None else str(score_model)
        options = _at_level(level, source, dataset, options)
    defence = preset(network, **_networks(options, dataset, threat_model))
    return defence.with_resize() if resize else defence


def _at_level(level: str, score_model: str, dataset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """DiffPure's options, with its noise level built from those that are the level's."""
    from purify.settings import usual_tau  # half a second of evaluation's libraries

    def embedded() -> Calibration | None:
        return zoo.calibration(score_model) if score_model in zoo.calibrations() else None

    own = {name: value for name, value in options.items() if name in LEVELS[level].parameters()}
    tau, unit = usual_tau(dataset)
    settings = Settings(default_level("diffpure"), embedded, tau=tau, tau_unit=unit)
    rest = {name: value for name, value in options.items() if name not in own}
    return {**rest, "t_star": build_level(level, settings, own)}


def _check_classifier(name: str, dataset: str, threat_model: str) -> None:
    from purify.named import check_classifier  # half a second of evaluation's libraries

    check_classifier(name, dataset, threat_model)


def _classifier(name: str, dataset: str, threat_model: str) -> nn.Module:
    from purify.named import load_classifier  # half a second of evaluation's libraries

    return load_classifier(name, dataset, threat_model)


def _networks(options: Mapping[str, Any], dataset: str, threat_model: str) -> dict[str, Any]:
    from purify.named import load_networks  # half a second of evaluation's libraries

    return load_networks(options, dataset, threat_model)


def _score(score_model: str | Path | ScoreModel | None, dataset: str) -> ScoreModel:
    if isinstance(score_model, ScoreModel):
        return score_model
    if isinstance(score_model, str):
        from purify.named import load_score  # half a second of evaluation's libraries

        return load_score(score_model, dataset)
    return load_score_model(default_score_model(dataset) if score_model is None else score_model)
