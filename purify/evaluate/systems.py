"""From a description of certificates to certifiers, and their run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from purify import zoo
from purify.certify import (
    DSSN,
    SSN,
    Anytime,
    Cascade,
    Certifier,
    Draws,
    Smooth,
    denoised_smoothing,
    dense_smoothing,
    to_grid,
)
from purify.checkpoints import default_score_model
from purify.checks import check_count, check_unique, choose
from purify.data import Dataset
from purify.diffusion.precision import FLOAT32
from purify.diffusion.reverse import REVERSE_RULES
from purify.evaluate.attacking import RECORD, begin, folder_path, known_classes, load_samples, open_folder
from purify.evaluate.budgets import DRAWS
from purify.evaluate.certification import (
    Inside,
    Summary,
    System,
    attacked,
    both,
    certify_all,
    check_systems,
    in_linf,
    summarize,
)
from purify.evaluate.description import Certification
from purify.evaluate.drawtimes import DrawCost, estimate
from purify.evaluate.provenance import environment, fingerprint_of_samples
from purify.evaluate.ranks import Ranks
from purify.evaluate.records import SCHEMA, RunFolder, check_folder, write_json
from purify.evaluate.runner import Samples, share_out
from purify.named import fingerprint, load_classifier, load_score
from purify.options import flags, options
from purify.plugin import is_in_file

RADII = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)  # L2
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # L1: of lambda, which no radius can exceed by more than half a level

# Options that only some methods read.
STEPPED = ("few-step", "densepure")  # several reverse steps for each noisy image
GAUSSIAN = ("cohen", "multiscale", *STEPPED)
DRAWN = (*GAUSSIAN, "ssn")
READ_BY = {
    "sigma": GAUSSIAN,
    "score_model": GAUSSIAN,
    "precision": GAUSSIAN,
    "p0": ("multiscale",),
    "mode": ("multiscale",),
    "votes": ("densepure",),
    "reverse_steps": STEPPED,
    "reverse": STEPPED,
    "lam": ("ssn", "dssn"),
    "selection_draws": DRAWN,
    "draws": DRAWN,
    "alpha": DRAWN,
    "sampling": DRAWN,
}


@dataclass(frozen=True)
class Order:
    """A description with what was looked up for it.

    Attributes:
        asked: the description.
        known: the built-in data set whose networks it gets; "" if none.
        device: where everything runs.
        draws, inside: the budget of certificates, and of the attacks inside their radii.
    """

    asked: Certification
    known: str
    device: torch.device
    draws: Draws
    inside: Inside


def build_budget(c: Certification) -> tuple[Draws, Inside, int]:
    """The named budget with the user's changes: draws, the cross-check, samples."""
    asked = (c.selection_draws, c.draws, c.n_examples, c.attack_examples)
    n0, n, samples, attacked = (u if a is None else a for a, u in zip(asked, DRAWS[c.budget], strict=True))
    check_count(samples, "n-examples")
    return Draws(n0, n, c.alpha), Inside(attacked, c.attack_steps, c.eot), samples


def check_meant(c: Certification) -> None:
    """Raise ValueError if an option was changed that no method of this run reads."""
    for field in options(type(c)):
        readers = READ_BY.get(field.name, c.method)
        default = None if field.default is MISSING else field.default
        if getattr(c, field.name) != default and not set(readers) & set(c.method):
            raise ValueError(
                f"{flags(field)[0]} says nothing about {', '.join(c.method)}; it is for {', '.join(readers)}."
            )


@dataclass(frozen=True)
class Denoised:
    """The smoothed classifiers behind one denoiser, one per sigma; what tells them from others; and their networks."""

    scales: tuple[Smooth, ...]
    suffix: str
    networks: dict[str, Any]


