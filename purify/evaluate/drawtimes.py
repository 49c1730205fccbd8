"""What a certification will take: a few draws are timed, and the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch

from purify.certify.sampling import Draws
from purify.checks import ran_out
from purify.evaluate.certification import CHECK_DRAWS, System, attacked
from purify.evaluate.dryrun import PATIENCE, duration, times
from purify.evaluate.runner import Samples
from purify.machine import seconds

FEWEST = 32  # draws that are timed first: certifiers refuse those of which nothing could be bounded


@dataclass(frozen=True)
class DrawCost:
    """What a system takes.

    Attributes:
        draws: noisy images classified for an image, at most.
        draw: seconds for each of them.
        image: seconds for the certificate of an image, at most.
        attack: seconds for the attacks inside the radius of an image, at most; 0 if there are none.
        seconds: of all certificates and attacks in one process, at most.
    """

    draws: int
    draw: float
    image: float
    attack: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What an image takes.

    Attributes:
        fixed: seconds for it, whatever is drawn.
        draw: seconds for each noisy image.
        scales: noisy images for each draw, at most; 0: as many as were made, whatever is asked for.
        made: in the greatest certificate that was timed.
    """

    fixed: float
    draw: float
    scales: int
    made: int

    def draws(self, asked: Draws) -> int:
        """Noisy images of a certificate, at most."""
        return self.scales * (asked.n0 + asked.n) if self.scales else self.made

    def seconds(self, asked: Draws) -> float:
        """Of a certificate, at most."""
        return self.fixed + self.draw * self.draws(asked)


def estimate(system: System, samples: Samples) -> DrawCost:
    """Time the certificate of the first image at growing numbers of draws, extend it to all, and add the attacks.

    Raises:
        ValueError: the system cannot take the image.
    """
    try:
        found = fitted(system, samples[torch.arange(1)])
        inside = attack_seconds(system, samples, found)
    except RuntimeError as error:
        advice = "lower --max-rows" if ran_out(error) else "check its networks"
        raise ValueError(f"{system.name} cannot be certified ({str(error).splitlines()[0]}); {advice}.") from error
    image = found.seconds(system.draws)
    total = image * len(samples) + inside * len(attacked(samples, system))
    return DrawCost(found.draws(system.draws), found.draw, image, inside, total)


def fitted(system: System, one: Samples) -> Fit:
    """Certificates of an image at growing numbers of draws, timed until they take too long."""
    known, n = [(0, 0.0)], min(FEWEST, system.draws.n)
    while True:
        draws = replace(system.draws, n0=min(system.draws.n0, n), n=n, stop=None)
        made = int(system.certifier.certify(one.images, draws, sample_ids=one.ids).draws[0])
        work = partial(system.certifier.certify, one.images, draws, sample_ids=one.ids)
        known.append((made, seconds(work, one.images.device)))
        if known[-1][1] > PATIENCE or n >= system.draws.n:
            break
        n = min(2 * n, system.draws.n)
    (before, t), (made, spent) = known[-2:]
    if made == before:  # an exact answer
        return Fit(spent, 0.0, 0, made)
    draw = max(spent - t, 0.0) / (made - before)
    return Fit(max(spent - draw * made, 0.0), draw, len(system.certifier.noisy_models()), made)


def attack_seconds(system: System, samples: Samples, found: Fit) -> float:
    """Of the attack on every noisy model inside the radius of an image, and of asking what it did."""
    if not system.attack.samples:
        return 0.0
    models = system.certifier.noisy_models().values()
    gradients = sum(times(m, samples, system.attack.eot)[1] for m in models) * system.attack.steps * system.attack.eot
    checks = found.seconds(replace(system.draws, n=min(system.draws.n, CHECK_DRAWS)))
    return gradients + checks * len(models)


def table(costs: Mapping[str, DrawCost]) -> pd.DataFrame:
    """Costs by system, for reading."""
    rows = {
        name: {
            "draws per image": c.draws,
            "ms per draw": f"{1000 * c.draw:.3g}",
            "per image": duration(c.image),
            "attacks per image": duration(c.attack) if c.attack else "none",
            "time": duration(c.seconds),
        }
        for name, c in costs.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
