"""Where randomness comes from: numbers that are a function of (seed, sample, draw, step), not of call order.

The generator is Philox4x32-10 (Salmon et al. 2011), evaluated for a whole batch in integer tensor arithmetic:
the key is the seed, the counter is (block, stream and step, draw, sample). A sample's noise is therefore the
same in any batch, order or shard, on any device, and can be made again in a backward pass without being stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from purify.checks import check_seed, choose, whole_numbers
from purify.transforms import readable

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
STREAM_BITS = 24  # the upper byte of the step word names the stream, the rest counts steps
STREAMS = {"purify": 0, "attack": 1, "score-norm": 2, "certify": 3, "train": 4, "guidance": 5, "time": 6, "classify": 7}


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a purpose: a hash of ``seed`` and the names, stable across machines and versions."""
    text = "/".join([str(check_seed(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits (in int64 tensors) for each broadcast counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64, but its upper and lower 32 bits survive. Lower halves are masked where they
        # are next used, in place, which saves memory and time.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (
            ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(MASK),
            ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(MASK),
        )
        c1, c3 = p1, p0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


@dataclass(frozen=True)
class Noise:
    """Keyed noise for a batch of N rows.

    Args:
        seed: any integer in [0, 2^63).
        sample_ids: int64 (N,), the identity of each row's image, in [0, 2^32).
        draws: int64 (N,), which purification of that image the row is, in [0, 2^32).
        stream_id: independent families of numbers (see ``stream``).
    """

    seed: int
    sample_ids: Tensor
    draws: Tensor
    stream_id: int = 0

    @classmethod
    def keyed(cls, seed: int, sample_ids: Tensor | Sequence[int], draw: int | Tensor = 0) -> Noise:
        """Noise for ``sample_ids`` (N,), with one ``draw`` for all rows or one per row."""
        ids = whole_numbers(sample_ids, "sample_ids")
        ids = ids.long() if ids.numel() == 0 else ids
        draws = whole_numbers(draw, "draw", ids.device)
        if ids.ndim != 1 or draws.shape not in (torch.Size(), ids.shape):
            raise ValueError(
                f"sample_ids must have shape (N,) and draw () or (N,), got {tuple(ids.shape)} and {tuple(draws.shape)}."
            )
        draws = draws.expand(ids.shape)
        for what, value in (("sample_ids", ids), ("draw", draws)):
            if value.is_floating_point() or value.dtype == torch.bool:
                raise ValueError(f"{what} must be whole numbers, got {value.dtype}.")
            if value.numel() and readable(value) and (int(value.min()) < 0 or int(value.max()) > MASK):
                raise ValueError(f"{what} must lie in [0, 2^32), got {int(value.min())} to {int(value.max())}.")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number in [0, 2^63), got {seed!r}.")
        return cls(seed, ids.long(), draws.long())

    @classmethod
    def fresh(cls, n: int, device: torch.device | str = "cpu") -> Noise:
        """Noise under a seed drawn once from torch's global generator, so ``torch.manual_seed`` governs it."""
        try:
            seed = int(torch.randint(2**63 - 1, ()))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ValueError("Inside torch.func.vmap noise must be keyed; pass sample_ids, draw and seed.") from error
        return cls.keyed(seed, torch.arange(n, device=device))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, rows: Tensor | slice) -> Noise:
        """The same noise for some of the rows."""
        return replace(self, sample_ids=self.sample_ids[rows], draws=self.draws[rows])

    def stream(self, name: str) -> Noise:
        """An independent family of numbers under the same keys: one of ``STREAMS``."""
        return replace(self, stream_id=choose(name, STREAMS, "stream of noise"))

    def _words(self, step: int | Tensor, count: int) -> Tensor:
        """Words (N, 4, count) for ``step`` (one for all rows, or (N,))."""
        device = self.sample_ids.device
        # A number copied to the device would make the host wait for it; a tensor filled there does not.
        if isinstance(step, Tensor):
            steps = step.to(device, torch.int64)
        else:
            steps = torch.full((), step, dtype=torch.int64, device=device)
        steps = steps.expand(len(self))
        counter = (
            torch.arange(count, device=device)[None],
            (steps | (self.stream_id << STREAM_BITS))[:, None],
            self.draws[:, None],
            self.sample_ids[:, None],
        )
        return torch.stack(torch.broadcast_tensors(*philox(counter, (self.seed & MASK, self.seed >> 32))), 1)

    def uniform(self, step: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in (0, 1) (1 may be reached by rounding below float64), shape (N, *shape).

        ``step``: an int, or int64 (N,) with one per row.
        """
        size = math.prod(shape)
        u = self._words(step, -(-size // 4)).flatten(1)[:, :size].double().add_(0.5).mul_(2.0**-32)
        return u.to(dtype).reshape(len(self), *shape)

    def normal(self, step: int | Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, shape (N, *shape), by Box-Muller in float64 and then rounded to ``dtype``.

        The float32 and the float64 run of a purifier thus see the same noise up to rounding.
        """
        size = math.prod(shape)
        u = self._words(step, -(-size // 4)).double().add_(0.5).mul_(2.0**-32)
        radius = u[:, :2].log().mul_(-2).sqrt_()
        angle = u[:, 2:].mul_(2 * math.pi)
        z = torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], 1).flatten(1)[:, :size]
        return z.to(dtype).reshape(len(self), *shape)
