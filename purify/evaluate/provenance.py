"""What a run says about itself: versions, revision, device, data, and a folder of its own."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import purify
from purify.diffusion.precision import rounds_to_tf32
from purify.evaluate.ranks import Ranks
from purify.evaluate.runner import Samples


def environment(device: torch.device, command: str, ranks: Ranks) -> dict[str, Any]:
    """Versions, revision, device and command, for the manifest."""
    names = ["torch", "torchvision", "numpy", "scipy", "scikit-learn", "torchdiffeq", "diffusers", "torchattacks"]
    names += ["statsmodels", "robustbench", "pyautoattack", "autoattack"]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "purify": purify.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        **({"convolutions": "TF32"} if rounds_to_tf32(device) else {}),
        "threads": torch.get_num_threads(),
        "processes": ranks.world,
    }


def git_revision() -> str | None:
    """Revision of the checkout that runs, with ``+`` if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changed else "")


def fingerprint_of_samples(samples: Samples) -> str:
    """sha256 over images and labels."""
    digest = hashlib.sha256(samples.images.cpu().numpy().tobytes())
    digest.update(samples.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def default_folder(name: str, config: dict[str, Any]) -> Path:
    """A folder below runs/ that only this configuration has."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{name}-{digest}"
