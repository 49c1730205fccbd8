"""Multi-scale smoothing (Jeong & Shin 2023, arXiv 2310.16779): a cascade of Gaussian scales, the largest first.

At an image, the cascade of true probabilities answers with the class that reaches p0 at the largest scale where one
does. It answers c at every image within the radius if c keeps p0 at its scale and no other class reaches p0 at a larger
one. Both hold for p0 >= 1/2 only: below, two classes may reach p0 at one scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import norm
from statsmodels.stats.proportion import multinomial_proportions_confint
from torch import Tensor

from purify.certify.base import ABSTAIN, Certificate, Certifier, check_asked, check_reached
from purify.certify.bounds import CAPITAL, betting_bound, lower_bound, upper_bound
from purify.certify.counts import NoisyModel, keys
from purify.certify.gaussian import Smooth
from purify.certify.passing import Passing
from purify.certify.sampling import FUTILE, Draws, as_draws, clear
from purify.checks import check_count, choose, is_number, short
from purify.diffusion.noise import Noise, derive_seed


class Mode(ABC):
    """How alpha is spent on the bounds of K scales. Stage 0 is the largest scale."""

    @property
    def anytime(self) -> Mode:
        """The same for bounds that are looked at often.

        Raises:
            ValueError: there are none.
        """
        raise ValueError("The published program makes all draws; leave anytime sampling out, or use mode strict.")

    @abstractmethod
    def level(self, alpha: float, stage: int, scales: int) -> float:
        """The level at which ``stage`` is decided."""

    def lowest(self, counts: np.ndarray, selected: int, level: float) -> float:
        """Lower bound of the selected class's probability, from counts (K,)."""
        return float(lower_bound(counts[selected], counts.sum(), level))

    @abstractmethod
    def highest(self, counts: np.ndarray, selected: int, level: float) -> float:
        """Upper bound of the selected class's probability, from counts (K,)."""

    @abstractmethod
    def highest_other(self, counts: np.ndarray, answer: int, level: float) -> float:
        """Upper bound of the probability of every class but ``answer``."""


class Strict(Mode):
    """2K - 1 events are decided on beforehand and each gets alpha / (2K - 1): at each scale a lower bound of the
    selected class, at each but the smallest upper bounds of all classes but the answer.

    Bounds are Clopper-Pearson's, upper ones with Bonferroni over the C - 1 classes. Scales have independent noise, so
    the answer that the smaller scales find is independent of the counts here, and C - 1 classes are enough.
    """

    @property
    def anytime(self) -> Mode:
        return Betting()

    def level(self, alpha: float, stage: int, scales: int) -> float:
        return alpha / (2 * scales - 1)

    def highest(self, counts: np.ndarray, selected: int, level: float) -> float:
        return float(upper_bound(counts[selected], counts.sum(), level / max(len(counts) - 1, 1)))

    def highest_other(self, counts: np.ndarray, answer: int, level: float) -> float:
        others = np.delete(counts, answer)
        return 0.0 if len(others) == 0 else float(upper_bound(others.max(), counts.sum(), level / len(others)))


class Betting(Strict):
    """The same 2K - 1 events at the same levels, with bounds by betting, true after every number of draws at once: when
    drawing stops may depend on anything. Upper ones hold for all C classes, whichever is answered.

    Passing a scale needs no bound: if the class answered reaches p0 there, the cascade answers it, too. So it is
    decided by the upper bound by which radii are given up.
    """

    def lowest(self, counts: np.ndarray, selected: int, level: float) -> float:
        return float(betting_bound(counts[selected], counts.sum(), level))

    def highest(self, counts: np.ndarray, selected: int, level: float) -> float:
        return float(upper_bound(counts[selected], counts.sum(), FUTILE))

    def highest_other(self, counts: np.ndarray, answer: int, level: float) -> float:
        most, n = np.delete(counts, answer).max(initial=0), counts.sum()
        return 1 - float(betting_bound(n - most, n, level / len(counts)))


class Reference(Mode):
    """The published program: stage s tests at alpha / (s + 1), and earlier stages' upper bounds of other classes are
    Goodman's simultaneous ones at the last stage's level, bins below 5 pooled.

    Not a union bound, and Goodman's interval is asymptotic: alpha is not guaranteed. For comparison.
    """

    def level(self, alpha: float, stage: int, scales: int) -> float:
        return alpha / (stage + 1)

    def highest(self, counts: np.ndarray, selected: int, level: float) -> float:
        return float(upper_bound(counts[selected], counts.sum(), level))

    def highest_other(self, counts: np.ndarray, answer: int, level: float) -> float:
        bins = pool(counts, answer)
        # The interval is two-sided: 2 level leaves level above it.
        return float(multinomial_proportions_confint(bins, 2 * level, method="goodman")[1:, 1].max())


