"""The two ends of a run: the folder that describes it, and what its records come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from purify.attacks import PGD
from purify.attacks.threats import stated as stated_threat
from purify.evaluate import report
from purify.evaluate.progress import Progress
from purify.evaluate.protocols import shown
from purify.evaluate.protocols.measure import Measured
from purify.evaluate.provenance import environment, fingerprint_of_samples
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, results, worst_only_results
from purify.evaluate.selfchecks import Check, checks_work, self_checks
from purify.purification.defended import DefendedClassifier
from purify.purification.overshoot import warn_overshoot

OVERSHOT = 4  # images on which guidance is looked at


def run_config(
    defences: Sequence[Defence],
    samples: Samples,
    dataset: str,
    seed: int = 0,
    batch_size: int = 64,
    worst_only: str | None = None,
) -> dict[str, Any]:
    """What decides the results of a run, as plain data: the config of its folder."""
    return {
        "dataset": dataset,
        "data": fingerprint_of_samples(samples),
        "n_examples": len(samples),
        "seed": seed,
        "batch_size": batch_size,
        "worst_only": worst_only,
        "defences": {d.name: d.described() for d in defences},
        "attacks": {d.name: [a.budget() for a in d.attacks] for d in defences},
    }


def open_run(path: str | Path, config: dict[str, Any], samples: Samples, command: str = "from Python") -> RunFolder:
    """The folder of a run that :func:`run_config` described; raises as :class:`RunFolder`."""
    ranks = Ranks()
    return RunFolder(Path(path), config, environment(samples.images.device, command, ranks), ranks)


@dataclass(frozen=True)
class Finished:
    """What a run came to.

    Attributes:
        results: by defence, then by stage (``clean``, each attack, ``worst case``), then by criterion: an Estimate.
        checks: the self-checks of all defences.
        verdict: the worst case of each defence, in words.
        file: result.json.
        protocols: what the protocols that were asked for came to, by purified defence.
    """

    results: dict[str, dict[str, Any]]
    checks: list[Check]
    verdict: str
    file: Path
    protocols: Mapping[str, Measured] = field(default_factory=dict)


def finish(
    folder: RunFolder,
    defences: Sequence[Defence],
    samples: Samples,
    budget: Mapping[str, Any] | None = None,
    max_rows: int = 256,
    progress: bool = True,
    protocols: Mapping[str, Measured] = MappingProxyType({}),
) -> Finished:
    """Accuracies and self-checks of a run whose records are complete, and its result.json, which stands alone.

    Args:
        folder, defences, samples: as they were evaluated.
        budget: what the attacks were allowed, by name; default: that of the attacks themselves.
        max_rows: images times draws in the model at once.
        progress: whether a bar shows the self-checks.
        protocols: what other protocols came to, by defence; see :mod:`purify.evaluate.protocols`.
    """
    config, file = folder.config, folder.path / "result.json"
    criterion, seed = config["worst_only"], config["seed"]
    if criterion:
        found: dict[str, dict[str, Any]] = worst_only_results(folder, defences, samples, criterion)
    else:
        found = results(folder, defences, samples)
    attack = defences[0].attacks[0]
    data = f"{len(samples)} images of {config['dataset']}"
    verdict = report.verdict(
        found, defences, stated_threat(attack.norm, attack.eps, " eps "), data, criterion or "mean"
    )
    stated = dict(budget or own_budget(defences))
    context = {"verdict": verdict, "config": config, "budget": stated, "sessions": folder.sessions}
    if protocols:
        context["protocols"] = shown.plain(protocols)
    if not report.is_complete(file):  # the checks may take long, or fail
        report.write_result(file, found, defences, context)
    checks: list[Check] = []
    total = sum(checks_work(folder, d, samples, criterion is None) for d in defences)
    with Progress(total, progress) as bar:
        for d in defences:
            bar.stage(f"self-checks, {d.name}")
            if isinstance(d.model, DefendedClassifier):
                warn_overshoot(d.model.purifier, samples.images[:OVERSHOT], seed)
            checks += self_checks(folder, d, samples, seed, criterion is None, max_rows, bar)
    report.write_result(file, found, defences, {**context, "self_checks": [plain(check) for check in checks]})
    return Finished(found, checks, verdict, file, protocols)


def own_budget(defences: Sequence[Defence]) -> dict[str, Any]:
    """The budget of the PGD attacks that are least: what a leaderboard judges a run by."""
    own = [a for d in defences if d.draws > 1 for a in d.attacks if isinstance(a, PGD)]
    return {
        "preset": "own",
        "steps": min((a.steps for a in own), default=0),
        "eot": min((a.eot for a in own if not a.black_box), default=0),
    }


def plain(check: Check) -> dict[str, Any]:
    """A self-check as result.json has it: what a failure means, only where it failed."""
    return {**dataclasses.asdict(check), "meaning": None if check.passed else check.meaning}
