"""Is an evaluation to be believed? Checks that are printed and stored with every result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purify.attacks.autoattack import Square
from purify.attacks.base import Attack, keyed
from purify.attacks.kinks import blind, moved
from purify.attacks.losses import margin_loss
from purify.attacks.noise import RandomNoise
from purify.attacks.pgd import DRAWS
from purify.diffusion.health import LIMIT, MARGIN, Health
from purify.diffusion.noise import derive_seed
from purify.diffusion.precision import FLOAT32, rounds_to_tf32
from purify.evaluate.progress import Progress, weight
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, judge, predictions, stage_name
from purify.purification.blackbox import BlackBox
from purify.purification.calls import calls
from purify.purification.defended import DefendedClassifier
from purify.transforms import copied

GRAPHS = 2**30  # bytes of graphs that the reference gradient keeps; it recomputes the others
LOST = 0.05  # accuracy that a converged attack may lose when it gets twice the budget
HEALTH_LEVELS = (0.1, 0.3, 1.0, 3.0)  # noise levels, and images, at which a run asks its score network
HEALTH_IMAGES = 8
QUERIES = 200  # of Square on a model without randomness
COSINE = "cosine of the gradient with float64 full backpropagation, least of the samples"
ZEROS = "share of zero entries in the gradient"
INEXACT = "accuracy that attacks with an inexact gradient take beyond exact white-box ones"


def at_limit(value: float, limit: float) -> bool:
    """Whether both are equal up to rounding: a share of 8 x 20 draws that ends at 0.05 may be 0.050000000000000044."""
    return math.isclose(value, limit, rel_tol=0.0, abs_tol=1e-9)


def at_most(value: float, limit: float) -> bool:
    """``value <= limit`` up to rounding."""
    return value <= limit or at_limit(value, limit)


@dataclass(frozen=True)
class Check:
    """One question about an evaluation.

    Attributes:
        defence: the defence that was evaluated.
        name: what was asked.
        value: the answer; None if it could not be asked, which counts as a failure.
        limit: what it is compared with.
        passed: whether it is on the right side.
        meaning: one sentence that says what a failure means.
    """

    defence: str
    name: str
    value: float | None
    limit: float
    passed: bool
    meaning: str


def self_checks(
    folder: RunFolder,
    defence: Defence,
    samples: Samples,
    seed: int,
    complete: bool = True,
    max_rows: int = 2048,
    bar: Progress | None = None,
) -> list[Check]:
    """All checks of a defence whose records are in ``folder``.

    ``complete``: whether every sample met every attack, without which attacks cannot be compared; ``max_rows``: as in
    :func:`purify.evaluate.runner.evaluate`; ``bar``: counts :func:`checks_work`.
    """
    bar = bar or Progress(0, shown=False)
    few, fewer = _few(samples)
    recorded = Recorded(folder, defence, samples)
    asked = [health(defence.model, samples.images)] if isinstance(defence.model, DefendedClassifier) else []
    return [
        *asked_of_gradient(defence, fewer, seed, bar),
        *(check for found in asked for check in health_checks(defence.name, found)),
        *(black_box_check(recorded, few, seed) if complete else []),
        *(inexact_check(defence.name, recorded.found(), defence.config.get("exact", True)) if complete else []),
        *convergence_checks(defence, few, seed, recorded if complete else None, max_rows, bar),
    ]


def asked_of_gradient(defence: Defence, samples: Samples, seed: int, bar: Progress) -> list[Check]:
    """What is asked of the gradient that attacks took, if they took any."""
    if not _has_gradient(defence):
        meaning = "No attack with a gradient was run: the accuracy is an upper bound of what holds."
        return [Check(defence.name, ZEROS, None, 0.1, False, meaning)]
    if is_compared(defence):
        return gradient_checks(defence, samples, seed, bar)
    found = zero_checks(defence, samples, seed)
    if any(isinstance(part, BlackBox) for part in defence.model.modules()):
        meaning = "The classifier's backward pass is that of another network; its own may lead further."
        found.append(Check(defence.name, COSINE, None, 0.99, False, meaning))
    return found


def _has_gradient(defence: Defence) -> bool:
    return any(attack.takes_gradient for attack in defence.attacks)


def is_compared(defence: Defence) -> bool:
    """Whether the gradient that attacks follow is compared with full backpropagation in float64."""
    if not (isinstance(defence.model, DefendedClassifier) and _has_gradient(defence)):
        return False
    return not any(isinstance(part, BlackBox) for part in defence.model.modules())


def _few(samples: Samples) -> tuple[Samples, Samples]:
    """Those that convergence is checked on, and gradients.

    Twice the steps and twice the draws on a quarter of the samples cost as much as the attack itself.
    """
    quarter = min(16, -(-len(samples) // 4))
    return samples[torch.arange(quarter)], samples[torch.arange(min(4, len(samples)))]


def checks_work(folder: RunFolder, defence: Defence, samples: Samples, complete: bool = True) -> float:
    """Network calls of :func:`self_checks`, in the units of :func:`purify.evaluate.progress.weight`."""
    few, fewer = _few(samples)
    gradients = _gradients_work(defence, fewer) if is_compared(defence) else 0.0
    attack = _to_converge(defence, Recorded(folder, defence, samples) if complete else None)
    if attack is None:
        return gradients
    attacks = [*_stronger(attack, defence).values(), *([] if complete else [attack])]
    return gradients + sum(weight(defence, a) for a in attacks) * len(few)


def _gradients_work(defence: Defence, samples: Samples) -> float:
    used, whole = (calls(model).gradient for model in (defence.attacked, defence.model))
    return (used + whole) * len(samples)  # the one in use, and the reference


@dataclass(frozen=True)
class Recorded:
    """What the records say of a defence's attacks."""

    folder: RunFolder
    defence: Defence
    samples: Samples

    def accuracy(self, attack: Attack, samples: Samples | None = None) -> float:
        """Share of the judges' draws that were right."""
        samples = self.samples if samples is None else samples
        return share_right(predictions(self.folder, self.defence, stage_name(attack), samples), samples)

    def found(self) -> list[tuple[type[Attack], float]]:
        """The kind of each attack and the accuracy that it left."""
        return [(type(attack), self.accuracy(attack)) for attack in self.defence.attacks]

    def strongest(self, attacks: Sequence[Attack]) -> Attack:
        """The one that left least."""
        return min(attacks, key=self.accuracy)


