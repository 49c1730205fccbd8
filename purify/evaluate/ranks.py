"""The processes of a run: one by itself, those that torchrun started, or independent ones that take a shard each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what there is only one of."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on all ranks."""
        found: list[Any] = [decide() if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, counted from 1, of a run that independent processes share out."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that an option says as ``3/16``."""
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        """Its folder within the run's."""
        return f"shard-{self.number}-of-{self.count}"


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """This process among torchrun's, if it was started by torchrun, and the device it works on.

    gloo on CPUs, nccl on GPUs, where rank i of a node takes GPU i. Waits for slower processes as long as it takes.

    Raises:
        ValueError: there are more processes on this node than GPUs; several nodes share a store that outlives restarts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks(), device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than this node's {torch.cuda.device_count()} GPUs.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _meet("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def _meet(backend: str) -> None:
    """Join the process group of this attempt.

    torchrun keeps one store over restarts, with the addresses of processes that are gone. On one node the number of the
    restart tells attempts apart; on several each node counts its own.
    """
    timeout = timedelta(days=30)  # ranks wait for the slowest
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise ValueError(
                "On several nodes processes that are restarted would not find each other; set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node."
            )
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def leave() -> None:
    """Close what :func:`join` opened."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
