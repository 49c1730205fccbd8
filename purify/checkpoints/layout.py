"""What a checkpoint format says about a file: the network that it needs, its weights under our names, its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from purify.networks.consistency import ConsistencyFunction
from purify.weights.loading import differences, refuse


@dataclass(frozen=True)
class Layout:
    """A network on the meta device, the weights that it takes, and the settings of its ``ScoreModel``."""

    network: nn.Module
    weights: Mapping[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How one program writes its checkpoints.

    Attributes:
        recognises: whether the content of a file, a dict, is of this format.
        read: content, file name and head width (None: the published one) to layout; raises ValueError.
    """

    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Path, int | None], Layout]


def consistency(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    sigma_min: float = 0.002,
    sigma_data: float = 0.5,
) -> Layout:
    """The layout of a :class:`~purify.networks.consistency.ConsistencyFunction` around ``network``."""
    function = ConsistencyFunction(network, None, sigma_min, sigma_data)
    own = {f"network.{key}": weight for key, weight in weights.items()}
    return Layout(function, own, {**settings, "schedule": function.schedule, "prediction": "consistency"})


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], source: Path) -> dict[str, Tensor]:
    """Weights under our names, from ``names``: ours to theirs (several of ours may share one of theirs).

    Raises:
        ValueError: names missing from the file, or in the file and in no place of the network.
    """
    refuse(differences(names.values(), weights), source)
    return {ours: weights[theirs] for ours, theirs in names.items()}