def gaussian(order: Order, build: Callable[..., Smooth] = denoised_smoothing) -> list[Denoised]:
    """One entry for each denoiser; ``build`` puts it before the classifier."""
    c, known = order.asked, order.known
    standard = f"{known}-standard"
    default = standard if standard in zoo.names("classifier") else "Standard"
    classifier = any_classifier(c.model or default, known, "L2").to(order.device)
    names = c.score_model or (default_score_model(known),)
    found = []
    for name in names:
        networks, suffix = {"classifier": fingerprint(classifier)}, f", {short(name)}" if len(names) > 1 else ""
        if name == "none":
            if c.precision != FLOAT32:
                raise ValueError(f"--precision {c.precision} is the denoiser's; there is none with --score-model none.")
            scales = [Smooth(classifier, s, max_rows=c.max_rows) for s in c.sigma]
        else:
            score = load_score(name, known).to(order.device)
            networks["score_model"] = score.fingerprint()
            if c.precision != FLOAT32:
                score = score.with_precision(c.precision)
                networks["precision"] = c.precision
            scales = [build(classifier, score, s, max_rows=c.max_rows) for s in c.sigma]
        found.append(Denoised(tuple(scales), suffix, networks))
    return found


def short(name: str) -> str:
    """How a table calls a denoiser: its file's name, or file.function."""
    path, _, function = name.rpartition(":") if is_in_file(name) else (name, "", "")
    return ".".join(part for part in (Path(path).stem, function) if part)


def cohen(order: Order) -> list[System]:
    """Smoothing at each sigma by itself."""
    return [
        System(f"cohen {s.sigma:g}{d.suffix}", s, order.draws, order.inside, {**s.config(), **d.networks})
        for d in gaussian(order)
        for s in d.scales
    ]


def multiscale(order: Order) -> list[System]:
    """The cascade over all sigmas."""
    systems = []
    for d in gaussian(order):
        cascade = Cascade(d.scales, order.asked.p0, order.asked.mode)
        config = {**cascade.config(), **d.networks}
        systems.append(System(f"multiscale{d.suffix}", cascade, order.draws, order.inside, config))
    return systems


def few_step(order: Order) -> list[System]:
    """One reverse process of a few steps instead of one step, at each sigma by itself."""
    c = order.asked
    steps, reverse = 2 if c.reverse_steps is None else c.reverse_steps, c.reverse or "ddim"
    return stepped(order, "few-step", {"steps": steps, "reverse": reverse}, 1, steps, reverse)


def densepure(order: Order) -> list[System]:
    """The vote over reverse processes, at each sigma by itself."""
    c = order.asked
    steps = 5 if c.reverse_steps is None else c.reverse_steps
    size = {"votes": c.votes, "steps": steps, **({"reverse": c.reverse} if c.reverse not in (None, "ddpm") else {})}
    return stepped(order, "densepure", size, c.votes, steps, c.reverse or "ddpm")


def stepped(order: Order, method: str, size: Mapping[str, Any], votes: int, steps: int, reverse: str) -> list[System]:
    """Smoothing of ``votes`` reverse processes; ``size`` is what a manifest says of them."""
    if "none" in (order.asked.score_model or ()):
        advice = "name a --score-model, or leave it out"
        raise ValueError(f"{method} takes reverse steps of a diffusion model; {advice}.")
    build = partial(dense_smoothing, votes=votes, steps=steps, rule=REVERSE_RULES[reverse]())
    return [
        System(f"{method} {s.sigma:g}{d.suffix}", s, order.draws, order.inside, {**s.config(), **size, **d.networks})
        for d in gaussian(order, build)
        for s in d.scales
    ]


def splitting(kind: type[SSN] | type[DSSN]) -> Callable[[Order], list[System]]:
    """SSN or DSSN, over a classifier trained for it."""
    name = kind.__name__.lower()

    def build(order: Order) -> list[System]:
        c = order.asked
        model = c.model or f"{order.known}-{name}"
        classifier = any_classifier(model, order.known, "L1").to(order.device)
        lam = c.lam if c.lam is not None else trained_lam(model)
        certifier: Certifier = kind(classifier, lam, max_rows=c.max_rows)
        config = {**certifier.config(), "classifier": fingerprint(classifier)}
        return [System(name, certifier, order.draws, order.inside, config)]

    return build


