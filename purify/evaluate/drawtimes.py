"""What a certification will take: a few draws are timed, and the rest is arithmetic."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import pandas as pd
import torch

from purify.certify.sampling import Draws
from purify.checks import ran_out
from purify.evaluate.certification import CHECK_DRAWS, System, attacked
from purify.evaluate.dryrun import PATIENCE, duration, times
from purify.evaluate.runner import Samples


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
        made: noisy images in the certificate that was timed.
        draw: seconds for each.
        scales: noisy images for each draw, at most; 0: as many as were made, whatever is asked for.
    """

    made: int
    draw: float
    scales: int

    def draws(self, asked: Draws) -> int:
        """Noisy images of a certificate, at most."""
        return self.scales * (asked.n0 + asked.n) if self.scales else self.made

    def seconds(self, asked: Draws) -> float:
        """Of a certificate, at most."""
        return self.draw * self.draws(asked)


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
    """A certificate of the image at so many draws that they take long enough to be timed, or at all.

    The first one is not timed: a device warms up, a compiled network is compiled.
    """

    def certify(n: int) -> int:
        draws = replace(system.draws, n0=min(system.draws.n0, n), n=n, stop=None)
        return int(system.certifier.certify(one.images, draws, sample_ids=one.ids).draws[0])

    n = fewest(system)
    certify(n)
    while True:
        start = time.perf_counter()
        made = certify(n)
        spent = time.perf_counter() - start
        if spent > PATIENCE / 2 or n >= system.draws.n:
            break
        n = min(2 * n, system.draws.n)
    return Fit(made, spent / made, len(system.certifier.noisy_models()) if system.certifier.drawn else 0)


def fewest(system: System) -> int:
    """The first of 16, 32, ... draws that can bound anything: certifiers refuse fewer."""
    n = 16
    while n < system.draws.n:
        with suppress(ValueError):
            system.certifier.reachable(replace(system.draws, n=n, stop=None))
            return n
        n *= 2
    return system.draws.n


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
