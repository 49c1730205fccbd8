"""Class counts of a classifier on noisy copies of images: all that a certificate sees.

Noise is keyed by (seed, sample, draw), so it does not depend on batch, order or sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from purify.answers import as_logits, lost, no_number
from purify.certify.protocols import Classifier, KeyedClassifier
from purify.checks import (
    check_count,
    check_eval,
    check_images,
    check_logits,
    check_weights,
    fitting,
    has,
    sample_keys,
    short,
)
from purify.diffusion.noise import Noise
from purify.diffusion.precision import float32_proper
from purify.memory import Parts
from purify.transforms import copied

Perturbation = Callable[[Tensor, Noise], Tensor]  # images (N, C, H, W) and the noise of each -> noisy images

# Rows per network call unless told otherwise. On a CPU a few hundred stay in its caches
# (benchmarks/certify_speed.py --max-rows).
ROWS = {"cpu": 256, "cuda": 8192}

# A row whose two best logits are closer than this share of its largest logit is decided in float64 by a referee.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class NoisyCounts:
    """Counts the classes that ``classifier`` gives to noisy copies of images.

    Args:
        classifier: noisy images (N, C, H, W) to logits (N, K), in eval mode; one that accepts keys (``sample_ids``,
            ``draw``, ``seed``) gets those of the draw for its own randomness.
        perturb: makes noisy images from images and their keyed noise.
        max_rows: noisy images in the classifier at once; default 256 on a CPU, 8192 on a GPU.
        referee: the classifier in float64 (see :func:`float64_twin`). If given, it decides rows that are nearly tied
            in float32, where rounding depends on batch and machine; counts then are the same everywhere.
    """

    classifier: Classifier | KeyedClassifier
    perturb: Perturbation
    max_rows: int | None = None
    referee: Classifier | None = None

    def __post_init__(self) -> None:
        check_rows(self.max_rows)

    @torch.no_grad()
    def __call__(self, images: Tensor, noise: Noise, draws: range) -> Tensor:
        """int64 (N, K) on the images' device: how often each image got each class over ``draws``.

        ``noise`` holds seed and sample ids, (N,); draw d of an image has the noise under (seed, id, d).

        Raises:
            ValueError: the classifier returned no logits (N, K) of at least two classes, NaN, or plus infinity.
        """
        n, m, device = len(images), len(draws), images.device
        most = self.max_rows or ROWS.get(device.type, ROWS["cpu"])
        size = math.ceil(n * m / math.ceil(n * m / most))  # parts of one size: small ones cost more for each row
        rows = torch.arange(n * m, device=device)
        votes, wrong, classes = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool), 0

        def ask(part: Tensor) -> Tensor:
            sample, draw = part // m, draws.start + part % m
            own = Noise(noise.seed, noise.sample_ids[sample], draw, noise.stream_id)
            return self._logits(self.perturb(images[sample], own), own)

        start = 0
        for part, logits in Parts(size).of(rows, ask):
            here, classes = slice(start, start + len(part)), logits.shape[1]
            votes[here], wrong[here] = logits.argmax(1), lost(logits)
            start += len(part)
        if bool(wrong.any()):
            self._complain(images, noise, draws, int(wrong.long().argmax()))
        return torch.bincount(rows // m * classes + votes, minlength=n * classes).reshape(n, classes)

    def _complain(self, images: Tensor, noise: Noise, draws: range, row: int) -> NoReturn:
        """Raise the ValueError for logits that are no number, of a row of images times draws."""
        place, index = divmod(row, len(draws))
        one = noise[place : place + 1]
        own = replace(one, draws=one.draws * 0 + draws[index])
        again = self.perturb(images[place : place + 1], own)
        what = f"On noise draw {draws[index]} the classifier"
        call = partial(answer, self.classifier, again, own)
        raise ValueError(no_number(self.classifier, what, int(one.sample_ids), call))

    def _logits(self, noisy: Tensor, noise: Noise) -> Tensor:
        proper = nullcontext() if self.referee is None else float32_proper()  # TF32 errs by more than a near tie
        with proper, fitting(noisy, "The classifier"):
            logits = answer(self.classifier, noisy, noise)
        check_logits(logits, len(noisy))
        if self.referee is None:
            return logits
        best, second = logits.topk(2, dim=1).values.unbind(1)
        close = best - second < NEAR_TIE * logits.abs().amax(1)
        if bool(close.any()):
            logits = logits.double()
            logits[close] = as_logits(self.referee(noisy[close].double()))
        return logits


def answer(classifier: Classifier | KeyedClassifier, noisy: Tensor, noise: Noise) -> Tensor:
    """Logits of noisy images; a classifier with randomness of its own draws it under the same keys."""
    if has(classifier, KeyedClassifier) and classifier.accepts_keys:
        return as_logits(classifier(noisy, sample_ids=noise.sample_ids, draw=noise.draws, seed=noise.seed))
    return as_logits(classifier(noisy))  # type: ignore[call-arg]


class NoisyModel(nn.Module):
    """The noisy classifier as a module that an attack takes: logits of one noisy copy per row, keyed or fresh.

    The gradient is that of the noisy copy, so attacks average it over draws (Salman et al. 2019).
    """

    accepts_keys = True

    def __init__(self, classifier: nn.Module, perturb: Perturbation) -> None:
        super().__init__()
        self.classifier, self.perturb = classifier, perturb
        self.aggregate = getattr(classifier, "aggregate", "logits")
        self.eval()

    def forward(
        self,
        x: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
    ) -> Tensor:
        """Logits (N, K) of a noisy copy of each image (N, C, H, W) in [0, 1]; keys as in ``Purifier.forward``."""
        noise = Noise.fresh(len(x), x.device) if sample_ids is None else Noise.keyed(seed, sample_ids, draw)
        return answer(self.classifier, self.perturb(x, noise), noise)


def float64_twin(classifier: nn.Module) -> nn.Module:
    """A copy of the classifier in float64."""
    return copied(classifier).double()


def keys(images: Tensor, sample_ids: Tensor | Sequence[int] | None, seed: int) -> Noise:
    """Checked keys of a batch (default ids: 0..N-1).

    Raises:
        ValueError: images that are no float batch in [0, 1]; ids or seed out of range, or not one id per image.
    """
    check_images(images)
    if len(images) == 0:
        raise ValueError("There are no images to certify.")
    return Noise.keyed(seed, sample_keys(sample_ids, images))


def check_classifier(classifier: nn.Module, max_rows: int | None) -> None:
    """Raise ValueError unless the classifier is a module in eval mode, without NaN, and ``max_rows`` a count."""
    if not isinstance(classifier, nn.Module):
        raise ValueError(f"The classifier must be a torch.nn.Module, got {short(classifier)}.")
    check_eval(classifier, "certifying it")
    check_weights(classifier, "The classifier")
    check_rows(max_rows)


def check_rows(max_rows: int | None) -> None:
    """Raise ValueError unless ``max_rows`` is a count or None."""
    if max_rows is not None:
        check_count(max_rows, "max_rows")
