"""A defended classifier in one call: any RobustBench model, or a module, behind a purifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from purify import zoo
from purify.checkpoints import default_score_model, load_score_model
from purify.checks import choose, short
from purify.diffusion.resize import needs_resize
from purify.diffusion.score import ScoreModel
from purify.plugin import is_in_file, said, split
from purify.presets import find_preset
from purify.purification.defended import DefendedClassifier
from purify.purification.levels import LEVELS, NoiseLevel, Settings, build_level
from purify.purification.purifier import Purifier
from purify.settings import setting, usual_tau
from purify.sources import resolve_data


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
        dataset: ``cifar10``, ``cifar100``, ``imagenet`` as in RobustBench, an embedded data set, or a source of your
            own as :func:`~purify.sources.resolve_data` takes it. Behind a preset, images must have its shape.
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
    if not isinstance(model, str | nn.Module):
        advice = "a name, as 'Standard', or a torch.nn.Module in eval mode"
        raise ValueError(f"model must be {advice}, got {short(model)}.")
    data = resolve_data(dataset)
    shape, dataset = data.shape, data.like or dataset
    if isinstance(model, str):
        _check_classifier(model, dataset, threat_model)  # before the score network is loaded, which may be large
    if isinstance(purifier, Purifier):
        if options or score_model is not None:
            given = [*options, *(["score_model"] if score_model is not None else [])]
            raise ValueError(f"This purifier is complete; leave {', '.join(given)} out, or name a preset instead.")
        defence, takes = purifier, None
    else:
        own = LEVELS[purifier].parameters() - {"t_star"} if purifier in LEVELS else set()
        level_options = {name: options.pop(name) for name in list(options) if name in own}
        arguments: dict[str, Any] = {"level_options": level_options, "shape": shape, **options}
        defence, takes = build_purifier(purifier, score_model, dataset, threat_model, **arguments), shape
    classifier = model if isinstance(model, nn.Module) else _classifier(model, dataset, threat_model)
    return DefendedClassifier(classifier, defence, purifications, aggregate, takes)


def build_purifier(
    purifier: str,
    score_model: str | Path | ScoreModel | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    level: str | None = None,
    level_options: Mapping[str, Any] | None = None,
    shape: tuple[int, int, int] | None = None,
    **options: Any,
) -> Purifier:
    """A purifier by name, set as ``purify.settings`` says for the data set, and as told beyond that.

    What :func:`wrap` and the command line build: the same name is the same defence everywhere.

    Args:
        purifier, score_model, dataset, threat_model: as for :func:`wrap`; ``purifier`` may also be
            ``file.py:function``, a function like those of ``purify.presets``.
        level: name of the noise level rule; default: constant, or the one that ``purifier`` names.
        level_options: parameters of that rule; what it needs besides (a calibration, ...) is found.
        shape: (C, H, W) of the images, where they are not those of the data set.
        options: of the purifier; ``t_star`` may be a rule, and then is the noise level.

    It resizes where images of the data set are smaller or larger than the score model's, and moves networks among the
    options to its device.

    Raises:
        ValueError: unknown names and options; a score model that cannot take the images; as the purifier.
    """
    preset, named = find_preset(purifier)
    rule = level or named or "constant"
    _check_options(purifier, preset, LEVELS[named].parameters() if named else set(), options)
    network = _score(score_model, dataset)
    resize = needs_resize(shape or resolve_data(dataset).shape, network.image_shape)
    usual = setting("diffpure" if named else purifier, dataset).options()
    parameters = inspect.signature(preset).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    settings = {name: value for name, value in usual.items() if takes_any or name in parameters} | options
    if not isinstance(settings.get("t_star"), (NoiseLevel, Mapping)):
        source = default_score_model(dataset) if score_model is None else str(score_model)
        given = _level_settings(settings["t_star"], source, dataset)
        settings["t_star"] = build_level(rule, given, level_options or {})
    elif level or named or level_options:
        raise ValueError(f"t_star is a noise level already; leave {rule} out, or give a number.")
    device = next((p.device for p in network.parameters()), None)
    arguments = {
        name: value.to(device) if isinstance(value, nn.Module) else value  # a guide compares images where they are
        for name, value in _networks(settings, dataset, threat_model).items()
    }
    with said(split(purifier)[0]) if is_in_file(purifier) else nullcontext():
        built = preset(network, **arguments)
    if not isinstance(built, Purifier):
        raise ValueError(f"{purifier} returned {type(built).__name__}; it must return a purify.Purifier.")
    return built.with_resize() if resize else built


def _check_options(name: str, preset: Callable[..., Purifier], of_level: set[str], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(preset).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            choose(option, dict.fromkeys(set(parameters) - {"score_model"} | of_level), f"option of {name}")


def _level_settings(t_star: float, score_model: str, dataset: str) -> Settings:
    """What noise levels take beside their own parameters."""
    tau, unit = usual_tau(dataset)
    embedded = zoo.calibration if score_model in zoo.calibrations() else lambda name: None
    return Settings(t_star, lambda: embedded(score_model), tau=tau, tau_unit=unit)


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
