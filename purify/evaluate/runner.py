"""Attack defences sample by sample and judge the results on fresh purifications."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purify.attacks.base import Attack, AttackResult, keyed, num_classes
from purify.attacks.norms import BALLS
from purify.attacks.protocols import HasDetails
from purify.attacks.threats import THREATS
from purify.checks import check_count, check_images, check_labels, check_unique, choose, has, short
from purify.diffusion.noise import derive_seed
from purify.diffusion.precision import FLOAT32, PRECISIONS
from purify.evaluate.metrics import CRITERIA, Estimate, aimed_success, summarize, worst_case
from purify.evaluate.plausible import check_classes
from purify.evaluate.progress import Progress, weight
from purify.evaluate.ranks import Ranks, Shard
from purify.evaluate.records import RunFolder
from purify.evaluate.steady import check_steady
from purify.memory import Parts
from purify.purification.defended import DefendedClassifier
from purify.purification.outcomes import Trace

CLEAN = "clean"
UNDEFENDED = "undefended"  # what a run calls the classifier in its defences by itself
WORST_ONLY = ("any_of_r", "majority")  # criteria whose worst case needs no attack on samples that failed


@dataclass(frozen=True)
class Defence:
    """A model under test.

    Attributes:
        name: how records and tables call it.
        model: images in [0, 1] to logits.
        attacks: attacks to run on it.
        draws: purifications R that judge each image; 1 for a deterministic model.
        config: plain data that describes the model.
        precision: in which attacks see a purified model, one of ``PRECISIONS``; judges see ``model`` itself.
    """

    name: str
    model: nn.Module
    attacks: Sequence[Attack]
    draws: int
    config: dict[str, Any]
    precision: str = FLOAT32

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"The model of {self.name} must be a torch.nn.Module, got {short(self.model)}.")
        in_precision(self.model, self.precision)
        if not isinstance(self.attacks, Sequence) or not all(isinstance(a, Attack) for a in self.attacks):
            given = short(self.attacks)
            raise ValueError(f"attacks on {self.name} must be a list, as [PGD('Linf', 8 / 255)], got {given}.")
        check_count(self.draws, "judge draws")
        check_unique(map(stage_name, self.stages()), f"attacks on {self.name}", "name each once")

    @property
    def attacked(self) -> nn.Module:
        """The model as attacks see it."""
        return in_precision(self.model, self.precision)

    def described(self) -> dict[str, Any]:
        """What decides its results, apart from its attacks; of the precision, only where it is not the usual one."""
        precision = {} if self.precision == FLOAT32 else {"precision": self.precision}
        return {**self.config, "draws": self.draws, **precision}

    def stages(self) -> list[Attack | None]:
        """What is judged: the clean images (None), then each attack."""
        return [None, *self.attacks]


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """A purified model in this precision, any other as it is; raises as ``DefendedClassifier.with_precision``."""
    choose(precision, PRECISIONS, "precision")
    if precision == FLOAT32 or not isinstance(model, DefendedClassifier):
        return model
    return model.with_precision(precision)


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W), labels (N,) and their ids (N,) in the data set."""

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        parts = (self.images, self.labels, self.ids)
        if not all(isinstance(p, Tensor) for p in parts) or len({len(p) for p in parts}) > 1:
            given = ", ".join(map(short, parts))
            raise ValueError(f"Samples are tensors of images (N, C, H, W), labels (N,) and ids (N,), got {given}.")

    def __getitem__(self, rows: Tensor) -> Samples:
        return Samples(self.images[rows], self.labels[rows], self.ids[rows])

    def __len__(self) -> int:
        return len(self.ids)


def stage_name(attack: Attack | None) -> str:
    """``clean``, or the attack's label."""
    return CLEAN if attack is None else attack.label


