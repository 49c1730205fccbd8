"""What every certificate takes and returns, and CERTIFY and PREDICT of Cohen et al. 2019 for any noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from purify.certify.bounds import CAPITAL
from purify.certify.counts import NoisyCounts, NoisyModel, Perturbation, check_classifier, keys
from purify.certify.sampling import Draws, Goals, as_draws, check_alpha, clear
from purify.checks import check_count
from purify.diffusion.noise import Noise, derive_seed

ABSTAIN = -1

# Rows of images, their counts (rows, K) and the number of the look -> which of them need more draws.
Stay = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Certificate:
    """Answers for N images, with the radii within which they provably hold. All on the CPU.

    Attributes:
        classes: int64 (N,); ABSTAIN (-1) where nothing can be said.
        radii: float64 (N,), in units of images in [0, 1]; 0 where it abstains.
        counts: int64 (N, K), the class counts behind the answer.
        draws: int64 (N,), noisy images classified for it in all.
        selected: int64 (N,), the class whose probability was bounded (at the stage that decided).
        hits: int64 (N, looks), how often it had been hit at each look, -1 where none was taken; None if there was only
            one look, at all counts.
        stages: int64 (N,), the place of the scale that decided, from the largest (cascades); None otherwise.
        passed: of each image, class and counts of the scales passed before (cascades); None otherwise.
    """

    classes: Tensor
    radii: Tensor
    counts: Tensor
    draws: Tensor
    selected: Tensor
    hits: Tensor | None = None
    stages: Tensor | None = None
    passed: list[list[tuple[int, list[int]]]] | None = None


class Certifier(ABC):
    """A smoothed classifier with a certificate.

    Attributes:
        norm: the norm of its radii.
        drawn: whether the answer depends on draws; else on all that there are.
    """

    norm: ClassVar[str]
    drawn: ClassVar[bool] = True

    @abstractmethod
    def certify(
        self, images: Tensor, draws: Draws | None = None, *, sample_ids: Tensor | None = None, seed: int = 0
    ) -> Certificate:
        """Certificates of images (N, C, H, W) in [0, 1]; ``sample_ids`` (N,) and ``seed`` key the noise."""

    def recompute(self, found: Certificate, draws: Draws) -> Certificate:
        """The certificates that the draws behind ``found`` give at another ``draws.alpha``; nothing is drawn.

        The same as drawing again with this alpha, where all draws are made; valid in any case.

        Args:
            found: what this certifier gave.
            draws: those it was given, with another alpha.

        Raises:
            ValueError: it would take draws that were not made.
        """
        raise ValueError(f"{type(self).__name__} keeps nothing from which radii could be recomputed; certify again.")

    def reachable(self, draws: Draws) -> float:
        """The largest radius that any image can get with these draws: that of one on which all of them agree.

        Infinite where a certifier does not say.

        Raises:
            ValueError: none can get any, so that nothing need be drawn; says how many draws it takes.
        """
        return math.inf

    @abstractmethod
    def noisy_models(self) -> dict[str, NoisyModel]:
        """What an attack on the answer differentiates, by name."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain data that describes it apart from its networks."""

    def covered(self, perturbed: Tensor, image: Tensor, radius: float) -> Tensor:
        """An image (1, C, H, W) near ``perturbed``, within ``radius`` of ``image``, of which the certificate speaks."""
        return perturbed


def check_reached(best: float, least: float, draws: Draws, level: float) -> float:
    """``best``, the lower bound of a probability if all draws hit.

    Raises:
        ValueError: it is below ``least``, without which there is no certificate.
    """
    if best < least:
        needed = math.ceil(math.log(level) / math.log(least))
        raise ValueError(
            f"{draws.n} draws at alpha {draws.alpha:g} bound a probability by at most {best:.3g}, and a certificate "
            f"needs {least:g}: every image would abstain; make at least {needed} draws."
        )
    return best


def check_asked(radius: float, draws: Draws, under: str) -> float:
    """``radius``, the largest that draws certify ``under`` a noise.

    Raises:
        ValueError: it is smaller than all that anytime sampling is asked for.
    """
    if draws.stop is not None and draws.stop.radii[0] > radius:
        asked = ", ".join(f"{r:g}" for r in draws.stop.radii)
        raise ValueError(
            f"{draws.n} draws at alpha {draws.alpha:g} certify at most {radius:.4g} under {under}, and {asked} asked "
            "for; name a smaller radius, or make more draws."
        )
    return radius


