"""In-loop evaluation: every iterate of an attack is submitted, and one wrong answer is enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from purify.attacks.base import Attack
from purify.attacks.pgd import PGD
from purify.diffusion.noise import derive_seed
from purify.evaluate.metrics import estimate
from purify.evaluate.protocols.base import Attacked, Effort, Found, Line, Protocol, Stage, purified_logits
from purify.evaluate.runner import CLEAN, Defence, Samples, counted, stage_name
from purify.purification.calls import calls


class InLoop(Protocol):
    """Broken if any of N answers to any iterate of the attack is wrong, beside clean images asked as often.

    After the worst case of Kassis et al. 2024 (arXiv 2411.16598). N are the draws behind each gradient: they are new
    at every iterate, so the attack's own forward passes are the submissions, and cost nothing more. Of the run's
    attacks it is the strongest PGD attack. The control asks the unattacked image as often: what it loses is lost to the
    defence's noise, without any attacker.
    """

    name = "in-loop"

    def check(self, defence: Defence) -> None:
        if not submitting(defence):
            raise ValueError(
                f"The protocol in-loop needs an attack that climbs the model's own margin, and {defence.name} meets "
                "none; add pgd-eot to --attacks."
            )

    def stages(self, attacked: Attacked) -> Iterator[Stage]:
        attack, own = self._attack(attacked), calls(attacked.model)
        forgotten = any("submitted" not in r for r in self._run_records(attacked, attack))
        again = attack.gradients * own.gradient + attack.forwards * own.forward
        yield Stage(stage(attack), again if forgotten else 0, lambda batch: self._submit(attacked, attack, batch))
        asked = _evaluations(attack)
        more = max(asked - attacked.defence.draws, 0)
        yield Stage(control(asked), more * own.forward, lambda batch: self._control(attacked, asked, batch))

    def planned(self, defence: Defence, effort: Effort) -> float:
        asked = max(_evaluations(attack) for attack in submitting(defence))
        return max(asked - defence.draws, 0) * calls(defence.model).forward

    def lines(self, attacked: Attacked) -> list[Line]:
        attack = self._attack(attacked)
        asked = _evaluations(attack)
        held, clean = (attacked.answered(s).all(1).astype(float) for s in (stage(attack), control(asked)))
        words = f"right in all {asked} answers, to every iterate of {attack.label} {attack.eot}"
        assumes = f"submits every iterate {attack.eot} times; one wrong answer is enough"
        spent = attacked.calls(stage(attack), control(asked))
        return [Line(self.name, words, estimate(held), estimate(clean), spent, assumes)]

    def _attack(self, attacked: Attacked) -> PGD:
        found = attacked.strongest(submitting(attacked.defence))
        assert isinstance(found, PGD)
        return found

    def _run_records(self, attacked: Attacked, attack: Attack) -> list[dict[str, object]]:
        return [attacked.run.get(attacked.defence.name, stage_name(attack), int(i)) for i in attacked.samples.ids]

    def _submit(self, attacked: Attacked, attack: PGD, batch: Samples) -> Found:
        """What the run's attack counted; runs of old did not count, and have it run again."""
        found = [attacked.run.get(attacked.defence.name, stage_name(attack), int(i)) for i in batch.ids]
        spent = 0.0
        if any("submitted" not in record for record in found):
            seed = derive_seed(attacked.seed, "attack")
            again = attack(attacked.model, batch.images, batch.labels, sample_ids=batch.ids, seed=seed)
            found, own = [counted(again, i) for i in range(len(batch))], calls(attacked.model)
            spent = attack.gradients * own.gradient + attack.forwards * own.forward
        wrong = torch.tensor([record["submitted_wrong"] for record in found])
        survivors = torch.where(wrong == 0, batch.labels.cpu(), -1)
        more = [{name: record[name] for name in ("submitted", "submitted_wrong")} for record in found]
        return Found(survivors[:, None], spent, more=more)

    def _control(self, attacked: Attacked, asked: int, batch: Samples) -> Found:
        """Answers to the clean images: the run's judges gave the first ones."""
        records = [attacked.run.get(attacked.defence.name, CLEAN, int(i)) for i in batch.ids]
        known = torch.tensor([r["predictions"] for r in records])[:, :asked]
        rest = range(known.shape[1], asked)
        if len(rest) == 0:
            return Found(known, 0.0)
        logits = purified_logits(
            attacked.model, batch.images, batch.ids, rest, attacked.judge_seed, attacked.effort.max_rows
        )
        return Found(torch.cat([known, logits.argmax(2).cpu()], 1), len(rest) * calls(attacked.model).forward)


def submitting(defence: Defence) -> list[PGD]:
    """The defence's attacks that count the answers to their iterates."""
    return [attack for attack in defence.attacks if isinstance(attack, PGD) and attack.submits]


def stage(attack: Attack) -> str:
    """How records call what an attack submitted."""
    return f"in-loop {stage_name(attack)}"


def control(asked: int) -> str:
    """How records call the clean images that were asked so often."""
    return f"in-loop {CLEAN} x {asked}"


def _evaluations(attack: PGD) -> int:
    """Answers to all iterates of one image."""
    return attack.restarts * (attack.steps + 1) * attack.eot
