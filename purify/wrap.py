"""A defended classifier in one call: any RobustBench model, or a module, behind a purifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from purify.checkpoints import load_score_model
from purify.checks import choose
from purify.defended import DefendedClassifier
from purify.presets import PURIFIERS
from purify.purifier import Purifier
from purify.score import ScoreModel

# Public or embedded score networks that were trained on the data set.
SCORE_MODELS: Mapping[str, str] = {
    "cifar10": "score-sde-cifar10",
    "imagenet": "guided-imagenet256",
    "digits": "digits",
    "fashion_mnist": "fashion_mnist",
}


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
        dataset: ``cifar10``, ``cifar100``, ``imagenet`` as in RobustBench, or an embedded data set.
        threat_model: of the RobustBench model: ``Linf``, ``L2``, ``corruptions``.
        purifier: name of a preset (``purify.PURIFIERS``), or a purifier.
        score_model: as for :func:`~purify.load_score_model`, or a model. None: the data set's public one.
        purifications, aggregate: of :class:`~purify.defended.DefendedClassifier`.
        options: arguments of the preset: ``t_star``, ``steps``, ``reverse``, ``gradient``, ...

    Where the score model says the size of its images, others are resized to it and back (ImageNet: 224 to 256).

    Raises:
        ValueError: unknown names; a file that is not here (the message says what to fetch); a module in train mode.
    """
    if isinstance(purifier, Purifier):
        if options or score_model is not None:
            given = [*options, *(["score_model"] if score_model is not None else [])]
            raise ValueError(f"This purifier is complete; leave {', '.join(given)} out, or name a preset instead.")
        defence = purifier
    else:
        preset = choose(purifier, PURIFIERS, "purifier")
        defence = preset(_score(score_model, dataset), **options)
        if defence.score_model.image_shape is not None:
            defence = defence.with_resize()
    classifier = model if isinstance(model, nn.Module) else _classifier(model, dataset, threat_model)
    return DefendedClassifier(classifier, defence, purifications, aggregate)


def _classifier(name: str, dataset: str, threat_model: str) -> nn.Module:
    from purify.evaluate.models import load_classifier  # half a second of evaluation's libraries

    return load_classifier(name, dataset, threat_model)


def _score(score_model: str | Path | ScoreModel | None, dataset: str) -> ScoreModel:
    if isinstance(score_model, ScoreModel):
        return score_model
    if score_model is None and dataset not in SCORE_MODELS:
        raise ValueError(f"No score network of {dataset} is known; pass score_model=..., see docs/weights.md.")
    return load_score_model(SCORE_MODELS[dataset] if score_model is None else score_model)
