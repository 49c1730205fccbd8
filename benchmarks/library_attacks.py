#!/usr/bin/env python
"""Our worst case beside other libraries' attacks: the same defended digits, images, steps, EOT draws and judge.

Ours are PGD+EOT and APGD+EOT, the worst of them for each image (cross-fitted), and the adaptive attack with the network
calls of one of them. Theirs are torchattacks' EOTPGD (with
the library's ratio of step size to eps, and with Madry's 2.5 eps / steps), AutoAttack's `rand` alone and Square alone,
and with the extra `interop` foolbox's PGD (with its EOT wrapper, without it, at its default step size) and ART's.
Prints accuracies and the paired differences, ours minus theirs, with 95 % intervals; writes records and result.json
below --out. The same command resumes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from purify import DefendedClassifier, diffpure, zoo
from purify.attacks import APGD, PGD, Adaptive, Attack, AttackResult, AutoAttackRand, Square
from purify.attacks.base import check_budget
from purify.checks import check_count
from purify.data import DATASETS, load_dataset
from purify.diffusion.noise import derive_seed
from purify.evaluate import Defence, Estimate, RunFolder, Samples, evaluate
from purify.evaluate.metrics import difference, estimate, mean_correct, worst_mean
from purify.evaluate.provenance import environment
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import write_json
from purify.evaluate.runner import CLEAN, predictions
from purify.machine import set_threads
from purify.named import fingerprint
from purify.purification.calls import calls

try:  # here, because they keep errors of their imports, and with these the frames of whoever imported them
    import foolbox
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    INTEROP = True
except ImportError:
    INTEROP = False

OURS = "our worst case"


@dataclass(frozen=True)
class Outside(Attack):
    """Another library's PGD in L_inf, under a seed of the batch's own: ``steps`` of length ``size``, the mean over
    ``eot`` draws in each."""

    steps: int
    eot: int
    size: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.steps, self.eot, 1)

    @property
    def label(self) -> str:
        return f"{self.name}-{self.eot}-{self.size:g}"

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(derive_seed(seed, *ids.tolist()))
            images = self.perturbed(model, x, y).clamp(0, 1)
        return AttackResult(images, torch.full((len(x),), float("nan"), device=x.device))

    @abstractmethod
    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What the library returns."""


@dataclass(frozen=True)
class TorchattacksPGD(Outside):
    """``torchattacks.EOTPGD``."""

    name: ClassVar[str] = "torchattacks"

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import torchattacks

        return torchattacks.EOTPGD(model, self.eps, self.size, self.steps, self.eot)(x, y)


@dataclass(frozen=True)
class FoolboxPGD(Outside):
    """foolbox's ``LinfPGD``, for ``eot`` > 1 behind its ``ExpectationOverTransformationWrapper``."""

    name: ClassVar[str] = "foolbox"

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        if self.eot > 1:
            wrapped = foolbox.models.ExpectationOverTransformationWrapper(wrapped, n_steps=self.eot)
        attack = foolbox.attacks.LinfPGD(steps=self.steps, abs_stepsize=self.size)
        return attack(wrapped, x, y, epsilons=self.eps)[1]


@dataclass(frozen=True)
class ArtPGD(Outside):
    """ART's ``ProjectedGradientDescent``; it averages nothing, ``eot`` is 1."""

    name: ClassVar[str] = "art"

    def perturbed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), shape, 10, clip_values=(0, 1), device_type="cpu")
        attack = ProjectedGradientDescent(
            wrapped, eps=self.eps, eps_step=self.size, max_iter=self.steps, batch_size=len(x), verbose=False
        )
        return torch.as_tensor(attack.generate(x.numpy(), torch.eye(10)[y].numpy()))


@dataclass(frozen=True)
class Row:
    """One line of the comparison; ``difference``: our worst case minus this attack's accuracy, paired by image;
    ``adaptive``: the same for the adaptive attack."""

    name: str
    accuracy: Estimate
    difference: Estimate | None = None
    adaptive: Estimate | None = None


