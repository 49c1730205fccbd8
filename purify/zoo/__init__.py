"""The embedded default: small networks for digits and Fashion-MNIST, with the recipes that trained them.

An entry is a safetensors file of weights beside a JSON file that says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from purify.checks import choose
from purify.diffusion.schedule import schedule_from_config
from purify.diffusion.score import ScoreModel
from purify.networks.embedded import build_network
from purify.purification.classify import DiffusionClassifier
from purify.purification.scorenorm import Calibration
from purify.weights.files import read
from purify.weights.loading import assign

WEIGHTS = Path(__file__).parent / "weights"
CALIBRATIONS = Path(__file__).parent / "calibrations"


def names(kind: str | None = None) -> list[str]:
    """Names of the embedded entries, all or those of a ``kind`` (``score``, ``classifier``).

    A class-conditional score model that is a diffusion classifier, too, is of both kinds.
    """
    if kind is not None:
        choose(kind, dict.fromkeys(("score", "classifier")), "kind of zoo model")
    return [e.stem for e in sorted(WEIGHTS.glob("*.json")) if kind is None or kind in _kinds(json.loads(e.read_text()))]


def _kinds(entry: dict[str, Any]) -> tuple[str, ...]:
    """What an entry can be loaded as; ``classifier`` holds the arguments of its diffusion classifier."""
    return (entry["kind"], "classifier") if "classifier" in entry else (entry["kind"],)


def score_model(name: str | Path) -> ScoreModel:
    """An embedded score model by name (``digits``, ``fashion_mnist``), or one that purify saved, by path.

    Returns it in eval mode with frozen weights.

    Raises:
        ValueError: unknown name; file missing, truncated, foreign, or not matching its JSON.
    """
    entry, network = _load(name, "score")
    try:
        config = dict(entry["score_model"])
        config["schedule"] = schedule_from_config(config["schedule"])
        return ScoreModel(network, **config).eval()
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{_json_path(name)} describes no score model ({error}).") from error


def classifier(name: str | Path) -> nn.Module:
    """An embedded classifier by name (``digits-standard``, ``digits-at``, ...), or one that purify saved, by path.

    Returns a module from images in [0, 1] to logits, in eval mode with frozen weights: of a class-conditional score
    model its :class:`~purify.purification.classify.DiffusionClassifier`. Raises as :func:`score_model`.
    """
    settings = describe(name).get("classifier")
    return _load(name, "classifier")[1] if settings is None else DiffusionClassifier(score_model(name), **settings)


def calibrations() -> list[str]:
    """Names of embedded score models whose score-norm calibration is embedded, too."""
    return sorted(path.stem for path in CALIBRATIONS.glob("*.json"))


def calibration(name: str) -> Calibration:
    """The score-norm calibration of an embedded score model, for SSNI, made by `purify calibrate`."""
    choose(name, dict.fromkeys(calibrations()), "embedded calibration")
    return Calibration.load(CALIBRATIONS / f"{name}.json")


def describe(name: str | Path) -> dict[str, Any]:
    """The JSON of an entry: architecture, recipe, what was measured."""
    path = _json_path(name)
    try:
        entry = json.loads(path.read_text())
        wanted = {"kind", "architecture"} | ({"score_model"} if entry["kind"] == "score" else set())
        missing = wanted - set(entry)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as a purify model description ({why}).") from error
    if missing:
        raise ValueError(f"{path} is not a purify model description: it lacks {', '.join(sorted(missing))}.")
    return entry


def save(path: str | Path, network: nn.Module, entry: dict[str, Any]) -> None:
    """Write ``path``.safetensors and ``path``.json; ``entry`` needs ``kind`` and ``architecture``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(entry, indent=2) + "\n")


def _json_path(name: str | Path) -> Path:
    if str(name).endswith((".safetensors", ".json")):
        return Path(name).with_suffix(".json")
    return WEIGHTS / f"{choose(str(name), {n: n for n in names()}, 'zoo model')}.json"


def _load(name: str | Path, kind: str) -> tuple[dict[str, Any], nn.Module]:
    entry = describe(name)
    if entry.get("kind") != kind:
        raise ValueError(f"{name} is a {entry.get('kind')} model, not a {kind}; known: {', '.join(names(kind))}.")
    try:
        network = build_network(entry["architecture"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_json_path(name)} describes no network of purify's: {error}.") from error
    load_weights(network, _json_path(name).with_suffix(".safetensors"))
    return entry, network.eval().requires_grad_(False)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``network``, strictly.

    Raises:
        ValueError: the file is missing, truncated or foreign, or its keys or shapes differ (the first few are listed).
    """
    assign(network, read(path), path)
