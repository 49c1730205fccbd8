"""What a classifier answers, taken as logits: the one place that calls models of which nothing is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from purify.checks import check_logits, fitting
from purify.finite import origin
from purify.transforms import readable


def ask(
    model: Callable[..., Any], x: Tensor, what: str = "The classifier", ids: Tensor | None = None, **keys: Any
) -> Tensor:
    """Logits (N, K) that ``model`` gives to images x (N, C, H, W) and ``keys``, one of each per image where tensors.

    ``ids`` (N,) name the images in errors; default: their places.

    Raises:
        ValueError: it cannot take the images or does not return logits; NaN, infinity, or the same logit for all
            classes, of which an argmax would still make a class: names the first sample, and the layer at fault.
    """
    with fitting(x, what):
        logits = as_logits(model(x, **keys))
    check_logits(logits, len(x), what)
    if logits.is_inference() and not torch.is_inference_mode_enabled():
        logits = logits.clone()  # whoever asks may not be able to use it otherwise
    seen = logits.detach()
    bad, flat = lost(seen), seen.amax(1) == seen.amin(1)
    if getattr(model, "aggregate", "logits") == "votes":  # an even vote is an answer
        flat = torch.zeros_like(bad)
    if readable(seen) and bool((bad | flat).any()):
        rows = (bad if bool(bad.any()) else flat).nonzero()[:1, 0]
        sample = int(rows if ids is None else ids.to(rows.device)[rows])
        if not bool(bad.any()):
            raise ValueError(f"{what} gives all {seen.shape[1]} classes the same logit for sample {sample}: no answer.")
        own = {name: v[rows] if isinstance(v, Tensor) and v.ndim else v for name, v in keys.items()}
        raise ValueError(no_number(model, what, sample, lambda: model(x[rows], **own)))
    return logits


def as_logits(output: Any) -> Any:
    """The ``logits`` of an output that has them (of transformers, say); any other as it is."""
    if isinstance(output, Tensor):
        return output
    return output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)


def remark_probabilities(logits: Tensor, what: str) -> None:
    """Warn where answers (N, K) are no logits: attacks then climb a softmax that is flat where it is sure."""
    x = logits.detach()
    if bool((x >= 0).all()) and bool(((x.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            f"{what} answers probabilities, not logits: gradients vanish where they are near 0 and 1, and the DLR loss "
            "needs logits; return what comes before the softmax.",
            stacklevel=3,
        )


def lost(logits: Tensor) -> Tensor:
    """Which rows of logits (N, K) hold NaN, or no finite largest one, (N,); minus infinity rules a class out."""
    return ~logits.amax(1).isfinite()  # NaN is larger than any number there


def no_number(model: Any, what: str, sample: int, again: Callable[[], Any]) -> str:
    """What is said of NaN or infinity, with the layer that ``again`` shows to make it."""
    made = origin({what: model}, again) if isinstance(model, nn.Module) else None
    where = "; check its weights and precision" if made is None else f", {made}"
    return f"{what} answers NaN or infinity for sample {sample}{where}."
