"""In-loop evaluation: every iterate of an attack is submitted, and one wrong answer is enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from purify.attacks.base import Attack
from purify.diffusion.noise import derive_seed
from purify.diffusion.precision import FLOAT32
from purify.evaluate.metrics import estimate
from purify.evaluate.protocols.base import Attacked, Effort, Found, Line, Protocol, Stage, purified_logits
from purify.evaluate.runner import CLEAN, Defence, Samples, counted, stage_name
from purify.purification.calls import calls

AT_ONCE = 8  # more answers to a clean image, until one is wrong


class InLoop(Protocol):
    """Broken if any of N answers to any iterate of the attack is wrong, beside clean images asked as often.

    After the worst case of Kassis et al. 2024 (arXiv 2411.16598). N are the draws behind each gradient: they are new
    at every iterate, so the attack's own forward passes are the submissions, and cost nothing more. Of the run's
    attacks it is the strongest one that counts them (PGD and its kin; the adaptive attack's, on the whole process). An
    attack in another precision counted answers that are not the defence's, and is run again in the one that is judged.
    The control asks the unattacked image as often, or until an answer is wrong: what it loses is lost to the defence's
    noise, without any attacker.
    """

    name = "in-loop"

    def climbs(self, averages: Sequence[int]) -> bool:
        return True

    def check(self, defence: Defence) -> None:
        if not submitting(defence):
            raise ValueError(
                f"The protocol in-loop needs an attack that climbs the model's own margin, and {defence.name} meets "
                "none; add pgd-eot or adaptive to --attacks."
            )

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        attack, own = strongest(attacked), calls(attacked.model)
        again = 0.0 if _known(attacked, _counts(attacked, attack)) else attack.network_calls(attacked.model)
        yield Stage(stage(attack), again, lambda batch: self._submit(attacked, attack, batch))
        asked = int(_asked(attacked, attack).max())
        more = max(asked - attacked.defence.draws, 0)
        yield Stage(control(asked), more * own.forward, lambda batch: self._control(attacked, asked, batch))

    def planned(self, defence: Defence, effort: Effort) -> float:
        attacks = submitting(defence)
        asked = max(attack.answers(defence.model) for attack in attacks)
        again = 0.0 if defence.precision == FLOAT32 else max(attack.network_calls(defence.model) for attack in attacks)
        return again + max(asked - defence.draws, 0) * calls(defence.model).forward

    def lines(self, attacked: Attacked) -> list[Line]:
        attack = strongest(attacked)
        asked = _asked(attacked, attack)
        most, least = int(asked.max()), int(asked.min())
        held = attacked.answered(stage(attack)).all(1)
        answers = attacked.answered(control(most))
        clean = np.array([right[:n].all() for right, n in zip(answers, asked, strict=True)])
        count = f"{most}" if most == least else f"{least} to {most}"
        often = f"{attack.eot} times" if hasattr(attack, "eot") else "as often as it draws"
        return [
            Line(
                self.name,
                f"right in all {count} answers to the iterates of {attack.label}",
                estimate(held.astype(float)),
                estimate(clean.astype(float)),
                attacked.calls(stage(attack), control(most)),
                f"submits every iterate {often}; one wrong answer is enough",
            )
        ]

    def _submit(self, attacked: Attacked, attack: Attack, batch: Samples) -> Found:
        """What the run's attack counted, or counts when it is run again: see :func:`_known`."""
        found = _counts(attacked, attack, batch)
        spent = 0.0
        if not _known(attacked, found):
            seed = derive_seed(attacked.seed, "attack")  # the run's
            again = attack(attacked.model, batch.images, batch.labels, sample_ids=batch.ids, seed=seed)
            found, spent = [counted(again, i) for i in range(len(batch))], attack.network_calls(attacked.model)
        wrong = torch.tensor([record["submitted_wrong"] for record in found])
        survivors = torch.where(wrong == 0, batch.labels.cpu(), -1)
        more = [{name: record[name] for name in ("submitted", "submitted_wrong")} for record in found]
        return Found(survivors[:, None], spent, more=more)

    def _control(self, attacked: Attacked, asked: int, batch: Samples) -> Found:
        """Answers to the clean images, -1 after the first wrong ones: the run's judges gave the first answers."""
        records = [attacked.run.get(attacked.defence.name, CLEAN, int(i)) for i in batch.ids]
        known = torch.tensor([r["predictions"] for r in records])[:, :asked]
        found = torch.full((len(batch), asked), -1)
        found[:, : known.shape[1]] = known
        labels, spent = batch.labels.cpu()[:, None], torch.zeros(len(batch))
        for first in range(known.shape[1], asked, AT_ONCE):
            left = (found[:, :first] == labels).all(1).nonzero()[:, 0]
            if len(left) == 0:
                break
            part, rows = range(first, min(first + AT_ONCE, asked)), batch[left]
            logits = purified_logits(
                attacked.model, rows.images, rows.ids, part, attacked.judge_seed, attacked.effort.max_rows
            )
            found[left, first : part.stop] = logits.argmax(2).cpu()
            spent[left] += len(part) * calls(attacked.model).forward
        return Found(found, spent)


def submitting(defence: Defence) -> list[Attack]:
    """The defence's attacks that count the answers to their iterates."""
    return [attack for attack in defence.attacks if attack.answers(defence.model)]


def strongest(attacked: Attacked) -> Attack:
    """Of these the one that left least."""
    return attacked.strongest(submitting(attacked.defence))


def stage(attack: Attack) -> str:
    """How records call what an attack submitted."""
    return f"in-loop {stage_name(attack)}"


def control(asked: int) -> str:
    """How records call the clean images that were asked so often."""
    return f"in-loop {CLEAN} x {asked}"


def _counts(attacked: Attacked, attack: Attack, samples: Samples | None = None) -> list[dict[str, Any]]:
    """The run's records of an attack."""
    samples = attacked.samples if samples is None else samples
    return [attacked.run.get(attacked.defence.name, stage_name(attack), int(i)) for i in samples.ids]


def _known(attacked: Attacked, found: list[dict[str, Any]]) -> bool:
    """Whether these records of an attack count answers of the model that is judged; runs of old did not count."""
    return attacked.defence.precision == FLOAT32 and all("submitted" in record for record in found)


def _asked(attacked: Attacked, attack: Attack) -> np.ndarray:
    """Answers to the iterates of each sample, (N,): attacks that stop early ask less."""
    return np.array([record["submitted"] for record in attacked.records(stage(attack))])
