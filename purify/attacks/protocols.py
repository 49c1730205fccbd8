"""What attacks use of a model beyond images to logits, as protocols, and the features of models that they are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from torch import Tensor, nn

from purify.checks import has, missing
from purify.purification.gradients import GradientEngine
from purify.purification.outcomes import Details
from purify.purification.purifier import Purifier

M = TypeVar("M")
Ids = Tensor | Sequence[int] | None


class AcceptsKeys(Protocol):
    """Has randomness that is a function of sample ids, draw and seed, and says so."""

    @property
    def accepts_keys(self) -> bool: ...

    def __call__(self, x: Tensor, *, sample_ids: Ids = None, draw: int | Tensor = 0, seed: int = 0) -> Tensor: ...


class HasDetails(Protocol):
    """Says how its logits came about."""

    def details(
        self, x: Tensor, *, sample_ids: Ids = None, draw: int | Tensor = 0, seed: int = 0, deviation: bool = False
    ) -> Details: ...


class OtherGradient(Protocol):
    """The same forward values can have another gradient."""

    def with_gradient(
        self,
        gradient: str | GradientEngine | Mapping[str, Any] | None = None,
        through_level: bool | None = None,
        second_order: bool | None = None,
    ) -> nn.Module: ...


class HasPurifier(OtherGradient, Protocol):
    """Purifies, with a gradient engine that can be replaced."""

    @property
    def purifier(self) -> Purifier: ...


class BehindPurifier(Protocol):
    """A classifier, which also answers by itself, behind a purifier."""

    @property
    def purifier(self) -> nn.Module: ...

    @property
    def classifier(self) -> nn.Module: ...


class VaryingLevel(OtherGradient, HasDetails, Protocol):
    """Computes a noise level from each image, where it varies; gradients may hold it constant, and a share be taken."""

    @property
    def level_varies(self) -> bool: ...

    def at_share(self, share: float) -> nn.Module: ...


class Guided(OtherGradient, Protocol):
    """Guides its reverse steps, if anything does; gradients may hold the guidance constant."""

    @property
    def guided(self) -> bool: ...


class HasAuxiliary(Protocol):
    """Is guided by a network, if by any, which is a classifier of images, too."""

    @property
    def auxiliary(self) -> nn.Module | None: ...


class InStep(HasDetails, Protocol):
    """Steps all samples together, if so, and its details have the deviation of these steps."""

    @property
    def in_step(self) -> bool: ...


@dataclass(frozen=True)
class Feature(Generic[M]):
    """What an attack is about and says nothing without: ``Attack.needs``.

    Attributes:
        protocol: how the attack uses the model.
        words: what to call it, after "a model that".
        holds: whether a model with these members has the feature.
    """

    protocol: type[M]
    words: str
    holds: Callable[[M], bool]

    def of(self, model: object) -> M:
        """The model as the protocol sees it.

        Raises:
            ValueError: it lacks members of the protocol.
        """
        lacking = missing(model, self.protocol)
        if lacking:
            raise ValueError(f"{type(model).__name__} is no model that {self.words}: it lacks {', '.join(lacking)}.")
        return cast(M, model)

    def is_of(self, model: object) -> bool:
        """Whether the model has the feature."""
        return has(model, self.protocol) and bool(self.holds(model))

    def refusal(self, attack: str, model: object) -> str:
        """Why ``attack`` is not for the model, and what is."""
        lacking, every = missing(model, self.protocol), missing(None, self.protocol)
        reason = f"lacks {', '.join(lacking)}" if 0 < len(lacking) < len(every) else "does not"
        return f"{attack} is for a model that {self.words}; this one {reason}, use pgd-eot."


PURIFIER = Feature(HasPurifier, "has a purifier", lambda model: isinstance(model.purifier, nn.Module))
BARE_CLASSIFIER = Feature(BehindPurifier, "has a purifier", lambda model: isinstance(model.purifier, nn.Module))
VARYING_LEVEL = Feature(VaryingLevel, "chooses a noise level for each image", lambda model: model.level_varies)
GUIDED = Feature(Guided, "guides its reverse steps", lambda model: model.guided)
AUXILIARY = Feature(
    HasAuxiliary, "is guided by an auxiliary network", lambda model: isinstance(model.auxiliary, nn.Module)
)
IN_STEP = Feature(
    InStep,
    "steps all samples together (a number of steps, not --dt), with the gradient full or checkpoint",
    lambda model: model.in_step,
)

# What ``Attack.needs`` may also say as a string.
FEATURES: dict[str, Feature[Any]] = {
    "purifier": PURIFIER,
    "classifier": BARE_CLASSIFIER,
    "level_varies": VARYING_LEVEL,
    "guided": GUIDED,
    "auxiliary": AUXILIARY,
    "in_step": IN_STEP,
}
