"""Certify systems sample by sample, attack inside the certified radii, and sum up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from purify.attacks import PGD
from purify.attacks.base import num_classes
from purify.attacks.norms import BALLS
from purify.certify.base import ABSTAIN, Certifier
from purify.certify.metrics import abstentions, certified_accuracy, correct_radii, linf_share
from purify.certify.sampling import Draws
from purify.checks import check_count, check_images, check_labels, check_unique
from purify.diffusion.noise import derive_seed
from purify.diffusion.precision import FLOAT32
from purify.evaluate.differentiable import is_differentiable
from purify.evaluate.metrics import Estimate, bounded, wilson
from purify.evaluate.plausible import check_classes
from purify.evaluate.ranks import Shard
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Samples, batches, share_out
from purify.evaluate.steady import check_steady

CERTIFICATE = "certificate"
CHECK_DRAWS = 1000  # draws that judge an image attacked inside its radius, at most


@dataclass(frozen=True)
class Inside:
    """PGD inside the certified radius, towards any other class, on each noisy model of the system in turn.

    Attributes:
        samples: how many samples are attacked, the first ones.
        steps, eot: of PGD.
    """

    samples: int = 16
    steps: int = 20
    eot: int = 16

    def __post_init__(self) -> None:
        check_count(self.samples, "attacked samples", 0)
        check_count(self.steps, "attack steps")
        check_count(self.eot, "EOT draws")


@dataclass(frozen=True)
class System:
    """A certifier under test.

    Attributes:
        name: how records and tables call it.
        certifier: the certifier.
        draws: its budget.
        attack: the empirical cross-check.
        config: plain data that describes the certifier and its networks.
    """

    name: str
    certifier: Certifier
    draws: Draws
    attack: Inside
    config: dict[str, Any]

    @property
    def precision(self) -> str:
        """Of the denoiser: another one is another function, with other certificates."""
        return str(self.config.get("precision", FLOAT32))

    def stages(self) -> list[str]:
        """What is recorded: the certificates, then an attack on each noisy model."""
        models = self.certifier.noisy_models() if self.attack.samples else {}
        return [CERTIFICATE, *(attack_name(model) for model in models)]


def attack_name(model: str) -> str:
    """How records call the attack on a noisy model."""
    return f"pgd inside, {model}"


def certify_all(
    folder: RunFolder,
    systems: Sequence[System],
    samples: Samples,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    shard: Shard | None = None,
) -> None:
    """Certify and attack what the folder does not hold yet, writing each sample as its batch finishes.

    Args:
        folder: where records go; finished (system, stage, sample) triples are skipped.
        systems: what is certified.
        samples: images in [0, 1] with labels and ids.
        seed: keys all randomness together with sample ids.
        batch_size: samples certified at once: those whose ids have the same quotient by it, so that not even rounding
            depends on what was done before a kill, or by which process.
        progress: whether a bar is shown.
        shard: the part of the samples that is certified here; None: all.

    Raises:
        ValueError: bad images or labels, or two images of one id, before anything runs.
    """
    check_systems(systems, samples)
    check_count(batch_size, "batch size")
    check_unique([s.name for s in systems], "systems", "give each a name of its own")
    own = share_out(samples, batch_size, folder.ranks, shard)
    parts = {s.name: both(own, attacked(samples, s)) for s in systems}
    total = sum(len(own) + (len(s.stages()) - 1) * len(parts[s.name]) for s in systems)
    shown = progress and folder.ranks.first
    with tqdm(total=total, unit="sample", disable=not shown, mininterval=0.5) as bar:
        for system in systems:
            for stage in system.stages():
                bar.set_description(f"{system.name}, {stage}")
                chosen = own if stage == CERTIFICATE else parts[system.name]
                run(folder, system, stage, chosen, seed, batch_size, bar)
    folder.merge()


def check_systems(systems: Sequence[System], samples: Samples, classes: int | None = None) -> None:
    """Raise ValueError unless the classifiers can take the samples one by one and know their labels and ``classes``."""
    check_images(samples.images)
    check_unique(samples.ids.tolist(), "images", "give every image an id of its own")
    for system in systems:
        for noisy in system.certifier.noisy_models().values():
            k = num_classes(noisy.classifier, samples.images, samples.ids, 0, system.name)
            check_classes(system.name, k, classes)
            check_labels(samples.labels, len(samples), k)
            check_steady(system.name, noisy.classifier, samples.images, samples.ids)
            if system.attack.samples and not is_differentiable(noisy.classifier, samples.images, system.name):
                raise ValueError(
                    f"{system.name} leaves autograd (numpy, ONNX, detach or no_grad inside), so nothing can be "
                    "attacked inside its radius; certify it with --attack-examples 0."
                )


def attacked(samples: Samples, system: System) -> Samples:
    """The samples that the cross-check attacks."""
    return samples[torch.arange(min(system.attack.samples, len(samples)))]


def both(some: Samples, others: Samples) -> Samples:
    """Those of ``some`` that are among the others."""
    return some[torch.isin(some.ids, others.ids)]


def run(folder: RunFolder, system: System, stage: str, samples: Samples, seed: int, batch_size: int, bar: tqdm) -> None:
    """One stage of one system: what is not on disk yet.

    Groups of samples are the same in all stages, so that a process attacks those that it has certified.
    """
    done = torch.tensor([(system.name, stage, int(i)) in folder for i in samples.ids], dtype=torch.bool)
    bar.update(int(done.sum()))
    for rows in batches(samples.ids, batch_size):
        wanted = rows[~done[rows]]
        if not len(wanted):
            continue
        if stage == CERTIFICATE:
            found = {record["sample"]: record for record in certificates(system, samples[rows], seed)}
        for row in wanted:
            sample = int(samples.ids[row])
            if stage == CERTIFICATE:
                folder.append(found[sample])
            else:
                certificate = folder.get(system.name, CERTIFICATE, sample)
                folder.append(*attack(system, stage, samples[row[None]], certificate, seed))
            bar.update(1)


def certificates(system: System, batch: Samples, seed: int) -> Iterator[dict[str, Any]]:
    """The records of a batch's certificates."""
    start = time.perf_counter()
    found = system.certifier.certify(batch.images, system.draws, sample_ids=batch.ids, seed=seed)
    seconds = (time.perf_counter() - start) / len(batch)
    for i, sample in enumerate(batch.ids.tolist()):
        yield {
            "defence": system.name,
            "attack": CERTIFICATE,
            "sample": sample,
            "label": int(batch.labels[i]),
            "predictions": [int(found.classes[i])],
            "radius": float(found.radii[i]),
            "counts": found.counts[i].tolist(),
            "draws": int(found.draws[i]),
            "selected": int(found.selected[i]),
            **({} if found.hits is None else {"hits": found.hits[i][found.hits[i] >= 0].tolist()}),
            **({} if found.stages is None else {"stage": int(found.stages[i])}),
            **({"passed": found.passed[i]} if found.passed and found.passed[i] else {}),
            **({} if system.precision == FLOAT32 else {"precision": system.precision}),
            "seconds": round(seconds, 4),
        }


