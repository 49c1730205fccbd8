#!/usr/bin/env python3
"""How many network calls anytime sampling takes to settle a grid of radii, against all n draws, and what it loses.

Both certify the same images by the same code on the same votes: the noisy images of every draw that could be asked for
are classified once (and kept in --votes), and a certificate that asks for a draw gets its vote. Calls are those the
certificates would have made. Beside them stands the other way to look often, exact bounds at alpha over the number of
looks, under the same rule for giving a radius up (not for a cascade, which several sigmas make).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor
from tqdm import tqdm

from purify import zoo
from purify.certify import Anytime, Cascade, Certificate, Draws, Smooth, denoised_smoothing
from purify.certify.bounds import lower_bound, upper_bound
from purify.certify.counts import ROWS
from purify.certify.sampling import FUTILE
from purify.checks import check_count, choose
from purify.data import DATASETS, load_dataset
from purify.diffusion.noise import Noise, derive_seed
from purify.machine import set_threads
from purify.options import NUMBERS

# Grids in units of sigma, coarse and fine, each up to radii that take more and more draws.
COARSE, FINE = (0, 1, 2), (0, 0.5, 1, 1.5, 2)
GRIDS = (COARSE, FINE, (*COARSE, 2.5), (*FINE, 2.5), (*COARSE, 3), (*FINE, 2.5, 3))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="benchmarks/certify_draws.py", description=__doc__)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument(
        "--sigma", type=NUMBERS.convert, default=[0.25], help="one, or the scales of a cascade (default: 0.25)"
    )
    p.add_argument("--samples", type=int, default=128, help="images, the first ones (default: 128)")
    p.add_argument("--draws", type=int, default=10_000, help="n (default: 10000); n0 is 100")
    p.add_argument("--alpha", type=float, default=0.001)
    p.add_argument("--radii", type=NUMBERS.convert, help="a grid (default: several, up to 3 of the least sigma)")
    p.add_argument("--votes", type=Path, help=".npy that keeps the votes, or has them (scales, images, draws)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    return p


@torch.no_grad()
def cast(smooth: Smooth, images: Tensor, draws: int, seed: int = 0) -> np.ndarray:
    """The class of every draw of every image, uint8 (N, draws): the votes that certificates of this seed count."""
    noise, size = Noise.keyed(derive_seed(seed, "certify", smooth.stream), range(len(images))), ROWS["cpu"]
    votes = np.zeros((len(images), draws), np.uint8)
    for i in tqdm(range(len(images)), unit="image", disable=not sys.stderr.isatty()):
        for start in range(0, draws, size):
            draw = torch.arange(start, min(start + size, draws))
            keyed = Noise(noise.seed, noise.sample_ids[i].expand(len(draw)), draw, noise.stream_id)
            noisy = smooth.perturb(images[i : i + 1].expand(len(draw), -1, -1, -1), keyed)
            votes[i, start : start + size] = smooth.classifier(noisy).argmax(1).numpy()
    return votes


@dataclass(frozen=True)
class Replay(Smooth):
    """The smoothed classifier whose votes are known."""

    votes: np.ndarray

    @property
    def counts(self) -> Callable[[Tensor, Noise, range], Tensor]:  # type: ignore[override]
        def count(images: Tensor, noise: Noise, draws: range) -> Tensor:
            asked = self.votes[noise.sample_ids.numpy(), draws.start : draws.stop]
            return torch.from_numpy((asked[:, :, None] == np.arange(10)).sum(1))

        return count


def in_looks(hits: np.ndarray, radii: Sequence[float], draws: Draws, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest radius and the draws of each image, by exact bounds at alpha over the number of looks, of which each
    has twice the draws of the one before; ``hits`` (N, n) counts those among the first draws."""
    looks = [draws.n >> k for k in reversed(range(10))]
    level, bounds = draws.alpha / len(looks), norm.cdf(np.array(radii) / sigma)
    share = np.array([np.argmax(lower_bound(np.arange(draws.n + 1), draws.n, level) >= b) for b in bounds]) / draws.n
    best, spent, alive = np.zeros(len(hits)), np.zeros(len(hits), int), np.ones(len(hits), bool)
    for made in looks:
        spent[alive] = made
        high = upper_bound(hits[:, made - 1], made, FUTILE)
        best[alive] = np.maximum(best, lower_bound(hits[:, made - 1], made, level))[alive]
        alive &= ((best[:, None] < bounds) & (high[:, None] >= share)).any(1)
    return np.where(best >= 0.5, sigma * norm.ppf(best), -1.0), spent


def compare(
    votes: np.ndarray, labels: np.ndarray, radii: Sequence[float], draws: Draws, sigmas: Sequence[float]
) -> dict[str, str]:
    """A row of the table: calls of each way, and what the curve loses; ``votes`` (scales, N, draws)."""
    images = torch.zeros(votes.shape[1], 1, 1, 1)
    scales = tuple(Replay(torch.nn.Identity().eval(), s, votes=v) for s, v in zip(sigmas, votes, strict=True))
    system = scales[0] if len(scales) == 1 else Cascade(scales)
    full = system.certify(images, draws)
    found = system.certify(images, Draws(draws.n0, draws.n, draws.alpha, Anytime(tuple(radii))))
    calls, all_calls = found.draws.double().mean().item(), full.draws.double().mean().item()
    before, after = right(full, labels), right(found, labels)
    lost = max(np.mean(before >= r) - np.mean(after >= r) for r in radii)
    row = {
        "radii": ", ".join(f"{r:g}" for r in radii),
        "calls": f"{calls:.0f}",
        "of fixed n": f"{calls / all_calls:.3f}",
        "curve lower by at most": f"{100 * lost:.1f}",
    }
    return row if len(scales) > 1 else row | looks(votes[0], labels, radii, draws, sigmas[0], full, found)


