"""The recipes of the embedded default: what `python -m purify.train` does unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from purify.train.defences import ADDTLoss, ConsistencyDistillation, PurifiedCrossEntropy
from purify.train.loop import Hyper
from purify.train.losses import (
    AdversarialCrossEntropy,
    BridgeLoss,
    ClassEpsLoss,
    CrossEntropy,
    DiffusionCalibration,
    EpsLoss,
    FlowMatching,
    SplittingLoss,
    Trades,
)


@dataclass(frozen=True)
class Recipe:
    """A zoo entry before training: what to build, or which score model to start from, and how to train it."""

    kind: str  # score or classifier
    dataset: str
    architecture: dict[str, Any]
    loss: (
        EpsLoss
        | ClassEpsLoss
        | FlowMatching
        | BridgeLoss
        | ADDTLoss
        | ConsistencyDistillation
        | PurifiedCrossEntropy
        | CrossEntropy
        | AdversarialCrossEntropy
        | Trades
        | SplittingLoss
        | DiffusionCalibration
    )
    hyper: Hyper
    start: str | None = None  # zoo name of the network that is fine-tuned
    prediction: str = "eps"  # of a score model
    classifier: dict[str, Any] | None = None  # arguments of its DiffusionClassifier, of a class-conditional one


DIGITS_UNET = {"kind": "patch-unet", "channels": 1, "size": 8, "patch": 1, "widths": [24, 24], "layers": 1}
FASHION_UNET = {"kind": "patch-unet", "channels": 1, "size": 28, "patch": 2, "widths": [24, 64], "layers": 1}
DIGITS_CNN = {"kind": "small-cnn", "channels": 1, "widths": [32, 64], "num_classes": 10}
FASHION_CNN = {"kind": "small-cnn", "channels": 1, "widths": [16, 32, 64], "num_classes": 10}

RECIPES: dict[str, Recipe] = {
    # More than 8,000 steps on 1,297 images overfit: the test loss rises again.
    "digits": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        EpsLoss(),
        Hyper(steps=8_000, batch_size=128, lr=2e-3, ema=0.9995),
    ),
    "digits-flow": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        FlowMatching(),
        Hyper(steps=3_000, batch_size=64, lr=2e-3, ema=0.998),
        prediction="velocity",
    ),
    # Told the class: a diffusion classifier, and without a class a score model.
    "digits-classes": Recipe(
        "score",
        "digits",
        {**DIGITS_UNET, "kind": "class-patch-unet", "num_classes": 11},
        ClassEpsLoss(),
        Hyper(steps=4_000, batch_size=64, lr=2e-3, ema=0.998),
        classifier={"timesteps": 5, "t_min": 0.1, "t_max": 0.6},
    ),
    "digits-standard": Recipe(
        "classifier", "digits", DIGITS_CNN, CrossEntropy(shift=1), Hyper(steps=3_000, batch_size=64, weight_decay=1e-4)
    ),
    "digits-at": Recipe(
        "classifier",
        "digits",
        DIGITS_CNN,
        AdversarialCrossEntropy(eps=0.3),
        Hyper(steps=4_000, batch_size=128, weight_decay=1e-4),
    ),
    "fashion_mnist": Recipe(
        "score",
        "fashion_mnist",
        FASHION_UNET,
        EpsLoss(),
        Hyper(steps=16_000, batch_size=64, lr=1.5e-3, ema=0.9995),
    ),
    "fashion_mnist-standard": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        CrossEntropy(shift=1),
        Hyper(steps=8_000, batch_size=128, weight_decay=1e-3, lr=2e-3),
    ),
    "fashion_mnist-at": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        AdversarialCrossEntropy(eps=0.1, attack_steps=5),
        Hyper(steps=1_500, batch_size=128, weight_decay=1e-4, lr=2e-3),
    ),
    # Auxiliary networks of adversarial guidance (AGDM).
    "digits-guide": Recipe(
        "classifier",
        "digits",
        DIGITS_CNN,
        Trades(eps=0.3),
        Hyper(steps=4_000, batch_size=128, weight_decay=1e-4),
    ),
    "fashion_mnist-guide": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        Trades(eps=0.1, attack_steps=5),
        Hyper(steps=2_000, batch_size=128, weight_decay=1e-4, lr=2e-3),
    ),
    # A score model that ends at the clean image from attacked ones (ADBM), from the one above.
    "digits-adbm": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        BridgeLoss("digits-standard", 0.3),
        Hyper(steps=1_000, batch_size=64, lr=4e-4, warmup=50, ema=0.995),
        start="digits",
    ),
    "fashion_mnist-adbm": Recipe(
        "score",
        "fashion_mnist",
        FASHION_UNET,
        BridgeLoss("fashion_mnist-standard", 0.1),
        Hyper(steps=1_000, batch_size=64, lr=4e-4, warmup=50, ema=0.995),
        start="fashion_mnist",
    ),
    # One trained at adversarial noise (ADDT); unit grows with eps from the paper's 0.03 at 8/255.
    "digits-addt": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        ADDTLoss("digits-standard", unit=0.3, most=0.7),
        Hyper(steps=400, batch_size=64, lr=4e-4, warmup=50, ema=0.99),
        start="digits",
    ),
    "fashion_mnist-addt": Recipe(
        "score",
        "fashion_mnist",
        FASHION_UNET,
        ADDTLoss("fashion_mnist-standard", unit=0.1, most=0.5),
        Hyper(steps=400, batch_size=64, lr=4e-4, warmup=50, ema=0.99),
        start="fashion_mnist",
    ),
    # A consistency function for one- and two-step purification.
    "digits-consistency": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        ConsistencyDistillation("digits"),
        Hyper(steps=800, batch_size=64, lr=4e-4, warmup=50, ema=0.99),
        start="digits",
    ),
    # Classifiers that stand behind a purifier: DiffPure, and one step of it against attacks through both.
    "digits-purified": Recipe(
        "classifier",
        "digits",
        DIGITS_CNN,
        PurifiedCrossEntropy("digits", 0.18),
        Hyper(steps=300, batch_size=64, lr=5e-4, warmup=50, ema=0.99, weight_decay=1e-4),
        start="digits-standard",
    ),
    "digits-purified-at": Recipe(
        "classifier",
        "digits",
        DIGITS_CNN,
        PurifiedCrossEntropy("digits", 0.03, 1, "one-shot", eps=0.3, attack_steps=3),
        Hyper(steps=200, batch_size=64, lr=5e-4, warmup=50, ema=0.99, weight_decay=1e-4),
        start="digits-at",
    ),
    "fashion_mnist-purified": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        PurifiedCrossEntropy("fashion_mnist", 0.2),
        Hyper(steps=300, batch_size=64, lr=5e-4, warmup=50, ema=0.99, weight_decay=1e-4),
        start="fashion_mnist-standard",
    ),
    "fashion_mnist-purified-at": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        PurifiedCrossEntropy("fashion_mnist", 0.03, 1, "one-shot", eps=0.1, attack_steps=3),
        Hyper(steps=200, batch_size=64, lr=5e-4, warmup=50, ema=0.99, weight_decay=1e-4),
        start="fashion_mnist-at",
    ),
    # Calibrated score models for denoised smoothing, from the ones above.
    "digits-calibrated": Recipe(
        "score",
        "digits",
        DIGITS_UNET,
        DiffusionCalibration("digits-standard"),
        Hyper(steps=2_000, batch_size=128, lr=2e-4, ema=0.999),
        start="digits",
    ),
    "fashion_mnist-calibrated": Recipe(
        "score",
        "fashion_mnist",
        FASHION_UNET,
        DiffusionCalibration("fashion_mnist-standard"),
        Hyper(steps=1_500, batch_size=64, lr=2e-4, ema=0.999),
        start="fashion_mnist",
    ),
    # Classifiers for splitting noise.
    "digits-ssn": Recipe(
        "classifier", "digits", DIGITS_CNN, SplittingLoss(1.0, "ssn"), Hyper(steps=6_000, batch_size=128)
    ),
    "digits-dssn": Recipe(
        "classifier", "digits", DIGITS_CNN, SplittingLoss(1.0, "dssn"), Hyper(steps=6_000, batch_size=128)
    ),
    "fashion_mnist-ssn": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        SplittingLoss(2.0, "ssn"),
        Hyper(steps=8_000, batch_size=128, weight_decay=1e-4, lr=2e-3),
    ),
    "fashion_mnist-dssn": Recipe(
        "classifier",
        "fashion_mnist",
        FASHION_CNN,
        SplittingLoss(2.0, "dssn"),
        Hyper(steps=8_000, batch_size=128, weight_decay=1e-4, lr=2e-3),
    ),
}