def attack(
    system: System, stage: str, one: Samples, certificate: dict[str, Any], seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """PGD inside the radius of one sample's certificate, and the system's answer to what it found.

    The loss is that of the certified class, right or wrong. Where there is no radius, nothing is attacked.
    """
    (model,) = (m for name, m in system.certifier.noisy_models().items() if attack_name(name) == stage)
    certified, radius, image = certificate["predictions"][0], certificate["radius"], one.images
    answer = certified
    if certified != ABSTAIN and radius > 0:
        pgd = PGD(system.certifier.norm, radius * (1 - 1e-6), steps=system.attack.steps, eot=system.attack.eot)
        target = torch.full_like(one.labels, certified)
        attack_seed = derive_seed(seed, "inside", stage)
        image = pgd(model, one.images, target, sample_ids=one.ids, seed=attack_seed).images
        image = system.certifier.covered(image, one.images, radius)
        draws = replace(system.draws, n=min(system.draws.n, CHECK_DRAWS), stop=None)
        found = system.certifier.certify(image, draws, sample_ids=one.ids, seed=derive_seed(seed, "check"))
        answer = int(found.classes[0])
    record = {
        "defence": system.name,
        "attack": stage,
        "sample": int(one.ids[0]),
        "label": int(one.labels[0]),
        "predictions": [answer],
        "certified": certified,
        "radius": radius,
        "distance": float(BALLS[system.certifier.norm].distance((image - one.images).double())[0]),
        "refuted": answer not in (certified, ABSTAIN),
    }
    return record, image[0].cpu().numpy()


def estimates(correct: np.ndarray, radii: Sequence[float] | np.ndarray) -> list[Estimate]:
    """Certified accuracy at each radius, with Wilson's 95 % intervals; ``correct`` (N,) as in a Summary."""
    n = len(correct)
    return [wilson(round(float(share) * n), n) for share in certified_accuracy(correct, radii)]


def mean_radius(correct: np.ndarray) -> Estimate:
    """Average certified radius with its interval."""
    return bounded(np.maximum(correct, 0), 0.0, np.inf, spread=max(float(correct.max()), 0.0))


@dataclass(frozen=True)
class Summary:
    """What a system's certificates are worth, over N samples.

    Attributes:
        radii, certified: certified accuracy at each radius, with Wilson's 95 % intervals.
        acr: average certified radius, with its interval (:func:`purify.evaluate.metrics.bounded`).
        abstained: share without an answer.
        draws: mean noisy images classified per sample.
        attacked, refuted, unsure: attacks inside a certificate's radius, how many of them changed the answer, and how
            many left none, which says nothing.
        correct: radius of each sample, -1 where wrong or abstained.
    """

    radii: list[float]
    certified: list[Estimate]
    acr: Estimate
    abstained: Estimate
    draws: float
    attacked: int
    refuted: int
    unsure: int
    correct: np.ndarray


def in_linf(summary: Summary, norm: str, dimension: int, radii: Sequence[float]) -> Summary:
    """What a summary's certificates say in L_inf, at other radii; ``dimension``: values of an image.

    Every image within eps of another in L_inf is within eps sqrt(d) of it in L2, and within eps d in L1.
    """
    correct = np.where(summary.correct > 0, summary.correct * linf_share(norm, dimension), summary.correct)
    certified = estimates(correct, radii)
    return replace(summary, radii=list(radii), certified=certified, acr=mean_radius(correct), correct=correct)


def summarize(folder: RunFolder, system: System, samples: Samples, radii: Sequence[float]) -> Summary:
    """Sum up a finished system.

    Raises:
        ValueError: a record does not belong to these samples.
    """
    records = [folder.get(system.name, CERTIFICATE, int(i)) for i in samples.ids]
    labels = samples.labels.cpu().numpy()
    for record, label in zip(records, labels, strict=True):
        if record["label"] != label or "radius" not in record:
            what = f"sample {record['sample']} ({system.name})"
            raise ValueError(f"The record of {what} in {folder.path} was changed by hand; remove its line.")
        if record.get("precision", FLOAT32) != system.precision:
            was = record.get("precision", FLOAT32)
            raise ValueError(
                f"Sample {record['sample']} was certified with a denoiser of {was}, and {system.name} has one of "
                f"{system.precision}, which is another function; remove its line to have it certified."
            )
    stages, ids = system.stages()[1:], attacked(samples, system).ids.tolist()
    return sum_up(records, [folder.get(system.name, stage, i) for stage in stages for i in ids], radii)


def sum_up(
    certificates: Sequence[dict[str, Any]], attacks: Sequence[dict[str, Any]], radii: Sequence[float]
) -> Summary:
    """Sum up the records of a system's certificates, and of the attacks inside their radii."""
    classes = np.array([r["predictions"][0] for r in certificates])
    labels = np.array([r["label"] for r in certificates])
    correct, n = correct_radii(classes, np.array([r["radius"] for r in certificates]), labels), len(certificates)
    return Summary(
        radii=list(radii),
        certified=estimates(correct, radii),
        acr=mean_radius(correct),
        abstained=wilson(round(abstentions(classes) * n), n),
        draws=float(np.mean([r["draws"] for r in certificates])),
        attacked=sum(r["certified"] != ABSTAIN and r["radius"] > 0 for r in attacks),
        refuted=sum(r["refuted"] for r in attacks),
        unsure=sum(r["certified"] != ABSTAIN and r["predictions"][0] == ABSTAIN for r in attacks),
        correct=correct,
    )