def looks(
    votes: np.ndarray,
    labels: np.ndarray,
    radii: Sequence[float],
    draws: Draws,
    sigma: float,
    full: Certificate,
    found: Certificate,
) -> dict[str, str]:
    """What the curve loses where fixed n decides with room, and the same by exact bounds in a number of looks."""
    chosen = found.selected.numpy()
    hits = (votes[:, draws.n0 :] == chosen[:, None]).cumsum(1)
    union, spent = in_looks(hits, radii, draws, sigma)
    own = (found.draws - found.counts.sum(1)).numpy()  # those that chose the class
    lost = max(np.mean(right(full, labels) >= r) - np.mean((chosen == labels) & (union >= r)) for r in radii)
    return {
        "with room": f"{100 * with_room(full, found, labels, radii, draws, sigma):.1f}",
        "in looks": f"{(spent + own).mean():.0f}",
        "in looks, lower by": f"{100 * lost:.1f}",
    }


def right(found: Certificate, labels: np.ndarray) -> np.ndarray:
    """The radius of each image that is answered right, else -1."""
    return np.where(found.classes.numpy() == labels, found.radii.numpy(), -1.0)


def with_room(
    full: Certificate, found: Certificate, labels: np.ndarray, radii: Sequence[float], draws: Draws, sigma: float
) -> float:
    """By how much certified accuracy falls at most, over the radii, where fixed n decides with room: by a bound at
    least one standard error above the one needed."""
    before, after = right(full, labels), right(found, labels)
    bounds = norm.cdf(np.array(radii) / sigma)
    room = sigma * norm.ppf(np.minimum(bounds + np.sqrt(bounds * (1 - bounds) / draws.n), 1))
    return float(max(np.mean((before >= far) & (after < r)) for r, far in zip(radii, room, strict=True)))


def unanimous(draws: Draws) -> pd.DataFrame:
    """Calls of an image on which all draws agree, by the largest radius asked for."""
    votes = np.zeros((1, draws.n0 + draws.n), np.uint8)
    rows = {}
    for radius in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        try:
            stop = Anytime((radius,))
            replay = Replay(torch.nn.Identity().eval(), 1.0, votes=votes)
            found = replay.certify(torch.zeros(1, 1, 1, 1), Draws(draws.n0, draws.n, draws.alpha, stop))
        except ValueError:
            continue
        least = int(np.ceil(np.log(draws.alpha) / norm.logcdf(radius)))  # with as many draws as it takes, one look
        rows[f"{radius:g} sigma"] = {"calls": int(found.draws[0]), "least n, one look": least}
    return pd.DataFrame.from_dict(rows, orient="index")


def measure(args: argparse.Namespace) -> pd.DataFrame:
    """The table of all grids."""
    choose(args.dataset, {k: v for k, v in DATASETS.items() if k in zoo.names("score")}, "embedded data set")
    check_count(args.samples, "samples")
    set_threads(args.threads)
    draws = Draws(100, args.draws, args.alpha)
    score, classifier = zoo.score_model(args.dataset), zoo.classifier(f"{args.dataset}-standard")
    scales = [denoised_smoothing(classifier, score, s) for s in args.sigma]
    images, labels = (t[: args.samples] for t in load_dataset(args.dataset, "test"))
    grids = [args.radii] if args.radii else [[step * min(args.sigma) for step in steps] for steps in GRIDS]
    if args.votes is not None and args.votes.exists():
        votes = np.load(args.votes, allow_pickle=False)[:, : args.samples]
    else:
        votes = np.stack([cast(smooth, images, draws.n0 + draws.n) for smooth in scales])
        if args.votes is not None:
            np.save(args.votes, votes)
    if votes.shape != (len(scales), len(images), draws.n0 + draws.n):
        raise ValueError(f"{args.votes} holds votes of shape {votes.shape}, not of {len(images)} images; remove it.")
    return pd.DataFrame([compare(votes, labels.numpy(), g, draws, args.sigma) for g in grids])


def main(argv: list[str] | None = None) -> int:
    """Measure and print; bad input is one line on stderr and status 2."""
    args = parser().parse_args(argv)
    try:
        found = measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sigmas = ", ".join(f"{s:g}" for s in args.sigma)
    print(f"{args.dataset}, sigma {sigmas}, {args.samples} images, n {args.draws}, alpha {args.alpha:g}")
    print(found.to_string(index=False))
    if len(args.sigma) > 1:
        return 0
    print(f"\nAn image on which all draws agree:\n{unanimous(Draws(100, args.draws, args.alpha)).to_string()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