MODES: dict[str, Mode] = {"strict": Strict(), "reference": Reference()}


def pool(counts: np.ndarray, answer: int, least: int = 5) -> list[int]:
    """Counts of the answer, then of the others in falling order, where those below ``least`` are added up, the largest
    first, until each sum is at least ``least``; what is left over joins the last bin.

    There is always a bin of others, however few they are: the published program then bounds them by the class that a
    passed scale chose, which is not sound (docs/certify.md).
    """
    bins: list[int] = []
    rest = 0
    for count in sorted(np.delete(counts, answer).tolist(), reverse=True):
        rest += count
        if rest >= least:
            bins.append(rest)
            rest = 0
    if bins:
        bins[-1] += rest
    return [int(counts[answer]), *(bins or [rest])]


@dataclass(frozen=True)
class Decision:
    """What the cascade says of one image: class (or ABSTAIN), L2 radius, the stage that decided, and why."""

    answer: int
    radius: float
    stage: int
    why: str


def decide(
    counts: Sequence[np.ndarray],
    selected: Sequence[int],
    sigmas: Sequence[float],
    alpha: float = 0.001,
    p0: float = 0.5,
    mode: str | Mode = "strict",
) -> Decision | None:
    """The decision at the last of the stages seen so far, or None: go on to the next smaller scale.

    Args:
        counts: of each stage seen, from the largest scale: class counts (C,) over its fresh draws.
        selected: of each stage seen: the class that its selection draws chose.
        sigmas: all K scales, falling.
        alpha, p0, mode: see :class:`Cascade`; the bounds themselves for others than its two.
    """
    rule, stage = MODES[mode] if isinstance(mode, str) else mode, len(counts) - 1
    level, answer, own = rule.level(alpha, stage, len(sigmas)), selected[-1], counts[-1]
    low = rule.lowest(own, answer, level)
    if low < p0:
        if rule.highest(own, answer, level) >= p0:
            return Decision(ABSTAIN, 0.0, stage, "undecided")
        return None if stage + 1 < len(sigmas) else Decision(ABSTAIN, 0.0, stage, "exhausted")
    own_radius = sigmas[stage] * (norm.ppf(low) - norm.ppf(p0))
    radius = float(min(own_radius, allowed(counts[:-1], answer, sigmas, level, p0, rule)))
    return Decision(answer, radius, stage, "answered") if radius >= 0 else Decision(ABSTAIN, 0.0, stage, "contested")


def allowed(
    passed: Sequence[np.ndarray], answer: int, sigmas: Sequence[float], level: float, p0: float, rule: Mode
) -> float:
    """The radius within which no class but ``answer`` reaches p0 at the scales passed; infinite if none was."""
    highs = [rule.highest_other(counts, answer, level) for counts in passed]
    return min((s * (norm.ppf(p0) - norm.ppf(high)) for s, high in zip(sigmas, highs, strict=False)), default=np.inf)


def mixed_logits(counts: np.ndarray, logits: np.ndarray, uniform: float = 0.1) -> np.ndarray:
    """The un-certified prediction of the published program: clean logits (C,) plus the log of a stage's class shares,
    mixed with ``uniform`` parts of the uniform distribution."""
    shares = counts / counts.sum()
    return logits + np.log((1 - uniform) * shares + uniform / len(counts))


def reached(counts: Sequence[np.ndarray], p0: float = 0.5) -> tuple[int, int]:
    """The first stage where a class's share reaches p0, and that class; the last stage and ABSTAIN if none does."""
    for stage, found in enumerate(counts):
        if found.max() >= p0 * found.sum():
            return stage, int(found.argmax())
    return len(counts) - 1, ABSTAIN


Stage = tuple[int, np.ndarray]  # the class that the selection draws chose, and the counts (C,) of the fresh ones