def input_gradient(model: nn.Module, samples: Samples, dtype: torch.dtype, seed: int) -> Tensor:
    """Gradient of the margin with keyed noise, (N, D) in float64."""
    x = samples.images.to(dtype).requires_grad_()
    logits = keyed(model, seed)(x, samples.ids.to(x.device), torch.zeros_like(samples.ids).to(x.device))
    return torch.autograd.grad(margin_loss(logits, samples.labels).sum(), x)[0].flatten(1).double()


def reference(model: nn.Module) -> nn.Module:
    """The defence in float64, without autocast, with the exact gradient in every part and bounded memory."""
    double: Any = copied(model)
    double.purifier.score_model = double.purifier.score_model.with_precision(FLOAT32)
    engine = {"kind": "full", "memory_budget": GRAPHS}
    return double.double().with_gradient(engine, through_level=True, second_order=True)


def gradient_checks(defence: Defence, samples: Samples, seed: int, bar: Progress | None = None) -> list[Check]:
    """The gradient in use against full backpropagation in float64, at its worst sample, and its share of zeros."""
    bar = bar or Progress(0, shown=False)
    with bar.work(defence, _gradients_work(defence, samples)):
        used = input_gradient(defence.attacked, samples, samples.images.dtype, seed)
        whole = reference(defence.model)  # with the hooks of its original
        # One by one: the graphs of a network of ImageNet's size fill a GPU.
        each = torch.arange(len(samples)).split(1)
        exact = torch.cat([input_gradient(whole, samples[i], torch.float64, seed) for i in each])
    cosine = torch.cosine_similarity(used, exact, dim=1, eps=0.0).nan_to_num(0.0).min().item()
    return [
        Check(
            defence.name,
            COSINE,
            cosine,
            0.99,
            at_most(0.99, cosine),
            inexact(defence, samples.images.device),
        ),
        zero_check(defence.name, used),
    ]


