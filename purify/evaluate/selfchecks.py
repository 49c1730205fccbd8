"""Is an evaluation to be believed? Checks that are printed and stored with every result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from purify.attacks.base import Attack, keyed
from purify.attacks.pgd import PGD
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, judge, predictions, stage_name
from purify.noise import derive_seed


@dataclass(frozen=True)
class Check:
    """One question about an evaluation.

    Attributes:
        defence: the defence that was evaluated.
        name: what was asked.
        value: the answer.
        limit: what it is compared with.
        passed: whether it is on the right side.
        meaning: one sentence that says what a failure means.
    """

    defence: str
    name: str
    value: float
    limit: float
    passed: bool
    meaning: str


def self_checks(folder: RunFolder, defence: Defence, samples: Samples, seed: int, complete: bool = True) -> list[Check]:
    """All checks of a purified defence whose records are in ``folder``.

    ``complete``: whether every sample met every attack, without which attacks cannot be compared.
    """
    # Twice the steps and twice the draws on a quarter of the samples cost as much as the attack itself.
    few = samples[torch.arange(min(16, -(-len(samples) // 4)))]

    def recorded(attack: Attack) -> float:
        return share_right(predictions(folder, defence, stage_name(attack), few), few)

    return [
        *gradient_checks(defence, samples[torch.arange(min(4, len(samples)))], seed),
        *(black_box_check(folder, defence, samples) if complete else []),
        *convergence_checks(defence, few, seed, recorded if complete else None),
    ]


def input_gradient(model: nn.Module, samples: Samples, dtype: torch.dtype, seed: int) -> Tensor:
    """Gradient of the cross-entropy with keyed noise, (N, D) in float64."""
    x = samples.images.to(dtype).requires_grad_()
    logits = keyed(model, seed)(x, samples.ids.to(x.device), torch.zeros_like(samples.ids).to(x.device))
    loss = cross_entropy(logits, samples.labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1).double()


def gradient_checks(defence: Defence, samples: Samples, seed: int) -> list[Check]:
    """The gradient in use against full backpropagation in float64, and how many of its entries are zero."""
    used = input_gradient(defence.model, samples, samples.images.dtype, seed)
    double: Any = copy.deepcopy(defence.model).double()
    whole = double.with_gradient("full", through_level=True, second_order=True)
    exact = input_gradient(whole, samples, torch.float64, seed)
    cosine = torch.cosine_similarity(used.flatten(), exact.flatten(), dim=0).item()
    zeros = (used == 0).double().mean().item()
    return [
        Check(
            defence.name,
            "cosine of the gradient with float64 full backpropagation",
            cosine,
            0.99,
            cosine >= 0.99,
            "The attacks follow a gradient that is not the defence's; use the gradient checkpoint or full.",
        ),
        Check(
            defence.name,
            "share of zero entries in the gradient",
            zeros,
            0.1,
            zeros <= 0.1,
            "The gradient vanishes in places; an attack on logits or margins may do better.",
        ),
    ]


def black_box_check(folder: RunFolder, defence: Defence, samples: Samples) -> list[Check]:
    """How much lower the best black-box attack brings the accuracy than the best white-box attack."""

    def lowest(attacks: Sequence[Attack]) -> float:
        return min(share_right(predictions(folder, defence, stage_name(a), samples), samples) for a in attacks)

    black = [a for a in defence.attacks if a.black_box]
    white = [a for a in defence.attacks if not a.black_box]
    if not black or not white:
        return []
    gain = lowest(white) - lowest(black)
    name = "accuracy that black-box attacks take beyond white-box ones"
    meaning = "A black-box attack beats all white-box ones: their gradient is masked."
    return [Check(defence.name, name, gain, 0.0, gain <= 0, meaning)]


def convergence_checks(
    defence: Defence, samples: Samples, seed: int, recorded: Callable[[Attack], float] | None = None
) -> list[Check]:
    """How much lower twice the steps, or twice the draws, of the first PGD attack bring a few samples.

    ``recorded``: the accuracy that an attack of the evaluation left, where its records are at hand.
    """
    attack = next((a for a in defence.attacks if type(a) is PGD), None)
    if attack is None:
        return []
    stronger = {"steps": replace(attack, steps=2 * attack.steps), "EOT draws": replace(attack, eot=2 * attack.eot)}
    before = recorded(attack) if recorded else accuracy(defence, attack, samples, seed)
    checks = []
    for what, better in stronger.items():
        lost = before - accuracy(defence, better, samples, seed)
        limit = 0.05
        meaning = f"The attack has not converged: twice the {what} lower the accuracy further."
        name = f"accuracy lost with twice the {what} ({len(samples)} samples)"
        checks.append(Check(defence.name, name, lost, limit, lost <= limit, meaning))
    return checks


def accuracy(defence: Defence, attack: Attack, samples: Samples, seed: int) -> float:
    """Mean over the judges' draws, as the runner would find it."""
    attack_seed = derive_seed(seed, "attack")
    found = attack(defence.model, samples.images, samples.labels, sample_ids=samples.ids, seed=attack_seed)
    judged = judge(defence, found.images, samples.ids, seed)
    return share_right(judged.predictions.cpu().numpy(), samples)


def share_right(predicted: np.ndarray, samples: Samples) -> float:
    """Share of predictions (N, R) that are right."""
    return float(np.mean(predicted == samples.labels.cpu().numpy()[:, None]))