METHODS: dict[str, Callable[[Order], list[System]]] = {
    "cohen": cohen,
    "multiscale": multiscale,
    "few-step": few_step,
    "densepure": densepure,
    "ssn": splitting(SSN),
    "dssn": splitting(DSSN),
}


def any_classifier(name: str, known: str, norm: str) -> nn.Module:
    """A classifier by any of the names that --model takes."""
    if name in (f"{known}-ssn", f"{known}-dssn") and name not in zoo.names("classifier"):
        raise ValueError(
            f"There is no embedded {name}; pass --model, or train one with `purify train {name}` and pass "
            f"--model runs/train/{name}.safetensors."
        )
    return load_classifier(name, known, norm)


def trained_lam(model: str) -> float:
    """The lambda of a classifier that purify trained on splitting noise."""
    known = model.endswith(".safetensors") or model in zoo.names("classifier")
    lam = zoo.describe(model).get("loss", {}).get("lam") if known else None
    if lam is None:
        raise ValueError(f"{model} does not say for which lambda it was trained; pass --lam.")
    return float(lam)


def build_systems(order: Order) -> list[System]:
    """The certifiers by name.

    Raises:
        ValueError: unknown methods, options that no method reads, two systems of one name.
    """
    c = order.asked
    builders = [choose(method, METHODS, "method") for method in c.method]
    if c.model and len({method in GAUSSIAN for method in c.method}) > 1:
        raise ValueError("One --model cannot serve Gaussian and splitting noise; run these methods one by one.")
    check_meant(c)
    systems = [system for build in builders for system in build(order)]
    advice = "name each method and sigma once, and give each denoiser a file name of its own"
    check_unique([s.name for s in systems], "systems", advice)
    return systems


def build_radii(c: Certification, systems: Sequence[System]) -> dict[str, list[float]]:
    """Radii of the table of each norm."""
    found: dict[str, list[float]] = {}
    for norm in {s.certifier.norm for s in systems}:
        if c.radii is not None:
            found[norm] = list(c.radii)
        elif norm == "L1":
            lam = max(s.config["lam"] for s in systems if s.certifier.norm == norm)
            found[norm] = [share * lam for share in SHARES]
        else:
            found[norm] = list(RADII)
        check_radii("--radii", found[norm])
    return found


def check_radii(name: str, radii: Sequence[float]) -> None:
    """Raise ValueError unless all radii are numbers of at least 0."""
    if not all(math.isfinite(r) and r >= 0 for r in radii):
        raise ValueError(f"{name} takes numbers of at least 0, got {', '.join(map(str, radii))}.")


def set_sampling(systems: Sequence[System], sampling: str, radii: Mapping[str, Sequence[float]]) -> list[System]:
    """The systems with draws that are fixed, or stop for each image once the radii of their norm are settled.

    Raises:
        ValueError: no image can get any of these radii, or any at all.
    """
    if sampling == "anytime":
        anytime = {norm: Anytime(tuple(values)) for norm, values in radii.items()}
        systems = [replace(s, draws=replace(s.draws, stop=anytime[s.certifier.norm])) for s in systems]
    for s in systems:
        s.certifier.reachable(s.draws)  # says so
    return list(systems)


