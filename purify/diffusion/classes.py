"""Which class a class-conditional diffusion network is told, where a purifier knows none."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from purify import registry
from purify.answers import ask
from purify.checks import check_count, check_eval, choose, short
from purify.fingerprint import is_compiled, unwrapped, weights_digest

TABLES = ("class_embedding", "label_emb")  # of diffusers and of guided-diffusion
USUAL = (10, 100, 1000)  # classes of data sets: a table of so many has no entry for no class


class ClassRule(ABC):
    """The class of each image, or none."""

    looks = False  # whether it looks at the image

    @abstractmethod
    def check(self, network: nn.Module) -> None:
        """Raise ValueError if the network cannot be told so."""

    @abstractmethod
    def of(self, network: nn.Module, u: Tensor) -> Tensor | None:
        """Classes int64 (N,), or weights of classes (N, K), of images u (N, C, H, W) in [-1, 1] space; None: none."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data that tells the rule from others."""


@dataclass(frozen=True)
class Unconditional(ClassRule):
    """No class: the entry that the network was trained with for none (classifier-free guidance, Ho & Salimans 2022).

    Args:
        token: its index; None: the last one of the table, unless the table has just the 10, 100 or 1000 classes of a
            data set. EDM's networks need none, they are told zeros.
    """

    token: int | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            check_count(self.token, "token", 0)

    def check(self, network: nn.Module) -> None:
        k = classes_of(network)
        if k is None or _is_edm(network):
            return
        if self.token is None and k in USUAL:
            raise ValueError(
                f"This network knows {k} classes and no entry for none is known; pass classes=Unconditional(token), a "
                "class, or Predicted(classifier)."
            )
        if self.token is not None and self.token >= k:
            raise ValueError(f"token must be below the network's {k} classes, got {self.token}.")

    def of(self, network: nn.Module, u: Tensor) -> Tensor | None:
        if _is_edm(network):
            return None
        k = classes_of(network)
        token = self.token if self.token is not None else (k or 1) - 1
        return torch.full((len(u),), token, dtype=torch.int64, device=u.device)

    def config(self) -> dict[str, Any]:
        return {"kind": "unconditional", "token": self.token}


@dataclass(frozen=True)
class Fixed(ClassRule):
    """The same class, an index from 0, for every image."""

    index: int

    def __post_init__(self) -> None:
        check_count(self.index, "class", 0)

    def check(self, network: nn.Module) -> None:
        k = classes_of(network)
        if k is not None and self.index >= k:
            raise ValueError(f"The class must be below the network's {k}, got {self.index}.")

    def of(self, network: nn.Module, u: Tensor) -> Tensor:
        return torch.full((len(u),), self.index, dtype=torch.int64, device=u.device)

    def config(self) -> dict[str, Any]:
        return {"kind": "fixed", "index": self.index}


@dataclass(frozen=True, eq=False)
class Predicted(ClassRule):
    """What a classifier says of the image that came in.

    The class is the most likely one. Its gradient, zero almost everywhere, would hide that way from an attack; it is
    that of the mean of the table's entries, weighted by the softmax, where the network has a table
    (``class_embedding``, ``label_emb``) or takes weights (EDM). In other networks the class is constant.

    Args:
        classifier: images (N, C, H, W) in [0, 1] to logits (N, K) of the network's classes, in eval mode; frozen.
    """

    classifier: nn.Module
    looks = True

    def __post_init__(self) -> None:
        if not isinstance(self.classifier, nn.Module):
            raise ValueError(f"Predicted takes a classifier, a torch.nn.Module, got {short(self.classifier)}.")
        check_eval(self.classifier, "asking it for classes")
        self.classifier.requires_grad_(False)

    def check(self, network: nn.Module) -> None:
        """Nothing is known before the classifier is asked."""

    def of(self, network: nn.Module, u: Tensor) -> Tensor:
        soft = ask(self.classifier, (u + 1) / 2, "The classifier of Predicted").softmax(1)
        k = classes_of(network)
        if k is not None and soft.shape[1] > k:
            raise ValueError(f"The network knows {k} classes, the classifier {soft.shape[1]}; take one of the same.")
        hard = one_hot(soft.argmax(1), soft.shape[1]).to(soft)
        return hard + (soft - soft.detach())

    def config(self) -> dict[str, Any]:
        return {"kind": "predicted", "classifier": weights_digest(self.classifier)}


