"""``purify list``: what there is by name, one line each with its source."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from purify import registry, zoo
from purify.attacks import ATTACKS
from purify.attacks import PUBLISHED as PUBLISHED_ATTACKS
from purify.checkpoints.public import PUBLIC
from purify.checks import choose
from purify.cli.parsing import Parser
from purify.cli.shell import guarded
from purify.data import DATASETS
from purify.diffusion.reverse import REVERSE_RULES
from purify.evaluate.protocols import PROTOCOLS
from purify.evaluate.recipes import RECIPES
from purify.presets import PURIFIERS
from purify.purification.levels import LEVELS
from purify.purification.plans import PLANS, FixedDt
from purify.settings import SETTINGS

Lines = Iterable[tuple[str, str]]


def first_sentences(registry: Mapping[str, Any]) -> Lines:
    """Each name with the first line of its docstring."""
    return ((name, (part.__doc__ or "").strip().splitlines()[0]) for name, part in registry.items())


def models() -> Lines:
    """Embedded classifiers; RobustBench's are named, not listed."""
    for name in zoo.names("classifier"):
        entry = zoo.describe(name)
        yield name, f"{entry['dataset']}, embedded; made by `purify train {name}`"
    yield "(RobustBench)", "every model of RobustBench by its name, with --dataset cifar10, cifar100 or imagenet"
    yield "(your own)", "file.py:function"


def score_models() -> Lines:
    """Embedded and public score networks."""
    for name in zoo.names("score"):
        yield name, f"{zoo.describe(name)['dataset']}, embedded; made by `purify train {name}`"
    yield from ((name, f"{entry.about}; {entry.page}") for name, entry in PUBLIC.items())
    yield "(your own)", "a checkpoint's path, or file.py:function"


def purifiers() -> Lines:
    """Presets, with their settings on each data set."""
    yield from first_sentences(PURIFIERS)
    for (purifier, dataset), s in SETTINGS.items():
        if purifier:
            steps = f"{s.steps} steps" if isinstance(s.steps, int) else named(registry.describe(s.steps, PLANS))
            steps = f"{s.steps.dt} per step" if isinstance(s.steps, FixedDt) else steps
            rule = s.reverse if isinstance(s.reverse, str) else named(registry.describe(s.reverse, REVERSE_RULES))
            own = "".join(f", {key} {value}" for key, value in s.own.items())
            yield f"  {purifier} on {dataset or 'other data'}", f"t* {s.t_star:g}, {steps}, {rule}{own} ({s.source})"


def named(part: Mapping[str, Any]) -> str:
    """A part's config in words: its name, then its parameters."""
    given = (f"{key} {value}" for key, value in part.items() if key != "kind" and value is not None)
    return " ".join([part["kind"], *given])


def datasets() -> Lines:
    """Data sets with their shape and usual radii."""
    for name, d in DATASETS.items():
        radii = ", ".join(f"{norm} {eps:.4g}" for norm, eps in d.eps.items())
        yield name, f"{' x '.join(map(str, d.shape))}, {d.num_classes} classes; {radii}"


KINDS: dict[str, Callable[[], Lines]] = {
    "models": models,
    "score-models": score_models,
    "purifiers": purifiers,
    "levels": lambda: first_sentences(LEVELS),
    "attacks": lambda: first_sentences(ATTACKS | PUBLISHED_ATTACKS),
    "protocols": lambda: first_sentences({name: type(protocol) for name, protocol in PROTOCOLS.items()}),
    "recipes": lambda: ((name, recipe.about) for name, recipe in RECIPES.items()),
    "datasets": datasets,
}


def parser(prog: str = "purify list") -> Parser:
    """All options."""
    p = Parser(prog=prog, description="What there is by name, one line each with its source.")
    p.add_argument("kinds", nargs="*", help=f"{', '.join(KINDS)} (none: all)")
    return p


def run(args: argparse.Namespace, command: str) -> int:
    """Print the lists."""
    chosen = {kind: choose(kind, KINDS, "kind of list") for kind in args.kinds or KINDS}
    for kind, lines in chosen.items():
        found = list(lines())
        width = max(len(name) for name, _ in found)
        print(f"{kind}:", *(f"  {name:{width}}  {text}" for name, text in found), "", sep="\n")
    return 0


def main(argv: list[str] | None = None, prog: str = "purify list") -> int:
    """List; returns the exit status."""
    return guarded(parser(prog), run, argv)