def build_attacks(steps: int, eot: int, queries: int, gradient: int) -> tuple[list[Attack], list[Attack]]:
    """Ours, the adaptive one last, and theirs, at the same steps and EOT draws of ``gradient`` network calls each."""
    eps = DATASETS["digits"].eps["Linf"]
    ours: list[Attack] = [kind("Linf", eps, steps=steps, eot=eot, max_rows=256) for kind in (PGD, APGD)]
    ours.append(Adaptive("Linf", eps, calls=steps * eot * gradient, max_rows=256))
    theirs: list[Attack] = [
        TorchattacksPGD("Linf", eps, steps, eot, eps / 4),
        TorchattacksPGD("Linf", eps, steps, eot, 2.5 * eps / steps),
        AutoAttackRand("Linf", eps, steps=steps, eot=eot),
        Square("Linf", eps, queries=queries),
    ]
    if INTEROP:
        theirs += [
            FoolboxPGD("Linf", eps, steps, eot, eps / 4),
            FoolboxPGD("Linf", eps, steps, 1, eps / 4),
            FoolboxPGD("Linf", eps, steps, 1, eps / 30),  # its default
            ArtPGD("Linf", eps, steps, 1, eps / 4),
        ]
    return ours, theirs


def build_model(t_star: float) -> DefendedClassifier:
    """Digits behind DiffPure."""
    return DefendedClassifier(
        zoo.classifier("digits-standard"), diffpure(zoo.score_model("digits"), t_star, 10, "ddpm")
    )


def build_defence(model: DefendedClassifier, attacks: Sequence[Attack], draws: int) -> Defence:
    """The model with what is done to it."""
    prints = {"classifier": fingerprint(model.classifier), "score_model": model.purifier.score_model.fingerprint()}
    return Defence("diffpure", model, attacks, draws, {**model.config(), **prints})


def compare(
    folder: RunFolder, defence: Defence, samples: Samples, ours: Sequence[Attack], theirs: Sequence[Attack]
) -> list[Row]:
    """Accuracy of every stage, of our worst case, and how far it lies below each of theirs."""
    labels = samples.labels.numpy()

    def answers(stage: str) -> np.ndarray:
        return predictions(folder, defence, stage, samples)

    stages = [CLEAN, *(a.label for a in ours)]
    *_, adaptive = stages
    worst = worst_mean([answers(stage) == labels[:, None] for stage in stages if stage != adaptive])
    rows = [Row(stage, estimate(mean_correct(answers(stage), labels))) for stage in stages]
    rows.append(Row(OURS, estimate(worst)))
    for attack in theirs:
        right = mean_correct(answers(attack.label), labels)
        other = difference(mean_correct(answers(adaptive), labels), right)
        rows.append(Row(attack.label, estimate(right), difference(worst, right), other))
    return rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=96, help="test images (default: %(default)s)")
    p.add_argument("--t-star", type=float, default=0.18, help="DiffPure's noise level (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="gradient steps of every attack (default: %(default)s)")
    p.add_argument("--eot", type=int, default=10, help="draws per gradient of every attack (default: %(default)s)")
    p.add_argument("--queries", type=int, default=500, help="Square's queries (default: %(default)s)")
    p.add_argument("--judge-draws", type=int, default=20, help="fresh purifications per image (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="keys all randomness (default: 0)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/library-attacks"), help="folder (default: %(default)s)")
    return p


def run(args: argparse.Namespace, command: str) -> list[Row]:
    """Attack and judge what the folder does not hold yet, then compare."""
    set_threads(args.threads)
    check_count(args.samples, "samples")
    model = build_model(args.t_star)
    ours, theirs = build_attacks(args.steps, args.eot, args.queries, calls(model).gradient)
    images, labels = (t[: args.samples] for t in load_dataset("digits", "test"))
    samples = Samples(images, labels, torch.arange(len(labels)))
    defence = build_defence(model, [*ours, *theirs], args.judge_draws)
    config = {
        "defence": defence.config,
        "draws": defence.draws,
        "attacks": [a.budget() for a in defence.attacks],
        "samples": len(samples),
        "seed": args.seed,
    }
    with RunFolder(args.out, config, environment(torch.device("cpu"), command, Ranks())) as folder:
        evaluate(folder, [defence], samples, args.seed, batch_size=32)
        rows = compare(folder, defence, samples, ours, theirs)
    write_json(args.out / "result.json", {"config": config, "rows": [asdict(row) for row in rows]})
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows = run(args, shlex.join(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    heads = ("ours - theirs", "adaptive - theirs")
    table = {
        r.name: {"accuracy, %": r.accuracy, heads[0]: r.difference or "", heads[1]: r.adaptive or ""} for r in rows
    }
    print(pd.DataFrame.from_dict(table, orient="index").map(str).to_string())
    for row in rows:
        if row.difference is not None:
            print(f"{'ok  ' if row.difference.value <= 0 else 'MISS'} our worst case is at most {row.name}")
        if row.adaptive is not None:
            print(f"{'ok  ' if row.adaptive.value <= 0 else 'MISS'} adaptive is at most {row.name}")
    print(f"Wrote {args.out / 'result.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