@dataclass(frozen=True)
class Ready:
    """Certificates of which everything is built and checked, and nothing drawn yet.

    Attributes:
        order: the description with what was looked up for it.
        data: the data set.
        systems: what certifies.
        radii: of the table, by norm.
        samples: what is certified.
        ranks: this process among those of the run.
    """

    order: Order
    data: Dataset
    systems: list[System]
    radii: dict[str, list[float]]
    samples: Samples
    ranks: Ranks

    @property
    def drawn(self) -> bool:
        """Whether the answer depends on draws: of DSSN it does not."""
        return any(s.certifier.drawn for s in self.systems)

    @property
    def config(self) -> dict[str, Any]:
        """What decides its results."""
        c = self.order.asked
        return {
            "dataset": c.dataset,
            "data": fingerprint_of_samples(self.samples),
            "n_examples": len(self.samples),
            "seed": c.seed,
            "batch_size": c.batch_size,
            "systems": {
                s.name: {**s.config, "draws": asdict(s.draws), "attack": asdict(s.attack)} for s in self.systems
            },
            **c.code(),
        }

    def dry_run(self) -> dict[str, DrawCost]:
        """What each system would take.

        Raises:
            ValueError: the folder holds another run, or a system cannot take its rows.
        """
        c = self.order.asked
        if c.out is not None:
            check_folder(folder_path(c, "", self.config), self.config)
        return {s.name: estimate(s, self.samples) for s in self.systems}

    def own(self) -> Samples:
        """The samples of the shard that was asked for, all if none was; warns of shards without any."""
        c = self.order.asked
        return share_out(self.samples, c.batch_size, Ranks(), c.part)

    def seconds(self, costs: Mapping[str, DrawCost], own: Samples) -> float:
        """What certificates and attacks of ``own`` take at most; of all samples only the first ones are attacked."""
        inside = {s.name: len(both(own, attacked(self.samples, s))) for s in self.systems}
        return sum(len(own) * costs[name].image + inside[name] * costs[name].attack for name in costs)

    def open(self, command: str) -> RunFolder:
        """The run's folder, which says that ``command`` made it."""
        c = self.order.asked
        name = f"{c.title}-certified-{'-'.join(c.method)}-{c.budget}"
        session = environment(self.order.device, command, self.ranks)
        needed = RECORD * len(self.samples) * sum(len(s.stages()) for s in self.systems)
        return open_folder(c, name, self.config, session, self.ranks, needed)

    def certify(self, folder: RunFolder) -> None:
        """Certify and attack what the folder does not hold."""
        c = self.order.asked
        certify_all(folder, self.systems, self.samples, c.seed, c.batch_size, shard=c.part)

    def finish(self, folder: RunFolder) -> dict[str, Summary]:
        """Sum up a folder that is complete, by system, and write its result.json."""
        found = {s.name: summarize(folder, s, self.samples, self.radii[s.certifier.norm]) for s in self.systems}
        body = {s.name: {"norm": s.certifier.norm, **summed(found[s.name])} for s in self.systems}
        for name, summary in self.linf(found).items():
            body[name]["Linf"] = {k: v for k, v in summed(summary).items() if k in ("radii", "certified", "acr")}
        context = {"schema": SCHEMA, "config": folder.config, "preset": self.order.asked.budget}
        write_json(folder.path / "result.json", {**context, "sessions": folder.sessions, "results": body})
        return found

    def linf(self, found: Mapping[str, Summary]) -> dict[str, Summary]:
        """What the certificates say in L_inf at the radii asked for; nothing if none were."""
        radii, d = self.order.asked.linf_radii, self.samples.images[0].numel()
        if radii is None:
            return {}
        return {s.name: in_linf(found[s.name], s.certifier.norm, d, radii) for s in self.systems}


def summed(summary: Summary) -> dict[str, Any]:
    """A summary for result.json, without what the records hold."""
    return {k: v for k, v in asdict(summary).items() if k != "correct"}


def prepare(asked: Certification) -> Ready:
    """Look up and build all that a certification names.

    Raises:
        ValueError: unknown names, missing files, or parts that do not fit together.
    """
    data, ranks, device = begin(asked)
    draws, inside, n = build_budget(asked)
    order = Order(asked, asked.known(data), device, draws, inside)
    systems = build_systems(order)
    radii = build_radii(asked, systems)
    check_radii("--linf-radii", asked.linf_radii or ())
    systems = set_sampling(systems, asked.sampling, radii)
    samples = load_samples(asked, data, n, device)
    if any(s.certifier.norm == "L1" for s in systems):
        samples = replace(samples, images=to_grid(samples.images))
    check_systems(systems, samples, known_classes(asked, data))
    return Ready(order, data, systems, radii, samples, ranks)
