"""An evaluation, run: everything is built and checked first, then attacked, judged and reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from purify.attacks import Attack
from purify.checks import check_unique
from purify.data import DATASETS, Dataset
from purify.diffusion.health import Health
from purify.diffusion.precision import PRECISIONS
from purify.evaluate.build import Request, build_attacks, build_defences
from purify.evaluate.description import Attacking, Certification, Description, Evaluation
from purify.evaluate.differentiable import check_gradient
from purify.evaluate.dryrun import Cost, dry_run
from purify.evaluate.finish import Finished, finish, run_config
from purify.evaluate.plausible import check_clean
from purify.evaluate.precision import AUTO, check_compiler, choose_precision
from purify.evaluate.protocols import AVERAGES, Effort, Fresh
from purify.evaluate.protocols.measure import Measured, check_protocols, measure_protocols
from purify.evaluate.provenance import default_folder, environment
from purify.evaluate.ranks import Ranks, join
from purify.evaluate.records import RunFolder, check_folder, check_space, holds_run, writing
from purify.evaluate.runner import Defence, Samples, check_together, evaluate, share_out, unit_of
from purify.evaluate.selfchecks import health, is_compared
from purify.machine import set_threads
from purify.named import check_device
from purify.purification.defended import DefendedClassifier
from purify.sources import resolve_data
from purify.transforms import check_copies

RECORD = 512  # bytes of a record without its predictions


def begin(asked: Description) -> tuple[Dataset, Ranks, torch.device]:
    """Threads, processes and device of a run, and its data set."""
    set_threads(asked.threads)
    ranks, device = join(check_device(asked.device))
    return resolve_data(asked.dataset), ranks, device


def load_samples(asked: Description, data: Dataset, n: int, device: torch.device) -> Samples:
    """The first ``n`` test images with their positions as ids; of one's own data as many as there are, if fewer.

    Raises:
        ValueError: there are fewer images than were asked for.
    """
    images, labels = data.load("test", asked.data_dir)
    if asked.dataset not in DATASETS and asked.n_examples is None:
        n = min(n, len(images))
    if n > len(images):
        raise ValueError(f"{asked.dataset} has {len(images)} test images; --n-examples {n} is too many.")
    return Samples(images[:n].to(device), labels[:n].to(device), torch.arange(n))


def known_classes(asked: Description, data: Dataset) -> int | None:
    """Classes of a built-in data set; data of one's own may hold images of some only."""
    return data.num_classes if asked.dataset in DATASETS else None


def open_folder(
    asked: Attacking | Certification,
    name: str,
    config: dict[str, Any],
    session: dict[str, Any],
    ranks: Ranks,
    needed: int,
) -> RunFolder:
    """The run's folder, which may grow by ``needed`` bytes, with the ``run.yaml`` that repeats it.

    Raises:
        ValueError: the folder holds another run or has no room, or a new one's networks cannot be compiled here.
    """
    path = folder_path(asked, name, config)
    if ranks.first:
        check_folder(path, config)
        if not holds_run(path, config):  # one that ends elsewhere may be put together here
            check_compiler(asked.precision, torch.device(asked.device))
        check_space(path, needed)
    folder = RunFolder(path, config, session, ranks)
    if ranks.first:
        with writing(folder.path / "run.yaml") as partial:
            partial.write_text(asked.to_yaml())
    return folder


def folder_path(asked: Description, name: str, config: dict[str, Any]) -> Path:
    """Where a run goes: where it was told to, or below runs/; a shard of it to a folder in there."""
    whole = asked.out or default_folder(name, config)
    return whole / asked.part.folder if asked.part else whole


