"""One training loop for every network of ours: AdamW, warm-up and cosine decay, EMA, atomic checkpoints.

Everything random in step k is a function of (seed, k), so a resumed run ends where an undisturbed one does.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from purify.checks import check_count
from purify.diffusion.noise import derive_seed

# loss(module, images, labels, generator) -> scalar; all its randomness comes from the generator.
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of a run. ``ema`` is the decay of the averaged weights that are kept in the end."""

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 200
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_count(self.batch_size, "batch_size")


def learning_rate(step: int, hyper: Hyper) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to 0 at the last step."""
    warm = min(1.0, (step + 1) / max(hyper.warmup, 1))
    return hyper.lr * warm * 0.5 * (1 + math.cos(math.pi * step / hyper.steps))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """average <- d average + (1 - d) module, with d = min(decay, (1 + step) / (10 + step)) while it is young."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def batch(data: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch with replacement."""
    rows = torch.randint(len(data), (size,), generator=generator)
    return data[rows], labels[rows]


def train(
    module: nn.Module,
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    hyper: Hyper,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    save_every: int = 200,
) -> nn.Module:
    """Minimise ``loss`` and return the averaged module, in eval mode.

    Args:
        module: the network; trained in place.
        images, labels: training data, (N, C, H, W) in [0, 1] and (N,).
        checkpoint: where to save the state every ``save_every`` steps; if the file exists, training resumes from it.
        identity: plain data that tells this training from others, beside ``hyper``: network, loss, data.

    Raises:
        ValueError: the checkpoint belongs to another training, or is truncated; the loss is not finite.
    """
    identity = {"hyper": vars(hyper), **(identity or {})}
    optimizer = torch.optim.AdamW(module.parameters(), lr=hyper.lr, weight_decay=hyper.weight_decay)
    average = copy.deepcopy(module).eval().requires_grad_(False)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = _restore(checkpoint, identity, module, average, optimizer)
    bar = tqdm(range(start, hyper.steps), initial=start, total=hyper.steps, desc="training", mininterval=1.0)
    running = None
    for step in bar:
        generator = torch.Generator().manual_seed(derive_seed(hyper.seed, "train", step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, hyper)
        value = loss(module.train(), *batch(images, labels, hyper.batch_size, generator), generator)
        if not bool(value.isfinite()):
            raise ValueError(f"The loss is {value.item()} at step {step}; lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        update_ema(average, module, hyper.ema, step)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if checkpoint is not None and (step + 1) % save_every == 0:
            _save(checkpoint, identity, step + 1, module, average, optimizer)
    return average


def _save(
    path: Path,
    identity: dict[str, Any],
    step: int,
    module: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "identity": identity,
        "step": step,
        "module": module.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # atomic: a killed run leaves the old checkpoint


def _restore(
    path: Path, identity: dict[str, Any], module: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["identity"]
    except Exception as error:
        raise ValueError(f"{path} is not a readable training checkpoint; remove it to start over.") from error
    if stored != identity:
        different = ", ".join(k for k in identity if stored.get(k) != identity[k])
        raise ValueError(f"{path} belongs to another training ({different}); choose another --out or remove it.")
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