@dataclass(frozen=True)
class RandomizedSmoothing(Certifier):
    """A smoothed classifier whose answer holds while its probability stays above 1/2.

    Subclasses say what the noise is and what radius a probability gives.

    Args:
        classifier: noisy images to logits, in eval mode.
        max_rows: noisy images in the classifier at once; see :class:`~purify.certify.counts.NoisyCounts`.
    """

    classifier: nn.Module
    max_rows: int | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def perturb(self) -> Perturbation:
        """The noise."""

    @abstractmethod
    def radius(self, probability: np.ndarray) -> np.ndarray:
        """Radius for a lower bound of the answer's probability; negative below 1/2."""

    @abstractmethod
    def probability(self, radius: float) -> float:
        """The bound that certifies ``radius``: inverse of :meth:`radius`."""

    @property
    @abstractmethod
    def stream(self) -> str:
        """Names the noise: other names give independent draws under the same seed."""

    def __post_init__(self) -> None:
        check_classifier(self.classifier, self.max_rows)

    @property
    def counts(self) -> NoisyCounts:
        """The function that the certificate sees."""
        return NoisyCounts(self.classifier, self.perturb, self.max_rows)

    def certify(
        self,
        images: Tensor,
        draws: Draws | None = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Certificate:
        """CERTIFY (Cohen et al. 2019): n0 draws choose the class, n fresh draws bound its probability p from below.

        Answers with the class and the radius of p, or abstains if p < 1/2. Each certificate is false with probability
        at most alpha.

        Args:
            images: (N, C, H, W) in [0, 1].
            draws: budget and level, see :class:`Draws`.
            sample_ids: (N,), key the noise together with ``seed``; default 0..N-1.

        Raises:
            ValueError: images or ids out of range, NaN from the classifier, radii asked for that no number of hits can
                certify.
        """
        draws = as_draws(draws)
        noise = keys(images, sample_ids, derive_seed(seed, "certify", self.stream))
        self.reachable(draws)
        votes = self.count_until(images, noise, 0, draws.selections, lambda rows, counts, look: ~clear(counts)).cpu()
        selected, hits = votes.argmax(1), np.full((len(images), len(draws.looks)), -1)
        chosen, goals = selected.numpy(), Goals(draws, self.probability, len(images))

        def unsettled(rows: np.ndarray, counts: np.ndarray, look: int) -> np.ndarray:
            hits[rows, look] = counts[np.arange(len(rows)), chosen[rows]]
            return goals.open(rows, hits[rows, look], draws.looks[look])

        counts = self.count_until(images, noise, draws.n0, draws.looks, unsettled).cpu()
        classes, radii = self._answer(selected, hits, draws)
        looked = None if draws.stop is None else torch.from_numpy(hits)
        return Certificate(classes, radii, counts, votes.sum(1) + counts.sum(1), selected, looked)

    def recompute(self, found: Certificate, draws: Draws) -> Certificate:
        self.reachable(draws)
        hits = found.counts.gather(1, found.selected[:, None]) if found.hits is None else found.hits
        classes, radii = self._answer(found.selected, hits.numpy(), draws)
        return replace(found, classes=classes, radii=radii)

    def count_until(self, images: Tensor, noise: Noise, first: int, looks: Sequence[int], stay: Stay) -> Tensor:
        """int64 (N, K) on the images' device: class counts over draws from ``first`` on, the last ``looks`` of them at
        most. At each look (after so many draws) images leave that need not ``stay``."""
        counts: Tensor | None = None
        alive, done = torch.arange(len(images), device=images.device), 0
        for look, end in enumerate(looks):
            found = self.counts(images[alive], noise[alive], range(first + done, first + end))
            counts, done = found if counts is None else counts.index_add(0, alive, found), end
            rows = alive.cpu().numpy()
            alive = alive[torch.from_numpy(stay(rows, counts[alive].cpu().numpy(), look)).to(alive.device)]
            if len(alive) == 0:
                break
        assert counts is not None  # there is a first look
        return counts

    def _answer(self, selected: Tensor, hits: np.ndarray, draws: Draws) -> tuple[Tensor, Tensor]:
        """Classes and radii from the hits at each look (N, looks): those of the best bound."""
        bounds = np.where(hits >= 0, draws.bound(np.maximum(hits, 0), np.array(draws.looks)), 0.0)
        lower = bounds.max(1)
        answered = lower >= 0.5
        radii = np.where(answered, self.radius(lower), 0.0)
        return torch.where(torch.from_numpy(answered), selected, ABSTAIN), torch.from_numpy(radii)

    def reachable(self, draws: Draws) -> float:
        level = draws.alpha * (1.0 if draws.stop is None else float(CAPITAL[0]))
        best = check_reached(float(draws.bound(np.array(draws.n), draws.n)), 0.5, draws, level)
        return check_asked(float(self.radius(np.array(best))), draws, f"this noise ({self.stream})")

    def predict(
        self,
        images: Tensor,
        n: int = 1000,
        alpha: float = 0.001,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """PREDICT (Cohen et al. 2019): the commonest class over n draws, int64 (N,), ABSTAIN where that is unsure.

        An answer differs from the smoothed classifier's with probability at most alpha.
        """
        check_count(n, "n")
        check_alpha(alpha)
        noise = keys(images, sample_ids, derive_seed(seed, "predict", self.stream))
        return torch.tensor([predicted(c, alpha) for c in self.counts(images, noise, range(n)).cpu().numpy()])

    def noisy_models(self) -> dict[str, NoisyModel]:
        return {self.stream: NoisyModel(self.classifier, self.perturb)}


def predicted(counts: np.ndarray, alpha: float) -> int:
    """PREDICT from class counts (K,): abstain unless a two-sided binomial test tells the two commonest apart."""
    first, second = np.argsort(-counts, kind="stable")[:2]
    pvalue = stats.binomtest(int(counts[first]), int(counts[first] + counts[second]), 0.5).pvalue
    return int(first) if pvalue <= alpha else ABSTAIN