def evaluate(
    folder: RunFolder,
    defences: Sequence[Defence],
    samples: Samples,
    seed: int = 0,
    batch_size: int = 128,
    max_rows: int = 2048,
    progress: bool = True,
    worst_only: str | None = None,
    shard: Shard | None = None,
) -> int:
    """Attack and judge what the folder does not hold yet, writing each sample as its batch finishes.

    Returns how many records this process added.

    Args:
        folder: where records go; finished (defence, attack, sample) triples are skipped.
        defences: models with their attacks.
        samples: what to attack.
        seed: keys all randomness together with sample ids; attacks and judges use different seeds derived from it.
        batch_size: samples attacked at once: those whose ids have the same quotient by it. So a sample always has the
            same batch-mates, and not even rounding depends on what was done before a kill, or by which process.
        max_rows: samples times draws judged at once.
        worst_only: one of ``WORST_ONLY`` if only the worst case under this criterion is asked for: a sample that fails
            it meets no further attack. (For the mean the draws that judge would also decide who is spared.)
        shard: the part of the samples that is attacked here; None: all.

    Raises:
        ValueError: bad images, two of one id, or labels that some model does not know, before anything runs.
    """
    check_together(defences, samples, seed)
    check_count(batch_size, "batch size")
    if worst_only is not None:
        choose(worst_only, dict.fromkeys(WORST_ONLY), "criterion")
    samples = share_out(samples, unit_of(defences, batch_size), folder.ranks, shard)
    total = sum(weight(d, a) for d in defences for a in d.stages()) * len(samples)
    before = len(folder)
    with Progress(total, progress and folder.ranks.first) as bar:
        for defence in defences:
            for attack in defence.stages():
                run = _Stage(folder, defence, attack, seed, max_rows, worst_only)
                run(samples, batch_size, bar)
    new = len(folder) - before
    folder.merge()
    return new


def check_together(defences: Sequence[Defence], samples: Samples, seed: int = 0, classes: int | None = None) -> None:
    """Raise ValueError unless the models can take the samples one by one, know their labels, and all names differ.

    Also where a threat model cannot measure the images.

    ``classes``: of the data; a model of fewer is refused, one of more gets a warning.
    """
    check_images(samples.images)
    check_unique(samples.ids.tolist(), "images", "give every image an id of its own")
    check_unique([d.name for d in defences], "defences", "give each a name of its own")
    for defence in defences:
        k = num_classes(defence.model, samples.images, samples.ids, seed, defence.name)
        check_classes(defence.name, k, classes)
        check_labels(samples.labels, len(samples), k)
        if k is not None:
            for attack in defence.attacks:
                attack.check_classes(k)
        for norm in dict.fromkeys(attack.norm for attack in defence.attacks):
            THREATS[norm].check(samples.images)
        check_steady(defence.name, defence.model, samples.images, samples.ids, seed)


@dataclass(frozen=True)
class _Stage:
    """One attack (or none) on one defence."""

    folder: RunFolder
    defence: Defence
    attack: Attack | None
    seed: int
    max_rows: int
    worst_only: str | None

    @property
    def name(self) -> str:
        return stage_name(self.attack)

    def __call__(self, samples: Samples, batch_size: int, bar: Progress) -> None:
        ids = samples.ids.tolist()
        done = torch.tensor([(self.defence.name, self.name, i) in self.folder for i in ids], dtype=torch.bool)
        left = torch.tensor([not self._broken(i) for i in ids], dtype=torch.bool)
        each = weight(self.defence, self.attack)
        bar.stage(f"{self.defence.name}, {self.name}")
        bar.skip(each * int((done | ~left).sum()))
        right, finished = 0.0, 0
        group = self.attack.group_size if self.attack else None
        for rows in batches(samples.ids, group or batch_size):
            rows = rows if group else rows[left[rows]]  # a library's randomness is that of its whole group
            wanted = left[rows] & ~done[rows]
            if not bool(wanted.any()):
                continue
            with bar.work(self.defence, each * int(wanted.sum())):
                for record in self._batch(samples[rows], wanted):
                    right += float(np.mean(np.array(record["predictions"]) == record["label"]))
                    finished += 1
            bar.accuracy(right / max(finished, 1))

    def _broken(self, sample: int) -> bool:
        """Whether an earlier stage settled the worst case of this sample, if that is all that is asked for."""
        if self.worst_only is None:
            return False
        earlier = itertools.takewhile(lambda name: name != self.name, map(stage_name, self.defence.stages()))
        return breaking(self.folder, self.defence, list(earlier), sample, self.worst_only) is not None

    def _batch(self, batch: Samples, wanted: Tensor) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        adversarial, loss, found = batch.images, torch.full((len(batch),), float("nan")), None
        if self.attack is not None:
            model, attack_seed = self.defence.attacked, derive_seed(self.seed, "attack")
            found = self.attack(model, batch.images, batch.labels, sample_ids=batch.ids, seed=attack_seed)
            adversarial, loss = found.images, found.loss
        judged = judge(self.defence, adversarial, batch.ids, self.seed, self.max_rows)
        seconds = (time.perf_counter() - start) / len(batch)
        distances = {n: ball.distance(adversarial - batch.images).tolist() for n, ball in BALLS.items()}
        for i in wanted.nonzero()[:, 0].tolist():
            record = {
                "defence": self.defence.name,
                "attack": self.name,
                "sample": int(batch.ids[i]),
                "label": int(batch.labels[i]),
                "predictions": judged.predictions[i].tolist(),
                **{n: values[i] for n, values in distances.items()},
                **judged.extras(i),
                "loss": None if torch.isnan(loss[i]) else float(loss[i]),
                **({} if found is None else {**measured(found, i), **counted(found, i)}),
                "seconds": round(seconds, 4),
            }
            image = None if self.attack is None else adversarial[i].cpu().numpy()
            self.folder.append(record, image)
            yield record


