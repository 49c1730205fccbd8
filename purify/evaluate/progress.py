"""A bar that counts work, not samples: its estimate weighs every stage by the network calls that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from tqdm import tqdm

from purify.attacks.base import Attack
from purify.attacks.counting import heard
from purify.purification.calls import Calls, calls

if TYPE_CHECKING:
    from purify.evaluate.runner import Defence

FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


def cost(defence: Defence) -> float:
    """Network calls of one answer."""
    return calls(defence.model).forward


def weight(defence: Defence, attack: Attack | None) -> float:
    """Network calls of one sample in a stage: the attack's, and its judges'."""
    if attack is None:
        return cost(defence) * defence.draws
    return attack.network_calls(defence.model) + cost(defence) * defence.draws


class Progress:
    """The bar of a run.

    Args:
        total: work of all stages, see :func:`weight`.
        shown: whether anything is drawn.
    """

    def __init__(self, total: float, shown: bool) -> None:
        self.bar = tqdm(total=total, disable=not shown, mininterval=0.5, smoothing=0.1, bar_format=FORMAT)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def stage(self, name: str) -> None:
        """Say what runs."""
        self.bar.set_description(name)

    def accuracy(self, share: float) -> None:
        """Say what it found so far."""
        self.bar.set_postfix_str(f"accuracy {100 * share:.1f} %")

    def skip(self, work: float) -> None:
        """Count what an earlier session did, or nobody needs to do."""
        if not self.bar.disable:
            self.bar.n += work
            self.bar.initial += work  # the estimate is that of this session's speed
            self.bar.last_print_n = self.bar.n

    @contextmanager
    def work(self, defence: Defence, amount: float) -> Iterator[None]:
        """Count ``amount``; while it lasts, as the model and its twins are called, never more than that."""
        start, ahead, told = self.bar.n, 0.0, False
        prices: WeakKeyDictionary[Any, Calls] = WeakKeyDictionary()

        def price(model: Any) -> Calls:
            if model not in prices:
                prices[model] = calls(model)
            return prices[model]

        def done(taken: float) -> None:
            self.bar.update(min(taken, start + amount - self.bar.n))

        def called(model: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """A twin has the hooks of its original, and its own price: a shorter process, say."""
            nonlocal ahead
            gradient = torch.is_grad_enabled() and output.requires_grad
            if gradient and told:
                return
            rows = len(inputs[0]) if inputs and isinstance(inputs[0], torch.Tensor) else 1
            taken = rows * (price(model).gradient if gradient else price(model).forward)
            ahead += taken if gradient else 0
            done(taken)

        def on_count(rows: int, each: int | None) -> None:
            """What an attack tells of its gradients is their price, and takes the place of what the hook saw."""
            nonlocal ahead, told
            if each == 0:  # queries
                return
            due = rows * (price(defence.model).gradient if each is None else each) - ahead
            ahead, told = max(-due, 0), True
            done(max(due, 0))

        hook = defence.model.register_forward_hook(called)
        try:
            with heard(on_count):
                yield
        finally:
            hook.remove()
            self.bar.update(start + amount - self.bar.n)
