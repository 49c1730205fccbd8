"""What every certificate takes and returns, and CERTIFY and PREDICT of Cohen et al. 2019 for any noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from purify.certify.bounds import lower_bound
from purify.certify.counts import NoisyCounts, NoisyModel, Perturbation, check_classifier, keys
from purify.checks import check_count, is_number, short
from purify.diffusion.noise import derive_seed

ABSTAIN = -1


@dataclass(frozen=True)
class EarlyStop:
    """Stop drawing for an image once it is settled whether ``radius`` can be certified.

    The bound is looked at ``looks`` times, after n / 2^(looks-1), ..., n/2 and n draws, each time at level
    alpha / looks, so that all looks together fail with probability at most alpha (union bound). An image leaves when
    its bound certifies ``radius``, or when it would not even if every draw to come hit the class. The radius that
    is returned is that of its last look: true, but smaller than all draws would have given.

    Args:
        radius: what is asked for, in the certificate's norm; 0: whether there is an answer at all.
        looks: how often the bound is looked at.
    """

    radius: float = 0.0
    looks: int = 4

    def __post_init__(self) -> None:
        check_count(self.looks, "looks")
        if not (is_number(self.radius) and self.radius >= 0):
            raise ValueError(f"The radius asked for must be a number of at least 0, got {self.radius}.")


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha`` is a probability of failure below 1/2."""
    if not (is_number(alpha) and 0 < alpha < 0.5):
        raise ValueError(f"alpha must lie in (0, 0.5), got {short(alpha)}.")


@dataclass(frozen=True)
class Draws:
    """How much is drawn, and the probability of failure.

    Args:
        n0: draws that choose the class.
        n: fresh draws that bound its probability.
        alpha: a certificate is false with probability at most alpha. Bounds are one-sided.
        stop: early stopping; None: all n draws are made.
    """

    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    stop: EarlyStop | None = None

    def __post_init__(self) -> None:
        check_count(self.n0, "n0")
        check_count(self.n, "n")
        check_alpha(self.alpha)
        if not isinstance(self.stop, EarlyStop | None):
            raise ValueError(f"stop must be a purify.certify.EarlyStop(radius) or None, got {short(self.stop)}.")
        if self.stop is not None and self.n < 2 ** (self.stop.looks - 1):
            raise ValueError(f"{self.stop.looks} looks need at least {2 ** (self.stop.looks - 1)} draws, got {self.n}.")

    @property
    def looks(self) -> list[int]:
        """Draws after which the bound is looked at, ascending."""
        return [self.n] if self.stop is None else [self.n >> k for k in reversed(range(self.stop.looks))]


def as_draws(draws: Draws | None) -> Draws:
    """The draws asked for, or the default ones.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(draws, Draws | None):
        raise ValueError(f"draws must be a purify.certify.Draws, as Draws(n0=100, n=10_000), got {short(draws)}.")
    return draws or Draws()


@dataclass(frozen=True)
class Certificate:
    """Answers for N images, with the radii within which they provably hold. All on the CPU.

    Attributes:
        classes: int64 (N,); ABSTAIN (-1) where nothing can be said.
        radii: float64 (N,), in units of images in [0, 1]; 0 where it abstains.
        counts: int64 (N, K), the class counts behind the answer.
        draws: int64 (N,), noisy images classified for it in all.
        stages: int64 (N,), the place of the scale that decided, from the largest (cascades); None otherwise.
    """

    classes: Tensor
    radii: Tensor
    counts: Tensor
    draws: Tensor
    stages: Tensor | None = None


class Certifier(ABC):
    """A smoothed classifier with a certificate.

    Attributes:
        norm: the norm of its radii.
    """

    norm: ClassVar[str]

    @abstractmethod
    def certify(
        self, images: Tensor, draws: Draws | None = None, *, sample_ids: Tensor | None = None, seed: int = 0
    ) -> Certificate:
        """Certificates of images (N, C, H, W) in [0, 1]; ``sample_ids`` (N,) and ``seed`` key the noise."""

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


def best_bound(draws: Draws, level: float, least: float) -> float:
    """The lower bound of a probability if all draws hit.

    Raises:
        ValueError: it is below ``least``, without which there is no certificate.
    """
    best = float(lower_bound(draws.n, draws.n, level))
    if best < least:
        needed = math.ceil(math.log(level) / math.log(least))
        raise ValueError(
            f"{draws.n} draws at alpha {draws.alpha:g} bound a probability by at most {best:.3g}, and a certificate "
            f"needs {least:g}: every image would abstain; make at least {needed} draws."
        )
    return best


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
            ValueError: images or ids out of range, NaN from the classifier, a radius to stop at that no number of
                draws can certify.
        """
        draws = as_draws(draws)
        noise = keys(images, sample_ids, derive_seed(seed, "certify", self.stream))
        level = draws.alpha / len(draws.looks)
        self.reachable(draws)
        target = self._target(draws, level)
        selected = self.counts(images, noise, range(draws.n0)).argmax(1)
        counts, lower = torch.zeros(0, dtype=torch.int64), np.zeros(len(images))
        alive, done = torch.arange(len(images), device=images.device), 0
        for end in draws.looks:
            found = self.counts(images[alive], noise[alive], range(draws.n0 + done, draws.n0 + end))
            counts = found if done == 0 else counts.index_add(0, alive, found)
            hits = counts[alive].gather(1, selected[alive, None])[:, 0].cpu().numpy()
            rows, done = alive.cpu().numpy(), end
            lower[rows] = lower_bound(hits, end, level)
            reachable = lower_bound(hits + draws.n - end, draws.n, level)
            alive = alive[torch.from_numpy((lower[rows] < target) & (reachable >= target)).to(alive.device)]
            if draws.stop is not None and len(alive) == 0:
                break
        answered = lower >= 0.5
        classes = torch.where(torch.from_numpy(answered), selected.cpu(), ABSTAIN)
        radii = np.where(answered, self.radius(lower), 0.0)
        counts = counts.cpu()
        return Certificate(classes, torch.from_numpy(radii), counts, draws.n0 + counts.sum(1))

    def reachable(self, draws: Draws) -> float:
        return float(self.radius(np.array(best_bound(draws, draws.alpha / len(draws.looks), 0.5))))

    def _target(self, draws: Draws, level: float) -> float:
        """The bound at which drawing may stop."""
        if draws.stop is None:
            return 1.0
        target, best = self.probability(draws.stop.radius), float(lower_bound(draws.n, draws.n, level))
        if target > best:
            raise ValueError(
                f"{draws.n} draws at alpha {draws.alpha:g} in {draws.stop.looks} looks certify at most "
                f"{float(self.radius(np.array(best))):.4g}, not {draws.stop.radius:g}; ask for a smaller radius."
            )
        return target

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