def _certificate(decisions: Sequence[Decision], seen: Sequence[Sequence[Stage]], draws: Tensor) -> Certificate:
    """Decisions, with the stages up to those that decided, and how much was drawn for each."""
    deciding = [stages[d.stage] for d, stages in zip(decisions, seen, strict=True)]
    stages = torch.tensor([d.stage for d in decisions])
    return Certificate(
        torch.tensor([d.answer for d in decisions]),
        torch.tensor([d.radius for d in decisions], dtype=torch.float64),
        torch.from_numpy(np.stack([own for _, own in deciding])),
        draws,
        torch.tensor([c for c, _ in deciding]),
        stages=stages,
        passed=[[(c, own.tolist()) for c, own in s[: d.stage]] for d, s in zip(decisions, seen, strict=True)],
    )


@dataclass(frozen=True)
class Cascade(Certifier):
    """Smoothed classifiers at several scales, visited from the largest.

    If the lower bound of the selected class reaches p0, the cascade answers; else, if its upper bound still does,
    nothing can be told and the whole cascade abstains; else the next smaller scale is asked. Falling off the end
    abstains. The radius of an answer c at scale k is the least of sigma_k (Phi^-1(low_c) - Phi^-1(p0)) and, over the
    larger scales j and classes c' != c, of sigma_j (Phi^-1(p0) - Phi^-1(high_c')).

    Args:
        scales: the smoothed classifiers, usually one diffusion model at several sigmas, in any order.
        p0: threshold in [1/2, 1).
        mode: ``strict`` (default): fails with probability at most alpha; ``reference``: the published program's bounds.

    One scale and p0 = 1/2 give :meth:`Smooth.certify`, draw for draw.

    Raises:
        ValueError: p0 below 1/2 (the certificate would be false), scales missing or repeated, unknown mode.
    """

    scales: tuple[Smooth, ...]
    p0: float = 0.5
    mode: str = "strict"

    norm: ClassVar[str] = "L2"

    def __post_init__(self) -> None:
        choose(self.mode, MODES, "cascade mode")
        if not (is_number(self.p0) and 0.5 <= self.p0 < 1):
            raise ValueError(f"p0 must lie in [1/2, 1), got {self.p0}: below 1/2 the cascade's certificate is false.")
        if not (isinstance(self.scales, Sequence) and all(isinstance(s, Smooth) for s in self.scales)):
            advice = "purify.certify.Smooth(classifier, sigma), as (Smooth(c, 0.5), Smooth(c, 1.0))"
            raise ValueError(f"scales must be a tuple of {advice}, got {short(self.scales)}.")
        ordered = tuple(sorted(self.scales, key=lambda s: -s.sigma))
        if len({s.sigma for s in ordered}) < max(len(ordered), 1):
            raise ValueError("A cascade needs at least one scale, and different sigmas.")
        object.__setattr__(self, "scales", ordered)

    @property
    def sigmas(self) -> list[float]:
        """The scales, falling."""
        return [s.sigma for s in self.scales]

    def certify(
        self,
        images: Tensor,
        draws: Draws | None = None,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Certificate:
        """Certificates of images (N, C, H, W) in [0, 1]; only images that pass a scale are asked at the next.

        ``counts`` are those of the stage that decided; with anytime sampling those of the look with the best bound, if
        it answered. Arguments and errors as in :meth:`Smooth.certify`.
        """
        draws = as_draws(draws)
        self.reachable(draws)
        ids = keys(images, sample_ids, seed).sample_ids
        seen: list[list[Stage]] = [[] for _ in images]
        decisions: list[Decision | None] = [None] * len(images)
        spent = torch.zeros(len(images), dtype=torch.int64)
        for scale in self.scales:
            rows = [i for i, decision in enumerate(decisions) if decision is None]
            if not rows:
                break
            noise = keys(images[rows], ids[rows], derive_seed(seed, "certify", scale.stream))
            stages, made = self._ask(scale, images[rows], noise, draws, [seen[i] for i in rows])
            spent[rows] += made
            for i, stage in zip(rows, stages, strict=True):
                seen[i].append(stage)
                decisions[i] = self._decide(seen[i], draws)
        return _certificate([d for d in decisions if d is not None], seen, spent)

    def _ask(
        self, scale: Smooth, images: Tensor, noise: Noise, draws: Draws, before: Sequence[Sequence[Stage]]
    ) -> tuple[list[Stage], Tensor]:
        """What a scale says of images that passed the scales ``before``, and how many draws were made for each."""
        votes = scale.count_until(images, noise, 0, draws.selections, lambda rows, counts, look: ~clear(counts)).cpu()
        chosen = votes.argmax(1).tolist()
        if draws.stop is None:
            counts = scale.counts(images, noise, range(draws.n0, draws.n0 + draws.n)).cpu()
            kept = counts.numpy()
        else:
            stage, rule = len(before[0]), MODES[self.mode].anytime
            level = rule.level(draws.alpha, stage, len(self.scales))
            caps = [
                allowed([own for _, own in passed], c, self.sigmas, level, self.p0, rule)
                for passed, c in zip(before, chosen, strict=True)
            ]
            last = stage + 1 == len(self.scales)
            watch = Passing(draws, level, votes.shape[1], scale.sigma, self.p0, np.array(chosen), np.array(caps), last)
            counts = scale.count_until(images, noise, draws.n0, draws.looks, watch).cpu()
            kept = watch.kept
        return list(zip(chosen, kept, strict=True)), votes.sum(1) + counts.sum(1)

    def recompute(self, found: Certificate, draws: Draws) -> Certificate:
        self.reachable(draws)
        last = zip(found.selected.tolist(), found.counts.numpy(), strict=True)
        passed = found.passed or [[] for _ in found.classes]
        seen = [[*((c, np.array(own)) for c, own in before), own] for before, own in zip(passed, last, strict=True)]
        decisions = []
        for i, stages in enumerate(seen):
            steps = (self._decide(stages[: k + 1], draws) for k in range(len(stages)))
            decision = next((d for d in steps if d is not None), None)
            if decision is None:
                raise ValueError(
                    f"At alpha {draws.alpha:g} image {i} would go on to sigma {self.sigmas[len(stages)]:g}, for which "
                    "nothing was drawn; choose a smaller alpha, or certify again."
                )
            decisions.append(decision)
        return _certificate(decisions, seen, found.draws)

    def _decide(self, stages: Sequence[Stage], draws: Draws) -> Decision | None:
        """The decision at the last of these stages, or None: go on."""
        selected, counts = zip(*stages, strict=True)
        mode = self.mode if draws.stop is None else MODES[self.mode].anytime
        return decide(counts, selected, self.sigmas, draws.alpha, self.p0, mode)

    def reachable(self, draws: Draws) -> float:
        rule = MODES[self.mode] if draws.stop is None else MODES[self.mode].anytime
        level = rule.level(draws.alpha, 0, len(self.scales))
        best = rule.lowest(np.array([draws.n]), 0, level)
        low = check_reached(best, self.p0, draws, level if draws.stop is None else level * float(CAPITAL[0]))
        return check_asked(float(self.sigmas[0] * (norm.ppf(low) - norm.ppf(self.p0))), draws, "the cascade")

    def predict(
        self,
        images: Tensor,
        logits: Tensor,
        n: int = 1000,
        uniform: float = 0.1,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The published program's answers without a certificate, int64 (N,).

        The largest of the clean ``logits`` (N, C), to which the scale that is :func:`reached` with n draws adds its
        class shares (:func:`mixed_logits`); of the clean logits alone where none is. Never abstains.
        """
        check_count(n, "n")
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(f"logits must be the classifier's of the images, a tensor (N, C), got {short(logits)}.")
        if not (is_number(uniform) and 0 < uniform < 1):
            raise ValueError(f"uniform must lie in (0, 1), got {short(uniform)}.")
        ids = keys(images, sample_ids, seed).sample_ids
        outputs, waiting = logits.detach().double().cpu().numpy().copy(), list(range(len(images)))
        for scale in self.scales:
            if not waiting:
                break
            noise = keys(images[waiting], ids[waiting], derive_seed(seed, "predict", scale.stream))
            found = scale.counts(images[waiting], noise, range(n)).cpu().numpy()
            if found.shape[1] != logits.shape[1]:
                classes = f"{logits.shape[1]} classes, the scales {found.shape[1]}"
                raise ValueError(f"The clean logits have {classes}; give those of the same classifier.")
            halts = [reached([own], self.p0)[1] != ABSTAIN for own in found]
            for i, own, halt in zip(waiting, found, halts, strict=True):
                outputs[i] = mixed_logits(own, outputs[i], uniform) if halt else outputs[i]
            waiting = [i for i, halt in zip(waiting, halts, strict=True) if not halt]
        return torch.from_numpy(outputs.argmax(1))

    def noisy_models(self) -> dict[str, NoisyModel]:
        return {name: model for s in self.scales for name, model in s.noisy_models().items()}

    def config(self) -> dict[str, Any]:
        return {"kind": "multiscale", "scales": [s.config() for s in self.scales], "p0": self.p0, "mode": self.mode}