def inexact(defence: Defence, device: torch.device) -> str:
    """What a gradient in use that is not the defence's means, and what to do."""
    if defence.precision != FLOAT32:
        return (
            f"In {defence.precision} the attacks follow a gradient that is not the defence's; use --precision float32."
        )
    if rounds_to_tf32(device):
        return "Convolutions in TF32 turn this defence's gradient; set the environment variable NVIDIA_TF32_OVERRIDE=0."
    return "The attacks follow a gradient that is not the defence's; use the gradient checkpoint or full."


def zero_checks(defence: Defence, samples: Samples, seed: int) -> list[Check]:
    """The share of zeros in the gradient of a model without a purifier, as attacks take it: see ``attacks.kinks``."""
    used = input_gradient(defence.model, samples, samples.images.dtype, seed)
    if bool(blind(samples.images, used).any()):
        inner = replace(samples, images=moved(samples.images))
        used = input_gradient(defence.model, inner, samples.images.dtype, seed)
    return [zero_check(defence.name, used)]


def zero_check(defence: str, gradient: Tensor) -> Check:
    """The share of zeros in a gradient."""
    zeros = (gradient == 0).double().mean().item()
    meaning = "The gradient vanishes in places; an attack on logits or margins may do better."
    return Check(defence, ZEROS, zeros, 0.1, at_most(zeros, 0.1), meaning)


def health(model: DefendedClassifier, images: Tensor) -> Health:
    """A quick check of the defence's score model on clean images."""
    purifier = model.purifier
    return purifier.score_model.check(purifier.resized(images[:HEALTH_IMAGES]), HEALTH_IMAGES, HEALTH_LEVELS)


def health_checks(defence: str, found: Health) -> list[Check]:
    """Whether the score network denoises, and whether it should be read otherwise than it is declared."""
    error = "denoising error of the score network, in units of trivial denoisers'"
    gain = "share of the denoising error that another reading of the score network takes off"
    return [
        Check(defence, error, found.error, LIMIT, found.error <= LIMIT, found.sentence),
        Check(defence, gain, found.gain, MARGIN, found.gain <= MARGIN, found.sentence),
    ]


def black_box_check(recorded: Recorded, few: Samples, seed: int) -> list[Check]:
    """How much lower the best black-box attack brings the accuracy than the best white-box attack.

    Random noise is no attack. A purifier without a black-box attack fails; a model without randomness, for which it
    costs little, meets Square on ``few`` samples.
    """
    defence = recorded.defence.name
    attacks = [a for a in recorded.defence.attacks if not isinstance(a, RandomNoise)]
    black, white = [a for a in attacks if a.black_box], [a for a in attacks if not a.black_box]
    name = "accuracy that black-box attacks take beyond white-box ones"
    meaning = "A black-box attack beats all white-box ones: their gradient is masked."
    plain = not isinstance(recorded.defence.model, DefendedClassifier)
    if white and not black and plain and white[0].norm not in Square.threats:
        return []  # nobody has a black-box attack in that threat model
    if white and not black and plain:
        best, square = recorded.strongest(white), Square(white[0].norm, white[0].eps, queries=QUERIES)
        gain = recorded.accuracy(best, few) - accuracy(recorded.defence, square, few, seed)
        return [Check(defence, f"{name} ({len(few)} samples)", gain, 0.0, at_most(gain, 0.0), meaning)]
    if not black or not white:
        missing, other = ("black-box", "transfer or square") if white else ("white-box", "pgd-eot, with a gradient")
        meaning = f"No {missing} attack was run; add {other}."
        return [Check(defence, name, None, 0.0, False, meaning)]
    gain = recorded.accuracy(recorded.strongest(white)) - recorded.accuracy(recorded.strongest(black))
    return [Check(defence, name, gain, 0.0, at_most(gain, 0.0), meaning)]


