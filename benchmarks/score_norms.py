#!/usr/bin/env python
"""Does the score norm tell adversarial images from clean ones? AUROC by radius, and against an attack that knows it.

PGD attacks the bare classifier at fractions of the data set's usual radius. `pgd-eot-norm` attacks the classifier
behind DiffPure with SSNI-L, and lowers the norm meanwhile. Prints a table; writes JSON and a plot of the norms.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from purify import DefendedClassifier, Noise, ScoreNorm, SSNILinear, diffpure, zoo
from purify.attacks import PGD, NormPGD
from purify.checks import check_count, check_writable, choose
from purify.data import DATASETS, load_dataset
from purify.evaluate.pictures import panels, save
from purify.evaluate.records import write_json
from purify.machine import set_threads

FRACTIONS = (0.1, 0.25, 0.5, 1.0)
CLEAN = "clean"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--n-examples", type=int, default=256, help="test images (default: %(default)s)")
    p.add_argument("--attack-steps", type=int, default=20, help="steps of PGD (default: %(default)s)")
    p.add_argument("--eot", type=int, default=4, help="draws per gradient of pgd-eot-norm (default: %(default)s)")
    p.add_argument("--t-star", type=float, default=0.2, help="t* of SSNI-L (default: %(default)s)")
    p.add_argument("--norm-weight", type=float, default=0.3, help="weight of pgd-eot-norm (default: %(default)s)")
    p.add_argument("--draws", type=int, default=8, help="draws of the norm (default: %(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/score-norms"), help="folder (default: %(default)s)")
    return p


def adversarial(args: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Adversarial images by the attack that made them."""
    classifier, eps = zoo.classifier(f"{args.dataset}-standard"), DATASETS[args.dataset].eps["Linf"]
    found = {}
    for radius in (fraction * eps for fraction in FRACTIONS):
        found[f"pgd, eps {radius:g}"] = PGD("Linf", radius, args.attack_steps, eot=1)(classifier, x, y).images
    level = SSNILinear(args.t_star, zoo.calibration(args.dataset))
    defended = DefendedClassifier(classifier, diffpure(zoo.score_model(args.dataset), level, 10, "ddpm"))
    attack = NormPGD("Linf", eps, args.attack_steps, args.eot, max_rows=256, norm_weight=args.norm_weight)
    return {**found, f"{attack.label} on ssni-l, eps {eps:g}": attack(defended, x, y).images}


@torch.no_grad()
def norms(args: argparse.Namespace, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Score norms, each group of images under noise of its own."""
    norm, model = ScoreNorm(draws=args.draws), zoo.score_model(args.dataset)
    ids = torch.arange(args.n_examples)
    return {name: norm(model, 2 * x - 1, Noise.keyed(i, ids)) for i, (name, x) in enumerate(images.items())}


def table(found: dict[str, Tensor]) -> pd.DataFrame:
    """AUROC of each attack's norms against the clean ones, and their mean and spread."""
    clean = found[CLEAN]
    truth = [0] * len(clean) + [1] * len(clean)
    rows = [
        {
            "images": name,
            "AUROC": float("nan") if name == CLEAN else roc_auc_score(truth, torch.cat([clean, values])),
            "mean norm": values.mean().item(),
            "std": values.std().item(),
        }
        for name, values in found.items()
    ]
    return pd.DataFrame(rows).set_index("images")


def plot(path: Path, found: dict[str, Tensor], title: str) -> None:
    """Histograms of the norms."""
    fig, ax = panels(7.5, 4)
    highest = max(values.max().item() for values in found.values())
    for name, values in found.items():
        ax.hist(values.numpy(), bins=60, range=(0, highest), alpha=0.6, label=name)
    ax.set_xlabel("score norm")
    ax.set_ylabel("images")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        choose(args.dataset, dict.fromkeys(["digits", "fashion_mnist"]), "data set of this benchmark")
        check_count(args.n_examples, "n-examples", 2)
        set_threads(args.threads)
        x, y = (t[: args.n_examples] for t in load_dataset(args.dataset, "test"))
        if len(x) < args.n_examples:
            raise ValueError(f"{args.dataset} has {len(x)} test images; ask for at most so many.")
        check_writable(args.out / f"{args.dataset}.json")
        found = norms(args, {CLEAN: x, **adversarial(args, x, y)})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = table(found)
    print(f"{args.dataset}, {args.n_examples} images, {args.draws} draws of the norm")
    print(rows.to_string(float_format=lambda v: f"{v:.4f}", na_rep="-"))
    result = {"command": " ".join(sys.argv), "rows": json.loads(rows.reset_index().to_json(orient="records"))}
    write_json(args.out / f"{args.dataset}.json", result)
    plot(args.out / f"{args.dataset}.png", found, f"{args.dataset}, {args.n_examples} images")
    print(f"Wrote {args.out / args.dataset}.json and .png.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
