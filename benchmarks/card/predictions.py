"""The dry run's predictions against what was taken."""

from __future__ import annotations

import statistics
import time

import torch
from gradient_fidelity import engine_gradient, peak_bytes, seconds

from card.bench import BFLOAT16, ENGINES, FLOAT32, GIB, Bench, Row, word
from purify.attacks import PGD
from purify.diffusion.reverse import EulerMaruyama
from purify.evaluate.dryrun import estimate
from purify.evaluate.runner import Defence, Samples
from purify.purification.defended import DefendedClassifier
from purify.purification.gradients import GradientEngine


def predictions(bench: Bench) -> list[Row]:
    """What the dry run says that a gradient and an attack take, and what they take."""
    engines = {name: engine for name, engine in ENGINES.items() if engine.exact}
    return [predicted(bench, v, name, e) for v in (FLOAT32, BFLOAT16) for name, e in engines.items()]


def predicted(bench: Bench, variant: str, name: str, engine: GradientEngine) -> Row:
    bench.free()
    setting = bench.setting(variant)
    model = DefendedClassifier(bench.classifier, setting.purifier(engine, EulerMaruyama()))
    attack = PGD("Linf", 8 / 255, steps=3, eot=1)
    ids, n = torch.arange(len(setting.x), device=bench.device), len(setting.x)
    row: Row = {"gradient": name, "network": variant}
    start = time.perf_counter()
    try:
        cost = estimate(Defence("gpu", model, [attack], 1, {}), Samples(setting.x, setting.y, ids), n)
    except ValueError as refusal:
        return {**row, "error": word(refusal)}
    dry = time.perf_counter() - start
    gradient = engine_gradient(setting, engine, EulerMaruyama())
    works = {"gradient": gradient, "attack": lambda: attack(model, setting.x, setting.y, sample_ids=ids, seed=0)}
    peak = peak_bytes(gradient, bench.device)
    taken = {k: statistics.median(t) for k, t in seconds(works, bench.size.repeats, bench.device).items()}
    said = (attack.gradients * cost.gradient + attack.forwards * cost.forward) * n
    return {
        **row,
        "dry run, seconds": dry,
        "gradient, seconds": taken["gradient"],
        "said / taken, gradient": cost.gradient * n / taken["gradient"],
        "attack, seconds": taken["attack"],
        "said / taken, attack": said / taken["attack"],
        "peak GiB": peak / GIB,
        "said / taken, memory": cost.memory / peak,
    }
