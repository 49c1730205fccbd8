"""Train a network of the embedded default, or one like it: ``python -m purify.train NAME``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify import zoo
from purify.checks import check_writable, choose
from purify.cli.parsing import Parser, taking
from purify.cli.shell import guarded
from purify.data import DATASETS, load_dataset
from purify.diffusion.classes import classes_of
from purify.diffusion.schedule import ContinuousVP
from purify.diffusion.score import ScoreModel
from purify.machine import set_threads
from purify.networks.embedded import build_network
from purify.options import PATH, WHOLE
from purify.purification.classify import DiffusionClassifier
from purify.train.defences import PurifiedCrossEntropy
from purify.train.loop import train
from purify.train.losses import DiffusionCalibration, SplittingLoss
from purify.train.measure import (
    accuracy,
    measure_classifier,
    measure_denoised,
    measure_purified,
    measure_score,
    measure_splitting,
)
from purify.train.recipes import RECIPES, Recipe


def parser(prog: str = "purify train") -> Parser:
    """The command line."""
    p = Parser(
        prog=prog,
        description="Train a network of the embedded default by its recipe. A run that was stopped resumes.",
        epilog="examples: %(prog)s digits; %(prog)s guide --dataset fashion_mnist",
    )
    p.add_argument(
        "name",
        help=f"which recipe: {', '.join(RECIPES)}; or without its data set: guide --dataset digits",
    )
    p.add_argument("--dataset", help="the data set, where the name does not say it (default: digits)")
    p.add_argument("--out", type=taking(PATH), default=Path("runs/train"), help="folder (default: %(default)s)")
    p.add_argument("--data-dir", type=taking(PATH), help="folder with the data set's files")
    p.add_argument("--steps", type=taking(WHOLE), help="training steps instead of the recipe's")
    p.add_argument("--seed", type=taking(WHOLE), help="seed instead of the recipe's")
    p.add_argument("--threads", type=taking(WHOLE), help="CPU threads for torch")
    return p


def recipe_name(name: str, dataset: str | None) -> str:
    """``name``, with its data set before it if it lacks one: ``guide`` is ``digits-guide``.

    Raises:
        ValueError: there is no such recipe, or it is one of another data set.
    """
    full = f"{dataset or 'digits'}-{name}"
    found = full if full in RECIPES else name
    recipe = choose(found, RECIPES, "recipe")
    if dataset not in (None, recipe.dataset):
        raise ValueError(f"{found} is a recipe for {recipe.dataset}, not for {dataset}; leave out one of the two.")
    return found


def build(recipe: Recipe) -> nn.Module:
    """The module that the recipe's loss takes, untrained or as the recipe's start."""
    if recipe.start is not None:
        load = zoo.classifier if recipe.kind == "classifier" else zoo.score_model
        return load(recipe.start).requires_grad_(True)
    network = build_network(recipe.architecture, recipe.hyper.seed)
    if recipe.kind == "classifier":
        return network
    classes = None if classes_of(network) is None else "unconditional"
    shape = DATASETS[recipe.dataset].shape
    return ScoreModel(network, ContinuousVP(), recipe.prediction, image_shape=shape, classes=classes)


def run(name: str, recipe: Recipe, out: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Train, measure, and write ``out/name``.safetensors, .json and .md; returns the JSON's content."""
    check_writable(out / f"{name}.json")
    images, labels = load_dataset(recipe.dataset, "train", data_dir)
    test_images, test_labels = load_dataset(recipe.dataset, "test", data_dir)
    identity = {
        "kind": recipe.kind,
        "dataset": recipe.dataset,
        "architecture": recipe.architecture,
        "loss": {"kind": type(recipe.loss).__name__, **dataclasses.asdict(recipe.loss)},
    }
    if recipe.start is not None:
        identity["start"] = recipe.start
    module = train(build(recipe), recipe.loss, images, labels, recipe.hyper, out / f"{name}.checkpoint", identity)
    entry = {
        **identity,
        "hyper": dataclasses.asdict(recipe.hyper),
        "parameters": sum(p.numel() for p in module.parameters()),
        "torch": torch.__version__,
    }
    if isinstance(module, ScoreModel):
        entry |= {"score_model": module.config()}
    if recipe.classifier is not None:
        entry |= {"classifier": recipe.classifier}
    entry["measured"] = measure(module, recipe, test_images, test_labels)
    zoo.save(out / name, module.network if isinstance(module, ScoreModel) else module, entry)
    (out / f"{name}.md").write_text(card(name, entry))
    return entry


def measure(module: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What the model card reports, by the kind of network and what it was trained for."""
    loss = recipe.loss
    if isinstance(module, ScoreModel):
        found = measure_score(module, images)
        if isinstance(loss, DiffusionCalibration):
            found |= measure_denoised(module, loss, images, labels)
        if recipe.classifier is not None:
            found["clean_accuracy"] = accuracy(DiffusionClassifier(module, **recipe.classifier), images, labels)
        return found
    if isinstance(loss, SplittingLoss):
        return measure_splitting(module, loss, images, labels)
    if isinstance(loss, PurifiedCrossEntropy):
        return measure_purified(module, loss, images, labels)
    return measure_classifier(module, images, labels, DATASETS[recipe.dataset].eps["Linf"])


def card(name: str, entry: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    measured = "\n".join(f"| {key} | {value:.4f} |" for key, value in entry["measured"].items())
    hyper = ", ".join(f"{k} {v}" for k, v in entry["hyper"].items())
    loss = ", ".join(f"{k} {v}" for k, v in entry["loss"].items())
    return f"""# {name}

A {entry["kind"]} network for {entry["dataset"]}, {entry["parameters"]:,} parameters.

- Architecture: `{entry["architecture"]}`
- Made by: `python -m purify.train {name}` (torch {entry["torch"]}, CPU)
- Loss: {loss}
- Hyper-parameters: {hyper}
- Data: the training split of `purify.data.load_dataset("{entry["dataset"]}", "train")`

Measured on the test split, by the same command:

| what | value |
| --- | --- |
{measured}

Small networks for demonstrations and tests on the CPU. They say nothing about defences of CIFAR-10 or ImageNet size.
"""


def run_recipe(args: argparse.Namespace, command: str) -> int:
    """Train what is named and print what was measured."""
    name = recipe_name(args.name, args.dataset)
    recipe = RECIPES[name]
    changes = {k: v for k, v in (("steps", args.steps), ("seed", args.seed)) if v is not None}
    recipe = dataclasses.replace(recipe, hyper=dataclasses.replace(recipe.hyper, **changes))
    set_threads(args.threads)
    entry = run(name, recipe, args.out, args.data_dir)
    print(f"wrote {args.out / name}.safetensors")
    for key, value in entry["measured"].items():
        print(f"  {key}: {value:.4f}")
    return 0


def main(argv: list[str] | None = None, prog: str = "purify train") -> int:
    """Entry point; returns the exit status."""
    return guarded(parser(prog), run_recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