PLAIN: dict[str, type[ClassRule]] = {"unconditional": Unconditional, "fixed": Fixed}  # those that are plain data


def as_rule(classes: Any) -> ClassRule:
    """A rule given as itself, as ``unconditional``, as a class, or as its config.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(classes, ClassRule):
        return classes
    if isinstance(classes, Mapping):
        return registry.build(classes, PLAIN, "class rule")
    if isinstance(classes, str) and classes.isdigit():
        classes = int(classes)
    if isinstance(classes, int) and not isinstance(classes, bool):
        return Fixed(classes)
    if classes == "predicted":
        raise ValueError("classes='predicted' needs a classifier; pass purify.diffusion.classes.Predicted(classifier).")
    choose(classes, {"unconditional": 0, "predicted": 0}, "class rule")
    return Unconditional()


def classes_of(network: nn.Module) -> int | None:
    """How many classes a network is conditional on; None: it does not say that it is."""
    network = unwrapped(network)
    config = getattr(network, "config", None)
    told = (
        config.get("num_class_embeds") if isinstance(config, Mapping) else None,
        getattr(network, "num_classes", None),
        getattr(getattr(network, "denoiser", None), "label_dim", None),
    )
    return next((n for n in told if isinstance(n, int) and n > 0), None)


def check_takes(network: nn.Module) -> None:
    """Raise ValueError if the network cannot be called as ``network(u, labels, classes)``."""
    inner = unwrapped(network)
    try:
        inspect.signature(inner.forward).bind(None, None, None)
    except TypeError:
        raise ValueError(
            f"{type(inner).__name__} takes no classes, it is not class-conditional; leave classes out "
            "(--score-classes on the command line)."
        ) from None


def check_told(network: nn.Module) -> None:
    """Raise ValueError if the network is class-conditional and must be told a class."""
    k = classes_of(network)
    if k is not None and not _is_edm(network):
        raise ValueError(
            f"This network is conditional on {k} classes; say which it is told: classes='unconditional' (its entry for "
            "no class), a class from 0, or purify.diffusion.classes.Predicted(classifier)."
        )


def call(network: nn.Module, u: Tensor, labels: Tensor, classes: Tensor | None) -> Any:
    """``network(u, labels, classes)``, where weights (N, K) reach its table of classes with their gradient."""
    if classes is None:
        return network(u, labels)
    if not classes.is_floating_point() or _is_edm(network):
        return network(u, labels, classes)
    if classes.requires_grad:
        network = unwrapped(network) if is_compiled(network) else network  # which might not see the hook
    with _weighted(network, classes):
        return network(u, labels, classes.argmax(1))


def _is_edm(network: nn.Module) -> bool:
    return getattr(unwrapped(network), "takes_weights", False)


@contextmanager
def _weighted(network: nn.Module, weights: Tensor) -> Iterator[None]:
    """The table of classes answers the mean of its entries, by ``weights`` (N, K)."""
    network = unwrapped(network)
    table = next((t for t in (getattr(network, name, None) for name in TABLES) if isinstance(t, nn.Embedding)), None)
    if table is None or not weights.requires_grad:
        yield
        return

    def mean(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        entries = table.weight[: weights.shape[1]]
        return output + ((weights @ entries) - (weights @ entries).detach()).to(output)

    handle = table.register_forward_hook(mean)
    try:
        yield
    finally:
        handle.remove()
