"""Public score networks by name: where they live and what they must hash to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from purify.checkpoints.diffusers import weights_file
from purify.checks import choose
from purify.weights.downloads import cache_folder, checked, download


@dataclass(frozen=True)
class Public:
    """A published file.

    Attributes:
        file: its name.
        url: direct address.
        page: where a person finds it.
        about: what it is.
        sha256: of the file, where it is known; otherwise the first download is trusted.
    """

    file: str
    url: str
    page: str
    about: str
    sha256: str | None = None


_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion"
PUBLIC = {
    "score-sde-cifar10": Public(
        "checkpoint_8.pth",
        "https://drive.usercontent.google.com/download?id=16_-Ahc6ImZV5ClUc0vM5Iivf8OJ1VSif&export=download&confirm=t",
        "https://github.com/yang-song/score_sde_pytorch (vp/cifar10_ddpmpp_deep_continuous)",
        "score_sde, CIFAR-10, VP DDPM++ (deep, continuous): DiffPure's network for CIFAR-10",
    ),
    "guided-imagenet256": Public(
        "256x256_diffusion_uncond.pt",
        f"{_OPENAI}/jul-2021/256x256_diffusion_uncond.pt",
        "https://github.com/openai/guided-diffusion",
        "guided-diffusion, ImageNet 256x256 unconditional: DiffPure's network for ImageNet",
        # As stated by several independent users of the file; OpenAI states none.
        "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1",
    ),
    "improved-cifar10": Public(
        "cifar10_uncond_50M_500K.pt",
        f"{_OPENAI}/march-2021/cifar10_uncond_50M_500K.pt",
        "https://github.com/openai/improved-diffusion",
        "improved-diffusion, CIFAR-10 unconditional, 4000 cosine steps (L_hybrid)",
    ),
}
HUB_FILE = re.compile(r"((unet|scheduler)/)?(config|scheduler_config|diffusion_pytorch_model)\.(json|bin|safetensors)")


def is_hub_name(name: str) -> bool:
    """Whether ``name`` reads as OWNER/REPOSITORY."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def path_of(name: str) -> Path:
    """Where a public network is kept: a file, or the folder of a Hub repository."""
    if is_hub_name(name):
        return cache_folder() / "hub" / name.replace("/", "--")
    return cache_folder() / name / choose(name, PUBLIC, "public score network").file


def find(name: str) -> Path:
    """The file or folder of a public network; the network is never asked.

    Raises:
        ValueError: it is not here; the message says what to fetch and where to put it. Or its sha256 is wrong.
    """
    path = path_of(name)
    if is_hub_name(name):
        if weights_file(path / "unet") or weights_file(path):  # fetched last
            return path
        raise ValueError(
            f"{name} is not here, as a path or a download; run `purify download {name}`, or put its folder "
            f"(config.json, scheduler_config.json, diffusion_pytorch_model.*) at {path}."
        )
    entry = PUBLIC[name]
    if not checked(path, entry.sha256):
        raise ValueError(
            f"{name} is not here; run `purify download {name}`, or fetch {entry.file} from {entry.page} "
            f"and put it at {path}."
        )
    return path


def fetch(name: str, progress: bool = True) -> Path:
    """Download a public network by name, or a diffusers repository by OWNER/REPOSITORY, unless it is here.

    Raises:
        ValueError, OSError: as :func:`purify.weights.downloads.download`; unknown name.
    """
    path = path_of(name)
    if is_hub_name(name):
        for file, url, sha256 in _hub_listing(name):
            download(url, path / file, sha256, progress=progress)
    else:
        download(PUBLIC[name].url, path, PUBLIC[name].sha256, progress=progress)
    return path


def _hub_listing(name: str) -> list[tuple[str, str, str | None]]:
    """Files of a repository that a score network needs: name, address, sha256 if the Hub states it; weights last."""
    from huggingface_hub import HfApi, hf_hub_url

    try:
        info = HfApi().model_info(name, files_metadata=True)
    except Exception as error:
        raise OSError(f"The Hub could not list {name} ({error}); is it spelt right, and is there a network?") from error
    files = {s.rfilename: s.lfs for s in info.siblings or [] if HUB_FILE.fullmatch(s.rfilename)}
    files = {f: lfs for f, lfs in files.items() if not (f.endswith(".bin") and f"{f[:-4]}.safetensors" in files)}
    if not any("diffusion_pytorch_model" in f for f in files):
        raise ValueError(f"{name} holds no diffusers U-Net.")
    listed = [
        (f, hf_hub_url(name, f, revision=info.sha), None if lfs is None else lfs.sha256) for f, lfs in files.items()
    ]
    return sorted(listed, key=lambda entry: "diffusion_pytorch_model" in entry[0])
