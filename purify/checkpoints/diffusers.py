"""Folders of diffusers: a ``UNet2DModel`` and its scheduler, as a pipeline or side by side in one folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purify.checkpoints.layout import Layout, consistency
from purify.checkpoints.unet import unet
from purify.checks import choose
from purify.diffusion.schedule import DiscreteVP
from purify.weights.files import read

# Attention tensors in files older than diffusers 0.17.
LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


TELL = "say which it is told, as load_score_model(..., classes='unconditional') or a class"


def _linear(steps: int, start: float, end: float) -> DiscreteVP:
    return DiscreteVP.linear(steps, start, end)


def _scaled_linear(steps: int, start: float, end: float) -> DiscreteVP:
    return DiscreteVP(np.linspace(start**0.5, end**0.5, steps) ** 2)


def _cosine(steps: int, start: float, end: float) -> DiscreteVP:
    return DiscreteVP.cosine(steps)


SCHEDULES: dict[str, Callable[[int, float, float], DiscreteVP]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


def read_folder(folder: Path, with_schedule: bool = True, with_classes: bool = False) -> Layout:
    """The U-Net in ``folder`` and, unless told otherwise, the schedule and prediction that its scheduler says.

    ``with_classes``: whether it is known what a class-conditional one is told.

    Beside the scheduler of consistency models it is one, driven in the times of the continuous VP-SDE.

    Raises:
        ValueError: files missing; another class of network; a scheduler that is not variance-preserving.
    """
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _json(unet_folder / "config.json")
    _check_class(config, unet_folder, with_classes)
    try:
        network = unet(**config)
    except Exception as error:  # diffusers checks its arguments as it uses them
        raise ValueError(f"{unet_folder}/config.json describes no UNet2DModel ({error}).") from error
    file = weights_file(unet_folder)
    if file is None:
        raise ValueError(f"{unet_folder} holds neither {' nor '.join(WEIGHTS)}.")
    weights = {_modern(key): w for key, w in read(file).items()}
    size = config.get("sample_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = None if size is None else (network.config.in_channels, height, width)
    settings: dict[str, Any] = {"image_shape": shape}
    scheduler = _json(_scheduler_file(folder)) if with_schedule else {}
    if scheduler.get("_class_name") == "CMStochasticIterativeScheduler":
        ends = {name: scheduler[name] for name in ("sigma_min", "sigma_data") if name in scheduler}
        return consistency(network, weights, settings, **ends)
    if with_schedule:
        learned = network.config.out_channels == 2 * network.config.in_channels
        settings |= _scheduled(_scheduler_file(folder), learned)
    return Layout(network, weights, settings)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is its folder one that diffusers saved?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no configuration.")
    return content


def _check_class(config: Mapping[str, Any], folder: Path, with_classes: bool) -> None:
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"{folder} holds a {kind}; purification needs an unconditional UNet2DModel in pixel space.")
    if config.get("class_embed_type"):
        kind = config["class_embed_type"]
        raise ValueError(f"{folder} is conditional on embeddings ({kind}), not on a table of classes.")
    if config.get("num_class_embeds") and not with_classes:
        raise ValueError(f"{folder} is conditional on {config['num_class_embeds']} classes; {TELL}.")


def weights_file(folder: Path) -> Path | None:
    """The weights in a U-Net's folder."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _modern(key: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{LEGACY.get(m[2], m[2])}.", key)


def _scheduler_file(folder: Path) -> Path:
    for path in (folder / "scheduler", folder, folder.parent / "scheduler"):
        if (path / "scheduler_config.json").is_file():
            return path / "scheduler_config.json"
    raise ValueError(
        f"{folder} holds no scheduler_config.json; tell the schedule and the prediction: "
        "load_score_model(folder, schedule=..., prediction=...)."
    )


def _scheduled(path: Path, learned_variance: bool) -> dict[str, Any]:
    """Schedule and prediction; time k/N has label k - 1, as everywhere in diffusers."""
    config = _json(path)
    prediction = choose(config.get("prediction_type", "epsilon"), PREDICTIONS, f"prediction in {path}")
    if learned_variance:
        if prediction != "eps":
            raise ValueError(f"{path} predicts {config['prediction_type']} and a variance; only epsilon is supported.")
        prediction = "learned_variance"
    steps = config.get("num_train_timesteps", config.get("timesteps"))  # its name in the first files
    betas = config.get("trained_betas")
    if steps is None or (betas is None and "beta_schedule" not in config):
        raise ValueError(f"{path} ({config.get('_class_name')}) is not a variance-preserving schedule of betas.")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{path} rescales betas to zero signal, where no image can be recovered; pass schedule=....")
    if betas is not None:
        return {"schedule": DiscreteVP(betas), "prediction": prediction}
    build = choose(config["beta_schedule"], SCHEDULES, f"beta schedule in {path}")
    ends = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    return {"schedule": build(int(steps), *ends), "prediction": prediction}