@dataclass(frozen=True)
class Prepared:
    """An evaluation of which everything is built and checked, and nothing attacked yet.

    Attributes:
        request: the description with its data set and device.
        attacks: all attacks by name.
        defences: undefended, purified, adversarially trained.
        samples: what is attacked.
        config: what decides the results.
        ranks: this process among those of the run.
        chosen: what ``--precision auto`` chose, in words, where it did.
    """

    request: Request[Evaluation]
    attacks: list[Attack]
    defences: list[Defence]
    samples: Samples
    config: dict[str, Any]
    ranks: Ranks
    chosen: str | None = None

    @property
    def stated(self) -> dict[str, Any]:
        """The budget as results state it."""
        return {"preset": self.request.asked.budget, **dataclasses.asdict(self.request.budget)}

    @property
    def bytes(self) -> int:
        """What records and adversarial images take on disk, about."""
        image = 4 * self.samples.images[0].numel() + 128
        records = [(image + RECORD + 4 * d.draws) * len(d.stages()) for d in self.defences]
        part = self.request.asked.part
        return len(self.samples) * sum(records) // (part.count if part else 1)

    def open(self, command: str) -> RunFolder:
        """The run's folder, which says that ``command`` made it; raises as :func:`open_folder`."""
        e = self.request.asked
        session = environment(self.request.device, command, self.ranks)
        return open_folder(e, folder_name(e), self.config, session, self.ranks, self.bytes)

    def attack(self, folder: RunFolder, progress: bool = True) -> int:
        """Attack and judge what the folder does not hold; returns how many records were added."""
        e = self.request.asked
        rows = self.request.max_rows
        return evaluate(folder, self.defences, self.samples, e.seed, e.batch_size, rows, progress, e.worst_only, e.part)

    @property
    def protocol_names(self) -> tuple[str, ...]:
        """The protocols that were asked for, beside fresh purifications; none if only these were."""
        others = [name for name in self.request.asked.protocol if name != Fresh.name]
        return (Fresh.name, *others) if others else ()

    @property
    def effort(self) -> Effort:
        """What protocols may spend."""
        e = self.request.asked
        return Effort(self.request.budget.steps, e.averages or AVERAGES, e.batch_size, self.request.max_rows)

    def protocols(self, folder: RunFolder, progress: bool = True) -> dict[str, Measured]:
        """What the protocols that were asked for come to, by purified defence, in a folder that is complete."""
        if not self.protocol_names:
            return {}
        return measure_protocols(folder, self.defences, self.samples, self.protocol_names, self.effort, progress)

    def finish(
        self, folder: RunFolder, progress: bool = True, protocols: Mapping[str, Measured] | None = None
    ) -> Finished:
        """Accuracies, self-checks and result.json of a folder that is complete, with what its protocols came to."""
        rows = self.request.max_rows
        return finish(folder, self.defences, self.samples, self.stated, rows, progress, protocols or {})

    def own(self) -> Samples:
        """The samples of the shard that was asked for, all if none was; warns of shards without any."""
        e = self.request.asked
        return share_out(self.samples, unit_of(self.defences, e.batch_size), Ranks(), e.part)

    def check_out(self) -> None:
        """Raise ValueError if the folder that was named holds another run."""
        e = self.request.asked
        if e.out is not None:
            check_folder(folder_path(e, "", self.config), self.config)

    def dry_run(self) -> dict[str, Cost]:
        """What each defence would take; raises as :meth:`check_out`."""
        e = self.request.asked
        self.check_out()
        return dry_run(self.defences, self.samples, e.batch_size, self.request.max_rows)

    def health(self) -> dict[str, Health]:
        """What a quick check of each score model finds, by the first defence that has it."""
        found: dict[int, tuple[str, DefendedClassifier]] = {}
        for d in self.defences:
            if isinstance(d.model, DefendedClassifier):
                found.setdefault(id(d.model.purifier.score_model), (d.name, d.model))
        return {name: health(model, self.samples.images) for name, model in found.values()}


def prepare(asked: Evaluation) -> Prepared:
    """Look up and build all that an evaluation names.

    Raises:
        ValueError: unknown names, missing files, or parts that do not fit together.
    """
    data, ranks, device = begin(asked)
    request = Request(asked, data, device)
    attacks = build_attacks(request)
    samples = load_samples(asked, data, request.budget.n_examples, device)
    defences = assemble(request, attacks, samples)
    check_protocols(asked.protocol, defences, samples.images, asked.averages or AVERAGES)
    check_answers(defences, samples)
    chosen = None
    if asked.precision == AUTO:
        name, chosen = settle_precision(request, defences, samples, ranks)
        request = dataclasses.replace(request, asked=asked.replace(precision=name))
        defences = in_precision(defences, name)
    return Prepared(request, attacks, defences, samples, configured(asked, defences, samples), ranks, chosen)


def assemble(request: Request[Any], attacks: list[Attack], samples: Samples) -> list[Defence]:
    """What the attacks of a description are run on.

    Raises:
        ValueError: parts that do not fit together, or models that cannot take the images.
    """
    defences = build_defences(request, attacks)
    check_unique([d.name for d in defences], "defences", "name each purifier and noise level once")
    check_together(defences, samples, request.asked.seed, known_classes(request.asked, request.data))
    return defences


def check_answers(defences: list[Defence], samples: Samples) -> None:
    """Raise ValueError where gradients that attacks take are not to be had, or not to be checked; warn of classifiers
    that guess."""
    for defence in defences:
        check_gradient(defence, samples.images)
        if is_compared(defence):
            check_copies(defence.model)
        if not isinstance(defence.model, DefendedClassifier):
            check_clean(defence.name, defence.model, samples.images, samples.labels, samples.ids)


def configured(asked: Evaluation, defences: list[Defence], samples: Samples) -> dict[str, Any]:
    """What decides the results."""
    config = run_config(defences, samples, asked.dataset, asked.seed, asked.batch_size, asked.worst_only)
    return config | asked.code()


def in_precision(defences: list[Defence], name: str) -> list[Defence]:
    """The defences with their purified models under attack in this precision."""
    purified = [isinstance(d.model, DefendedClassifier) for d in defences]
    return [dataclasses.replace(d, precision=name) if p else d for d, p in zip(defences, purified, strict=True)]


def settle_precision(
    request: Request[Evaluation], defences: list[Defence], samples: Samples, ranks: Ranks
) -> tuple[str, str]:
    """What ``auto`` comes to, and why: what a run that was begun has, or what the first process measures."""
    e = request.asked

    def begun(name: str) -> bool:
        try:
            config = configured(e, in_precision(defences, name), samples)
        except ValueError:  # not for these defences
            return False
        return holds_run(folder_path(e, folder_name(e), config), config)

    def settle() -> tuple[str, str]:
        for name in PRECISIONS:
            if begun(name):
                return name, f"attacks in {name}, as this run began"
        choice = choose_precision(defences, samples, e.batch_size, request.max_rows, e.seed)
        return choice.name, str(choice)

    return ranks.agree(settle)


def folder_name(asked: Attacking) -> str:
    """What a run's folder below runs/ begins with."""
    return f"{asked.title}-{'+'.join(map(_short, asked.purifier))}-{asked.budget}"


def _short(name: str) -> str:
    """A name as a folder can carry it: of ``file.py:function`` the last part."""
    return Path(name).name.replace(":", ".")
