"""Whether a model's answer to an image depends on what shares its batch, which would make records depend on it, too."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from purify.attacks.base import keyed

FEW = 4  # images that are asked about
ROUNDING = 0.01  # of the largest logit: what another batch size may change


@torch.no_grad()
def check_steady(name: str, model: nn.Module, images: Tensor, ids: Tensor, seed: int = 0) -> None:
    """Raise ValueError unless the model answers a few images alone as it does together, and in another order.

    A model that draws random numbers of its own cannot be asked; it gets a warning, because its records cannot be made
    again.
    """
    x, ids = images[:FEW], ids[:FEW].to(images.device)
    if len(x) < 2:
        return
    call, draw = keyed(model, seed, name), torch.zeros_like(ids)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        together, again = call(x, ids, draw), call(x, ids, draw)
        alone = torch.cat([call(x[i : i + 1], ids[i : i + 1], draw[:1]) for i in range(len(x))])
        turned = call(x.flip(0), ids.flip(0), draw).flip(0)
    if not _same(again, together):
        sentence = f"{name} answers the same images differently each time; its records cannot be repeated."
        warnings.warn(sentence, stacklevel=2)
        return
    if not (_same(alone, together) and _same(turned, together)):
        raise ValueError(
            f"{name} answers an image differently when others share its batch{_culprit(model)}; results would depend "
            "on the batch, so make it treat every image by itself."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to rounding; what is not a number is another check's matter."""
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= ROUNDING * torch.maximum(a.abs().max(), b.abs().max()))


def _culprit(model: nn.Module) -> str:
    """Names the first module that takes statistics over the batch."""
    for place, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            return f" ({place or type(module).__name__} normalises over the batch: track_running_stats=False)"
    return ""
