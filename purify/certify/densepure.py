"""DensePure (Xiao et al. 2023, arXiv 2211.00322): smoothing of a majority vote over several full reverse processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from purify.answers import as_logits
from purify.certify.counts import check_classifier
from purify.certify.gaussian import Smooth
from purify.checks import check_count, check_weights
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import Ancestral, ReverseRule
from purify.diffusion.schedule import check_sigma
from purify.diffusion.score import ScoreModel, per_sample
from purify.finite import clamped
from purify.purification.plans import FixedSteps, StepFactory


def log_votes(logits: Tensor) -> Tensor:
    """Votes of logits (N, M, K) as logits (N, K): the log of each class's share, where all have half a vote more.

    Their gradient is that of the log of the mean softmax: votes themselves have none, which would only hide the model.
    """
    soft = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    votes = one_hot(logits.argmax(-1), logits.shape[-1]).sum(1).to(logits.dtype) + 0.5
    return (votes / votes.sum(1, keepdim=True)).log() + (soft - soft.detach())


class DensePure(nn.Module):
    """Noisy images to the votes for their classes over several reverse processes.

    Takes x + sigma z, that is (u + 2 sigma z + 1) / 2, as the state alpha(t) (u + 2 sigma z) at the time t whose
    noise-to-signal ratio is 2 sigma. ``votes`` times this state is brought to time 0 by ``steps`` steps of ``rule``
    with noise of its own, and classified. votes * steps network calls for each noisy image; one vote and one step of
    a deterministic rule are :class:`~purify.certify.gaussian.OneShotDenoised`.

    The vote is random: the smoothed classifier answers with the class that is most probable over the noise and the
    reverse processes together, and Cohen et al.'s theorem holds for it as for any randomised classifier.
    The gradient is that of the log of the mean softmax, through all steps, which are recomputed in the backward pass.

    Args:
        classifier: images in [0, 1] to logits, in eval mode.
        score_model: the diffusion model.
        sigma: of the noise, in units of images in [0, 1].
        votes: reverse processes (K in the paper).
        steps: of each (b in the paper).
        rule: of a step; default DDPM's ancestral sampling.

    Raises:
        ValueError: sigma is not positive, or beyond the schedule's end; no votes or steps; train mode; a rule that does
            not go to time 0.
    """

    accepts_keys = True
    aggregate = "votes"  # which may be even

    def __init__(
        self,
        classifier: nn.Module,
        score_model: ScoreModel,
        sigma: float,
        votes: int = 5,
        steps: int = 5,
        rule: ReverseRule | None = None,
    ) -> None:
        super().__init__()
        check_classifier(classifier, None)
        check_weights(score_model.network, "The score network")
        check_sigma(sigma)
        check_count(votes, "votes")
        self.time = score_model.schedule.time_of_sigma(2 * sigma)
        self.votes, self.plan, self.rule = votes, FixedSteps(steps), rule or Ancestral()
        if self.rule.held:
            raise ValueError(
                f"Reverse processes of noisy images go to time 0, and {type(self.rule).__name__} stays at its time; "
                "take another rule, as ddpm or ddim."
            )
        self.rule.check(score_model)
        self.classifier = classifier.requires_grad_(False)
        self.score_model = score_model
        score_model.requires_grad_(False)
        self.eval()

    def forward(
        self,
        noisy: Tensor,
        *,
        sample_ids: Tensor | Sequence[int] | None = None,
        draw: int | Tensor = 0,
        seed: int = 0,
    ) -> Tensor:
        """Logits (N, K) of noisy images (N, C, H, W) around [0, 1]; keys as in ``Purifier.forward``."""
        noise = Noise.fresh(len(noisy), noisy.device)
        if sample_ids is not None:
            noise = Noise.keyed(seed, torch.as_tensor(sample_ids, device=noisy.device), draw)
        return log_votes(torch.stack([self._vote(noisy, noise, k) for k in range(self.votes)], 1))

    def _vote(self, noisy: Tensor, noise: Noise, k: int) -> Tensor:
        """Logits (N, K) after the k-th reverse process."""
        model, t = self.score_model, torch.full((len(noisy),), self.time, dtype=torch.float64, device=noisy.device)
        own = Noise(noise.seed, noise.sample_ids, noise.draws * self.votes + k)
        process = self.plan.round(StepFactory(model, self.rule, own, model.schedule), t)
        u = per_sample(model.schedule.alpha(t), noisy) * (2 * noisy - 1)
        for step in process.reverse:
            u = checkpoint(step, u, use_reentrant=False) if torch.is_grad_enabled() and u.requires_grad else step(u)
        return as_logits(self.classifier((clamped(u, -1, 1) + 1) / 2))


def dense_smoothing(
    classifier: nn.Module,
    score_model: ScoreModel,
    sigma: float,
    votes: int = 5,
    steps: int = 5,
    rule: ReverseRule | None = None,
    max_rows: int | None = None,
) -> Smooth:
    """DensePure: :class:`Smooth` over :class:`DensePure`."""
    return Smooth(DensePure(classifier, score_model, sigma, votes, steps, rule), sigma, max_rows=max_rows)