def measured(found: AttackResult, i: int) -> dict[str, float]:
    """How far sample i was taken, as threat models beyond l_p measure it."""
    return {name: float(values[i]) for name, values in (found.sizes or {}).items()}


def counted(found: AttackResult, i: int) -> dict[str, int]:
    """What an attack counted on sample i: its network calls, the answers to its iterates, those that were wrong."""
    calls = {} if found.calls is None else {"calls": int(found.calls[i])}
    if found.submitted is None:
        return calls
    return {**calls, "submitted": int(found.submitted.asked[i]), "submitted_wrong": int(found.submitted.wrong[i])}


@dataclass(frozen=True)
class Judgement:
    """Predictions (N, R), and means (N,) over them of what purifications were like, by their names in records."""

    predictions: Tensor
    means: dict[str, Tensor]

    def extras(self, i: int) -> dict[str, float]:
        """What a record says about sample i beyond its predictions."""
        return {name: round(float(v[i]), 6) for name, v in self.means.items()}


@torch.no_grad()
def judge(defence: Defence, images: Tensor, ids: Tensor, seed: int, max_rows: int = 2048) -> Judgement:
    """The model's answers on draws that no attack has seen: their seed is the judges' own.

    Raises:
        ValueError: it answers NaN, infinity, or the same for all classes, which is no class.
    """
    seed = derive_seed(seed, "judge")
    n, draws = len(images), defence.draws
    ids = ids.to(images.device)

    def ask(part: Tensor) -> tuple[Tensor, Trace | None]:
        return answer(defence.model, images[part // draws], ids[part // draws], part % draws, seed, defence.name)

    rows = torch.arange(n * draws, device=images.device)
    answers = [found for _, found in Parts(max_rows).of(rows, ask)]
    predictions = torch.cat([logits.argmax(1) for logits, _ in answers]).reshape(n, draws)
    values = means([trace for _, trace in answers if trace is not None])
    return Judgement(predictions, {name: v.reshape(n, draws).mean(1) for name, v in values.items()})


def answer(
    model: nn.Module, images: Tensor, ids: Tensor, draws: Tensor, seed: int, name: str
) -> tuple[Tensor, Trace | None]:
    """Logits of any model, with the trace of the purifications behind them if it has any."""
    if has(model, HasDetails):
        details = model.details(images, sample_ids=ids, draw=draws, seed=seed)
        return details.logits, details
    return keyed(model, seed, name)(images, ids, draws), None


def means(traces: Sequence[Trace]) -> dict[str, Tensor]:
    """Noise levels and network calls of each answer; an adaptive solver does not announce the latter."""
    if not traces:
        return {}
    calls = [trace.network_calls.double() for trace in traces if trace.network_calls is not None]
    levels = {"t_star": torch.cat([trace.t_star.mean(1) for trace in traces])}
    return {**levels, "network_calls": torch.cat(calls)} if calls else levels


def unit_of(defences: Sequence[Defence], batch_size: int) -> int:
    """How many ids stay together when samples are shared out: whole batches, and whole groups of attacks with any."""
    return math.lcm(batch_size, *(a.group_size for d in defences for a in d.attacks if a.group_size))


def share_out(samples: Samples, unit: int, ranks: Ranks, shard: Shard | None = None) -> Samples:
    """What this process attacks of its shard; rank 0 warns if there are more processes than units."""
    shard = shard or Shard(1, 1)
    processes = shard.count * ranks.world
    idle = processes - len((samples.ids // unit).unique())
    if ranks.first and idle > 0:
        warnings.warn(
            f"{idle} of {processes} processes have nothing to do, because samples are shared out by {unit}; lower "
            "--batch-size (AutoAttack's attacks go by 32 at least).",
            stacklevel=3,
        )
    own = samples[share(samples.ids, unit, shard.number - 1, shard.count)]
    return own[share(own.ids, unit, ranks.rank, ranks.world)]


def share(ids: Tensor, unit: int, index: int, count: int) -> Tensor:
    """Row indices of the samples of part ``index`` of ``count``: units of ids (id // unit) in turn."""
    units = ids // unit
    own = [units == u for position, u in enumerate(units.unique()) if position % count == index]
    return torch.stack(own).any(0).nonzero()[:, 0] if own else torch.empty(0, dtype=torch.int64)


def batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    """Row indices by groups of ids (id // size)."""
    groups = ids // size
    for group in groups.unique():
        yield (groups == group).nonzero()[:, 0]


def breaking(
    folder: RunFolder, defence: Defence, stages: Sequence[str], sample: int, criterion: str
) -> dict[str, Any] | None:
    """The first record among ``stages`` under which the criterion is 0 for the sample; None if it holds so far."""
    for stage in stages:
        if (defence.name, stage, sample) in folder:
            record = folder.get(defence.name, stage, sample)
            if not CRITERIA[criterion](np.array([record["predictions"]]), np.array([record["label"]]))[0]:
                return record
    return None


def predictions(folder: RunFolder, defence: Defence, stage: str, samples: Samples) -> np.ndarray:
    """Predictions (N, R) of a finished stage.

    Raises:
        ValueError: a record does not belong to these samples and draws.
    """
    return _stack(folder, defence, samples, lambda i: folder.get(defence.name, stage, i))


def worst_only_predictions(
    folder: RunFolder, defence: Defence, stage: str, samples: Samples, criterion: str
) -> np.ndarray:
    """As :func:`predictions`; those that a broken sample would have had count as those that broke it."""
    stages = [stage_name(a) for a in defence.stages()]

    def record(i: int) -> dict[str, Any]:
        if (defence.name, stage, i) in folder:
            return folder.get(defence.name, stage, i)
        return breaking(folder, defence, stages, i, criterion) or folder.get(defence.name, stage, i)

    return _stack(folder, defence, samples, record)


def _stack(folder: RunFolder, defence: Defence, samples: Samples, find: Callable[[int], dict[str, Any]]) -> np.ndarray:
    rows = []
    for i, label in zip(samples.ids.tolist(), samples.labels.tolist(), strict=True):
        record = find(i)
        answers = record["predictions"]
        if record["label"] != label or len(answers) != defence.draws or min(answers) < 0:
            what = f"sample {i} ({defence.name}, {record['attack']})"
            raise ValueError(f"The record of {what} in {folder.path} was changed by hand; remove its line.")
        rows.append(answers)
    return np.array(rows)


def results(folder: RunFolder, defences: Sequence[Defence], samples: Samples) -> dict[str, dict[str, Any]]:
    """Accuracies per defence and stage, and the worst case per sample over all stages (a clean error counts).

    Of an attack at one class also how often it was answered, as ``targeted``.
    """
    labels = samples.labels.cpu().numpy()
    table: dict[str, dict[str, Any]] = {}
    for defence in defences:
        answers = {stage_name(a): predictions(folder, defence, stage_name(a), samples) for a in defence.stages()}
        table[defence.name] = {stage: summarize(p, labels) for stage, p in answers.items()}
        for attack in defence.attacks:
            if attack.wanted is not None and (found := aimed_success(answers[attack.label], labels, attack.wanted)):
                table[defence.name][attack.label]["targeted"] = found
        table[defence.name]["worst case"] = worst_case(list(answers.values()), labels)
    return table


def worst_only_results(
    folder: RunFolder, defences: Sequence[Defence], samples: Samples, criterion: str
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Clean accuracy and the worst case under the criterion, of a run that asked for nothing else."""
    labels = samples.labels.cpu().numpy()
    table = {}
    for d in defences:
        answers = [worst_only_predictions(folder, d, stage_name(a), samples, criterion) for a in d.stages()]
        rows = {CLEAN: summarize(answers[0], labels), "worst case": worst_case(answers, labels)}
        table[d.name] = {stage: {criterion: row[criterion]} for stage, row in rows.items()}
    return table
