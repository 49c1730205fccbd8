"""What every attack takes and returns, and how it calls a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.answers import ask, remark_probabilities
from purify.attacks.counting import bar
from purify.attacks.protocols import FEATURES, AcceptsKeys, Feature, HasDetails
from purify.attacks.submitted import Submitted
from purify.attacks.threats import NORMS, THREATS
from purify.checks import (
    check_count,
    check_eval,
    check_images,
    check_labels,
    choose,
    has,
    is_number,
    missing,
    nearest,
    sample_keys,
    short,
)
from purify.diffusion.noise import derive_seed
from purify.diffusion.score import ScoreModel
from purify.purification.calls import calls, is_purified
from purify.purification.purifier import Purifier

KeyedCall = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, sample ids, draws -> logits


@dataclass(frozen=True)
class AttackResult:
    """Outcome of an attack on N images.

    Attributes:
        images: adversarial images (N, C, H, W) in [0, 1], within eps of the originals.
        loss: loss of each returned image as the attack estimated it, (N,); NaN where the attack does not tell.
        calls: network calls that each image took, (N,); None where the attack does not count them.
        submitted: the judged model's answers to all iterates; None where the attack does not see them.
        sizes: beyond l_p norms, how far each image is from its original, (N,), by what is measured.
    """

    images: Tensor
    loss: Tensor
    calls: Tensor | None = None
    submitted: Submitted | None = None
    sizes: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Attack(ABC):
    """An attack within ``eps`` of images in [0, 1], as the threat model ``norm`` measures: Linf, L2, L1, or another of
    :data:`~purify.attacks.threats.THREATS` that is among the attack's ``threats``."""

    norm: str
    eps: float

    name: ClassVar[str]
    threats: ClassVar[tuple[str, ...]] = NORMS  # threat models in which it can move
    # Library attacks draw from torch's generator for a whole batch. They run on fixed groups of sample ids
    # (id // group_size); give them whole groups and a result does not depend on the batch. None: any batch will do.
    group_size: ClassVar[int | None] = None
    # What the attack is about, and says nothing without: a Feature, or its name in FEATURES.
    needs: ClassVar[Feature[Any] | str | None] = None
    black_box: ClassVar[bool] = False  # uses no gradient of the model that is judged
    takes_gradient: ClassVar[bool] = True  # of anything: a part of the model, or another network
    # Whether the loss is differentiated through the judged model itself; False for a stand-in or with parts of it held
    # constant. What an attack mixes into that gradient does not count.
    exact_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm not in THREATS:
            meant = nearest(self.norm, THREATS)
            raise ValueError(f"Unknown threat model {short(self.norm)}{meant}; known: {', '.join(THREATS)}.")
        if self.norm not in self.threats:
            known = ", ".join(self.threats)
            raise ValueError(
                f"{self.name} is an attack in {known}, not in {self.norm}; take another attack or threat model."
            )
        if not (is_number(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be a number of at least 0, got {short(self.eps)}.")
        if not isinstance(self.eps, (int, float)):
            object.__setattr__(self, "eps", float(self.eps))  # a number of numpy's; records are JSON
        if self.norm == "Linf" and self.eps > 1:
            raise ValueError(f"An L_inf eps is for images in [0, 1] and at most 1, got {self.eps}; divide it by 255.")

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> AttackResult:
        """Attack ``model`` at ``images`` (N, C, H, W) in [0, 1] with ``labels`` (N,).

        ``sample_ids`` (N,) key all randomness together with ``seed`` (default: 0..N-1). Weights should not require
        gradients (a :class:`~purify.DefendedClassifier` freezes its own); the attack then costs a third less.
        ``progress`` shows a bar that counts the network's gradients.

        Raises:
            ValueError: images or labels out of range or on another device; a model in train mode, or that is none, or
                that cannot take the images; no gradient, or a loss or gradient that is not finite.
        """
        check_images(images)
        check_model(model)
        ids, seed = sample_keys(sample_ids, images), derive_seed(seed, self.name)
        if isinstance(labels, Tensor) and labels.device != images.device:
            raise ValueError(f"Labels are on {labels.device} but images on {images.device}; move one of them.")
        classes = num_classes(model, images, ids, seed)
        check_labels(labels, len(images), classes)
        if classes is not None:
            self.check_classes(classes)
        if self.feature is not None and not self.applies_to(model):
            raise ValueError(self.feature.refusal(self.name, model))
        THREATS[self.norm].check(images)
        if len(images) == 0:
            return AttackResult(images.detach(), images.new_zeros(0))
        with torch.enable_grad(), bar(self.label, self.counts(model) * len(images), progress):
            found = self.run(model, images.detach(), labels.long(), ids, seed)
        if self.norm in NORMS or found.sizes is not None:
            return found
        return replace(found, sizes={self.norm: THREATS[self.norm].size(found.images, images)})

    @abstractmethod
    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        """The attack itself, on checked input and under a seed of its own."""

    @property
    def label(self) -> str:
        """How records and tables call the attack: its name, with what tells it from its siblings in one run."""
        return self.name

    @property
    def feature(self) -> Feature[Any] | None:
        """What ``needs`` stands for."""
        return choose(self.needs, FEATURES, "feature of models") if isinstance(self.needs, str) else self.needs

    def applies_to(self, model: nn.Module) -> bool:
        """Whether the attack says something about ``model`` that others do not."""
        return self.feature is None or self.feature.is_of(model)

    @property
    def wanted(self) -> int | None:
        """The class that all answers shall be, of an attack at one class."""
        return None

    def check_classes(self, classes: int) -> None:  # noqa: B027 - most attacks take any number
        """Raise ValueError unless a model of this many classes can be attacked."""

    def attacked(self, model: nn.Module) -> nn.Module:
        """The model that is differentiated; its forward values are those of ``model``."""
        return model

    def climbs(self, model: nn.Module) -> list[tuple[nn.Module, int]]:
        """Models that are differentiated, each with the draws of an image that go through it at once."""
        return [(self.attacked(model), getattr(self, "eot", 1))]

    @property
    def gradients(self) -> int:
        """Gradients of the judged model that the attack takes per image."""
        return 0

    @property
    def forwards(self) -> int:
        """Forward passes of the judged model, without a gradient, that the attack takes per image."""
        return 0

    def gradient_calls(self, model: nn.Module) -> int:
        """Network calls of one of the gradients that it takes of ``model``."""
        seen = self.attacked(model)
        return calls(seen if is_purified(seen) else model).gradient  # a wrapper takes what it wraps

    def other_calls(self, model: nn.Module) -> int:
        """Network calls for one image on networks beside ``model``: where it begins, say."""
        return 0

    def network_calls(self, model: nn.Module) -> int:
        """Network calls for one image on ``model``, by :func:`purify.purification.calls.calls`.

        Beyond them are gradients that are taken again inside [0, 1], and what libraries ask before they attack.
        """
        taken = self.gradients * self.gradient_calls(model) + self.forwards * calls(model).forward
        return taken + self.other_calls(model)

    def passes(self, model: nn.Module) -> tuple[float, float]:
        """:meth:`network_calls` in gradients and in forward passes of ``model``."""
        own, forwards = calls(model), self.forwards_on(model)
        return (self.network_calls(model) - forwards * own.forward) / own.gradient, forwards

    def forwards_on(self, model: nn.Module) -> int:
        """``forwards`` on ``model``, of attacks that decide by the model how many they take."""
        return self.forwards

    def answers(self, model: nn.Module) -> int:
        """Answers of ``model`` to its iterates that ``AttackResult.submitted`` counts, for one image at most."""
        return 0

    @property
    def counted(self) -> int:
        """What a bar counts per image: gradients, or queries of an attack that takes none."""
        return self.gradients or self.forwards

    def counts(self, model: nn.Module) -> int:
        """``counted`` on ``model``."""
        return self.counted

    def fitted(self, model: nn.Module, name: str = "this purifier") -> Attack:
        """The same attack with what ``model``, called ``name``, takes at least; a warning where that is more."""
        return self

    def on_deterministic(self) -> Attack:
        """The same attack on a model without randomness, where averaging over draws would be a waste."""
        return self

    def doubled(self) -> dict[str, Attack]:
        """The same attack with twice the effort, by what is doubled; none where convergence cannot be asked for."""
        return {}

    def budget(self) -> dict[str, Any]:
        """Plain data that states the attack and its budget in records and tables."""
        return {"attack": self.label, **asdict(self)}


def check_model(model: Any) -> None:
    """Raise ValueError unless ``model`` can be attacked here: a function, or a module in eval mode."""
    if not callable(model) or isinstance(model, (type, ScoreModel, Purifier)):
        advice = "attack a torch.nn.Module from images to logits, as purify.DefendedClassifier(classifier, purifier)"
        raise ValueError(f"{short(model)} is no classifier; {advice}.")
    if isinstance(model, nn.Module):
        check_eval(model, "attacking it")
    if torch.is_inference_mode_enabled():
        raise ValueError("Attacks take gradients, which torch.inference_mode() forbids; call them outside of it.")


def keyed(model: nn.Module, seed: int, what: str = "The model") -> KeyedCall:
    """``model`` as a function of images, sample ids and draws; models without keys ignore these.

    The function raises ValueError for what :func:`purify.answers.ask` refuses; ``what`` is how it calls the model.
    """
    if not (has(model, AcceptsKeys) and model.accepts_keys):
        return lambda x, ids, draws: ask(model, x, what, ids)
    if not missing(model, HasDetails):  # which asks its classifier in the same way
        return lambda x, ids, draws: model(x, sample_ids=ids, draw=draws, seed=seed)
    return lambda x, ids, draws: ask(model, x, what, ids, sample_ids=ids, draw=draws, seed=seed)


@torch.no_grad()
def num_classes(model: nn.Module, images: Tensor, ids: Tensor, seed: int, what: str = "The model") -> int | None:
    """Classes that the model tells apart, asked on one image; None without images. Warns of probabilities."""
    if len(images) == 0:
        return None
    answers = keyed(model, seed, what)(images[:1], ids[:1], torch.zeros_like(ids[:1]))
    if getattr(model, "aggregate", "logits") != "votes":  # shares of votes have the gradient of a softmax by intent
        remark_probabilities(answers, what)
    return answers.shape[1]


def check_budget(steps: int, eot: int, restarts: int) -> None:
    """Raise ValueError unless all three are whole numbers of at least 1."""
    for what, value in (("attack steps", steps), ("EOT draws", eot), ("restarts", restarts)):
        check_count(value, what)
