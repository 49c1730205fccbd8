"""What attacks climb, as functions of logits: away from a class, or from one class to another."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (R, K) and classes (R,), or pairs of them (R, 2) -> (R,)


def ce_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per row, (R, K) and (R,) -> (R,)."""
    return cross_entropy(logits, y, reduction="none")


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the label's (Carlini & Wagner 2017): positive where misclassified."""
    own = one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6); needs at least three classes."""
    if logits.shape[1] < 3:
        raise ValueError("The DLR loss needs at least three classes; use loss='margin'.")
    top = logits.topk(3, dim=1).values
    return margin_loss(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def pair_margin(logits: Tensor, pair: Tensor) -> Tensor:
    """The second class's logit minus the first one's, (R, K) and pairs (R, 2) -> (R,)."""
    return logits.gather(1, pair).diff(dim=1)[:, 0]


def pair_ce(logits: Tensor, pair: Tensor) -> Tensor:
    """Log-probability of the second class; the first one does not matter."""
    return -ce_loss(logits, pair[:, 1])


def pair_dlr(logits: Tensor, pair: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce & Hein 2020, eq. 7); needs at least four classes."""
    if logits.shape[1] < 4:
        raise ValueError("The targeted DLR loss needs at least four classes; use loss='margin'.")
    top = logits.topk(4, dim=1).values
    return pair_margin(logits, pair) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-12)


LOSSES: dict[str, Loss] = {"ce": ce_loss, "margin": margin_loss, "dlr": dlr_loss}

# The same by name, from the first class of a pair to the second.
PAIR_LOSSES: dict[str, Loss] = {"ce": pair_ce, "margin": pair_margin, "dlr": pair_dlr}
