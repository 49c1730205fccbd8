"""The networks and the images that everything is measured on, and how much of it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from gradient_fidelity import Setting
from torch import Tensor, nn

from purify.checkpoints.unet import unet
from purify.diffusion.schedule import Schedule
from purify.diffusion.score import ScoreModel
from purify.purification.gradients import BPDA, Checkpoint, Full, GradientEngine
from purify.purification.purifier import DEFAULT_ENGINE

T_STAR, GIB = 0.1, 2**30
ENGINES: dict[str, GradientEngine] = {
    "full": Full(),
    "checkpoint": Checkpoint(),
    "default (checkpoint, 1 GiB kept)": DEFAULT_ENGINE,
    "bpda (inexact, a yardstick)": BPDA(),
}
FLOAT32, BFLOAT16, COMPILED = "float32", "bf16", "bf16+compile"  # of the product
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        image, channels, layers: side of the images; channels of the U-Net's levels, and blocks in each.
        checked: images whose gradients are held against float64.
        rows: noisy images at once in certification.
        first, largest: batches between which the largest that fits is sought.
        patience: seconds that one gradient of that search may take.
        training: steps; in an untrained network bf16 turns the gradient further.
    """

    image: int = 32
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers: int = 2
    batch: int = 64
    steps: int = 20
    repeats: int = 3
    checked: int = 8
    rows: tuple[int, ...] = (1024, 8192)
    first: int = 32
    largest: int = 8192
    patience: float = 30.0
    training: int = 300


TOY = Size(8, (32, 64), 1, 4, 2, 1, 2, (16,), 2, 4, 30.0, 2)


def score_model(size: Size, schedule: Schedule) -> ScoreModel:
    """The U-Net of google/ddpm-cifar10-32, or a smaller one, with random weights; eps has deviation 1."""
    plain = ["DownBlock2D"] * len(size.channels)
    down = [plain[0], "AttnDownBlock2D", *plain[2:]]
    network = unet(
        sample_size=size.image,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).to_empty(device="cpu")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # As untrained networks come, eps is next to nothing, and the gradient that of a process without a network.
        u = torch.randn(4, 3, size.image, size.image)
        network.conv_out.weight /= network(u, torch.full((4,), 50.0)).sample.std()
    return ScoreModel(network.eval(), schedule, image_shape=(3, size.image, size.image))


class Bench:
    """The networks and images (N, 3, H, W) in [0, 1] with their labels (N,), on the device."""

    def __init__(
        self, size: Size, device: torch.device, classifier: nn.Module, model: ScoreModel, x: Tensor, y: Tensor
    ) -> None:
        self.size, self.device = size, device
        self.classifier, self.model = (part.eval().requires_grad_(False).to(device) for part in (classifier, model))
        self.x, self.y = x.to(device), y.to(device)
        self.models = {name: self.model.with_precision(name) for name in (FLOAT32, BFLOAT16, COMPILED)}

    def setting(self, variant: str = FLOAT32, batch: int | None = None, steps: int | None = None) -> Setting:
        """What is differentiated: a batch of so many images, the same ones again if there are too few."""
        rows = torch.arange(batch or self.size.batch, device=self.device) % self.size.batch
        x, y = self.x[rows], self.y[rows]
        return Setting(self.models[variant], self.classifier, x, y, T_STAR, steps or self.size.steps)

    def free(self) -> None:
        """Let go of what the last measurement left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def word(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