def inexact_check(defence: str, found: Sequence[tuple[type[Attack], float]], engine_exact: bool = True) -> list[Check]:
    """How much lower the best attack with an inexact gradient brings the accuracy than the best with the exact one.

    ``found``: kind of each attack on ``defence`` and the accuracy that it left; ``engine_exact``: whether the run's own
    gradient is. No check where no gradient is inexact.
    """
    white = [(kind.exact_gradient and engine_exact, left) for kind, left in found if not kind.black_box]
    exact, inexact = [left for e, left in white if e], [left for e, left in white if not e]
    if not inexact:
        return []
    if not exact:
        return [Check(defence, INEXACT, None, LOST, False, "No attack with the exact gradient was run; add pgd-eot.")]
    gain = min(exact) - min(inexact)
    meaning = (
        "The exact gradient is a poor guide here; the worst case counts the better attack, but a still better one may "
        "exist."
    )
    return [Check(defence, INEXACT, gain, LOST, at_most(gain, LOST), meaning)]


def _to_converge(defence: Defence, recorded: Recorded | None) -> Attack | None:
    """The strongest attack whose effort can be doubled; without records the first one. None: there is none."""
    attacks = [a for a in defence.attacks if a.doubled() and not a.black_box]
    return recorded.strongest(attacks) if recorded and attacks else next(iter(attacks), None)


def _stronger(attack: Attack, defence: Defence) -> dict[str, Attack]:
    """The attack with twice the effort, by what is doubled; twice the draws only where they differ."""
    return {what: better for what, better in attack.doubled().items() if what != DRAWS or defence.draws > 1}


def convergence_checks(
    defence: Defence,
    samples: Samples,
    seed: int,
    recorded: Recorded | None = None,
    max_rows: int = 2048,
    bar: Progress | None = None,
) -> list[Check]:
    """How much lower the strongest attack brings a few samples with twice the steps, draws or calls.

    Without records the first one counts as the strongest.
    """
    name = "accuracy lost with twice the {} ({} samples)"
    attack, bar = _to_converge(defence, recorded), bar or Progress(0, shown=False)
    if attack is None:
        meaning = "No attack was run whose steps can be doubled; add pgd-eot."
        return [Check(defence.name, name.format("steps", len(samples)), None, LOST, False, meaning)]

    def found(attack: Attack) -> float:
        with bar.work(defence, weight(defence, attack) * len(samples)):
            return accuracy(defence, attack, samples, seed, max_rows)

    before = recorded.accuracy(attack, samples) if recorded else found(attack)
    checks = []
    for what, better in _stronger(attack, defence).items():
        lost = before - found(better)
        meaning = f"{attack.label} has not converged: twice the {what} lower the accuracy further."
        checks.append(Check(defence.name, name.format(what, len(samples)), lost, LOST, at_most(lost, LOST), meaning))
    return checks


def accuracy(defence: Defence, attack: Attack, samples: Samples, seed: int, max_rows: int = 2048) -> float:
    """Mean over the judges' draws, as the runner would find it."""
    attack_seed = derive_seed(seed, "attack")
    found = attack(defence.attacked, samples.images, samples.labels, sample_ids=samples.ids, seed=attack_seed)
    judged = judge(defence, found.images, samples.ids, seed, max_rows)
    return share_right(judged.predictions.cpu().numpy(), samples)


def share_right(predicted: np.ndarray, samples: Samples) -> float:
    """Share of predictions (N, R) that are right."""
    return float(np.mean(predicted == samples.labels.cpu().numpy()[:, None]))
