#!/usr/bin/env python3
"""What purify takes on one card: exact gradients against DiffPure's adjoint and a plain loop, certification, the
largest batch, the dry run's predictions, and how often the host waits for the device.

The networks have random weights: a U-Net of the size of ddpm-cifar10-32 and a ResNet-18. gpu.json and gpu.md are
written after every section, so that one that fails loses no other.

examples:
  benchmarks/gpu.sh
  benchmarks/gpu.sh --toy --out runs/gpu-toy
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gradient_fidelity import Gradient, Peer, Setting, engine_gradient, forward_pass, peak_bytes, ratio, seconds
from torch import Tensor
from torchvision.models import resnet18

import purify
from purify.attacks import PGD
from purify.certify import Draws, denoised_smoothing
from purify.checkpoints.unet import unet
from purify.checks import check_writable
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import EulerMaruyama
from purify.diffusion.schedule import ContinuousVP, DiscreteVP, Schedule
from purify.diffusion.score import ScoreModel
from purify.evaluate.dryrun import estimate
from purify.evaluate.runner import Defence, Samples
from purify.named import check_device
from purify.purification.defended import DefendedClassifier
from purify.purification.gradients import BPDA, Checkpoint, Full, GradientEngine
from purify.purification.purifier import DEFAULT_ENGINE

T_STAR, SIGMA, GIB = 0.1, 0.25, 2**30
PEER, PLAIN = "torchsde adjoint (DiffPure), weights frozen", "plain loop, all graphs kept"
ENGINES: dict[str, GradientEngine] = {
    "full": Full(),
    "checkpoint": Checkpoint(),
    "default (checkpoint, 1 GiB kept)": DEFAULT_ENGINE,
    "bpda (inexact, a yardstick)": BPDA(),
}
FLOAT32, BFLOAT16, COMPILED = "float32", "bfloat16", "bfloat16, compiled"
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        image, channels, layers: side of the images; channels of the U-Net's levels, and blocks in each.
        checked: images whose gradients are held against float64.
        rows: noisy images at once in certification.
        first, largest: batches between which the largest that fits is sought.
        patience: seconds that one gradient of that search may take.
        backend: of torch.compile.
    """

    image: int = 32
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers: int = 2
    batch: int = 64
    steps: int = 20
    repeats: int = 3
    checked: int = 8
    rows: tuple[int, ...] = (1024, 8192)
    first: int = 32
    largest: int = 8192
    patience: float = 15.0
    backend: str = "inductor"


TOY = Size(8, (32, 64), 1, 4, 2, 1, 2, (16,), 2, 4, 15.0, "aot_eager")


def score_model(size: Size, schedule: Schedule) -> ScoreModel:
    """The U-Net of google/ddpm-cifar10-32, or a smaller one, with random weights; eps has deviation 1."""
    plain = ["DownBlock2D"] * len(size.channels)
    down = [plain[0], "AttnDownBlock2D", *plain[2:]]
    network = unet(
        sample_size=size.image,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).to_empty(device="cpu")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # As untrained networks come, eps is next to nothing, and the gradient that of a process without a network.
        u = torch.randn(4, 3, size.image, size.image)
        network.conv_out.weight /= network(u, torch.full((4,), 50.0)).sample.std()
    return ScoreModel(network.eval(), schedule, image_shape=(3, size.image, size.image))


class Bench:
    """The networks and images, on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.classifier = resnet18(num_classes=10).eval().requires_grad_(False).to(device)
            x = torch.rand(size.batch, 3, size.image, size.image)
        self.model = score_model(size, DiscreteVP.linear(1000)).requires_grad_(False).to(device)
        self.x, self.y = x.to(device), (torch.arange(size.batch) % 10).to(device)
        self.models = {FLOAT32: self.model, BFLOAT16: self.model.with_settings(autocast="bfloat16")}

    def setting(self, variant: str = FLOAT32, batch: int | None = None, steps: int | None = None) -> Setting:
        """What is differentiated: a batch of so many images, the same ones again if there are too few."""
        rows = torch.arange(batch or self.size.batch, device=self.device) % self.size.batch
        x, y = self.x[rows], self.y[rows]
        return Setting(self.models[variant], self.classifier, x, y, T_STAR, steps or self.size.steps)

    def compile(self) -> None:
        """Add the variant whose score network is compiled."""
        torch._functorch.config.donated_buffer = False  # torchsde goes through a graph twice
        network = torch.compile(self.model.network, backend=self.size.backend)
        plain = self.models[BFLOAT16]
        self.models[COMPILED] = ScoreModel(network, plain.schedule, image_shape=plain.image_shape, autocast="bfloat16")

    def free(self) -> None:
        """Let go of what the last measurement left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def word(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def full_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)


# --- 1. gradients -------------------------------------------------------------------------------------------------


def plain_gradient(setting: Setting) -> Gradient:
    """The loop that one would write by hand: coefficients are plain numbers, and the noise (ours) is drawn beforehand,
    so that it costs the loop nothing."""
    x, n, schedule, autocast = setting.x, setting.steps, setting.model.schedule, setting.model.autocast is not None
    noise = Noise.keyed(1, torch.arange(len(x), device=x.device))
    z = [noise.normal(j, x.shape[1:]) for j in range(n + 1)]
    times = torch.tensor([setting.t_star * (n - j) / n for j in range(n + 1)], dtype=torch.float64)
    labels = [label.expand(len(x)) for label in setting.model.labels(times).float().to(x.device)]
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    rates = (schedule.beta(times[:-1]) * -times.diff()).tolist()

    def gradient() -> Tensor:
        start = x.clone().requires_grad_()
        u = alpha[0] * (2 * start - 1) + sigma[0] * z[0]
        for j, rate in enumerate(rates):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
                eps = setting.model.network(u, labels[j]).sample
            u = u + 0.5 * rate * u - rate / sigma[j] * eps.float() + rate**0.5 * z[j + 1]
        return torch.autograd.grad(setting.loss((u + 1) / 2), start)[0]

    return gradient


def peer_of(bench: Bench, setting: Setting) -> Peer:
    """torchsde's adjoint on the setting's own network; the plain model is copied first, compiled ones cannot be."""
    peer = Peer(replace(setting, model=bench.model), frozen=True)
    peer.model = setting.model
    return peer


def gradients(bench: Bench, variant: str) -> list[Row]:
    """Time, memory and direction of every gradient; times interleaved."""
    setting, k = bench.setting(variant), bench.size.checked
    exact = engine_gradient(bench.setting(batch=k).double(), Checkpoint(), EulerMaruyama())()
    works = {name: engine_gradient(setting, engine, EulerMaruyama()) for name, engine in ENGINES.items()}
    works[PLAIN] = plain_gradient(setting)
    references, rows = dict.fromkeys(works, exact), []
    try:
        peer = peer_of(bench, setting)
        works[PEER], references[PEER] = peer.gradient, peer.exact(slice(k))
    except ImportError:
        rows.append({"gradient": PEER, "error": "torchsde is not installed: pip install 'purify[peers]'"})
    found = {name: first_run(bench, work, references[name], k) for name, work in works.items()}
    timed = {name: works[name] for name in works if "error" not in found[name]}
    bench.free()
    taken = seconds({**timed, "forward": forward_pass(setting)}, bench.size.repeats, bench.device)
    for name in timed:
        found[name]["seconds"] = statistics.median(taken[name])
        for other, what in ((PLAIN, "plain loop"), (PEER, "torchsde"), ("forward", "forward pass")):
            if other in taken:
                found[name][f"time to {what}"] = ratio(taken[name], taken[other])
    return [{"gradient": name, **row} for name, row in found.items()] + rows


def first_run(bench: Bench, work: Gradient, reference: Tensor, k: int) -> Row:
    """Direction of a gradient's first ``k`` images and its peak memory, or why it has none; the run warms up, too."""
    bench.free()
    try:
        a, b = work()[:k].double().flatten(), reference.flatten()
        error, cosine = (a - b).norm() / b.norm(), torch.dot(a, b) / (a.norm() * b.norm())
        peak = peak_bytes(work, bench.device)
    except RuntimeError as failure:
        return {"error": word(failure)}
    return {"cosine to float64": cosine.item(), "relative error": error.item(), "peak GiB": peak / GIB}


def compiled(bench: Bench) -> list[Row]:
    bench.compile()
    return gradients(bench, COMPILED)


def step_memory(bench: Bench) -> list[Row]:
    """What a further step takes under ``checkpoint``, in batches of images."""
    n, rows = bench.size.steps, []
    for variant in (FLOAT32, BFLOAT16):
        peaks = []
        for steps in (n, 2 * n):
            work = engine_gradient(bench.setting(variant, steps=steps), Checkpoint(), EulerMaruyama())
            work()
            peaks.append(peak_bytes(work, bench.device))
        per_step = (peaks[1] - peaks[0]) / n / bench.x.nbytes
        row = {"network": variant, f"peak GiB, {n} steps": peaks[0] / GIB, f"peak GiB, {2 * n} steps": peaks[1] / GIB}
        rows.append({**row, "images per further step": per_step, "target": 1.1})
    return rows


# --- 2. certification ---------------------------------------------------------------------------------------------


def certification(bench: Bench) -> list[Row]:
    """Noisy images per second of denoised smoothing, and of nothing but its networks on as many rows."""
    return [certified(bench, variant, rows) for rows in bench.size.rows for variant in (FLOAT32, BFLOAT16)]


def certified(bench: Bench, variant: str, rows: int) -> Row:
    """Two batches of ``rows`` noisy images: one that chooses the classes and one that bounds them."""
    smooth = denoised_smoothing(bench.classifier, bench.models[variant], SIGMA, rows)
    images = bench.x[:4]
    draws = Draws(rows // len(images), rows // len(images), alpha=0.4)  # at which few draws certify, too
    noisy = images.repeat(rows // len(images), 1, 1, 1)
    noisy = noisy + SIGMA * torch.randn_like(noisy)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(2):
            smooth.classifier(noisy)

    works: dict[str, Callable[[], Any]] = {"ours": lambda: smooth.certify(images, draws), "bare": bare}
    row: Row = {"network": variant, "rows at once": rows}
    try:
        peak = peak_bytes(works["ours"], bench.device)
        taken = seconds(works, bench.size.repeats, bench.device)
    except RuntimeError as failure:
        return {**row, "error": word(failure)}
    finally:
        bench.free()
    speed = {name: 2 * rows / statistics.median(t) for name, t in taken.items()}
    row |= {"noisy images per second": speed["ours"], "bare networks": speed["bare"], "peak GiB": peak / GIB}
    return {**row, "time to bare": ratio(taken["ours"], taken["bare"])}


# --- 3. the largest batch -----------------------------------------------------------------------------------------


def largest_batch(bench: Bench) -> list[Row]:
    """The largest batch, doubled from the first, whose gradient fits; ``checkpoint`` in few steps, which hardly matter
    to its memory."""
    few = max(bench.size.steps // 5, 1)
    engines = (("full", bench.size.steps), ("checkpoint", few))
    return [fitting(bench, variant, *engine) for engine in engines for variant in (FLOAT32, BFLOAT16)]


def fitting(bench: Bench, variant: str, engine: str, steps: int) -> Row:
    batch, fits, peak, end = bench.size.first, 0, 0, "the limit of this script"
    while batch <= bench.size.largest:
        work = engine_gradient(bench.setting(variant, batch, steps), ENGINES[engine], EulerMaruyama())
        start = time.perf_counter()
        try:
            peak, fits = peak_bytes(work, bench.device), batch
        except RuntimeError as failure:
            end = f"{batch} do not fit" if full_memory(failure) else word(failure)
            break
        finally:
            bench.free()
        if 2 * (time.perf_counter() - start) > bench.size.patience:
            end = "time"
            break
        batch *= 2
    row = {"gradient": engine, "network": variant, "steps": steps, "largest batch": fits, "peak GiB": peak / GIB}
    return {**row, "ended by": end}


# --- 4. the dry run -----------------------------------------------------------------------------------------------


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


# --- 5. waits -----------------------------------------------------------------------------------------------------

PACKAGE = str(Path(purify.__file__).parent)


def waits(bench: Bench) -> list[Row]:
    """Where the host waits for the device in one gradient, and how often per reverse step."""
    if bench.device.type != "cuda":
        return [{"place": "not asked: there is no device to wait for"}]
    rows: list[Row] = []
    n = bench.size.steps
    for name, schedule in (("discrete", DiscreteVP.linear(1000)), ("continuous", ContinuousVP())):
        model = bench.model.with_settings(schedule=schedule, time_scale=1000, time_offset=0)
        settings = [replace(bench.setting(steps=k), model=model) for k in (n, 2 * n)]
        few, many = (waiting(engine_gradient(s, Checkpoint(), EulerMaruyama())) for s in settings)
        places = {p: {"times": few[p], "per step": (many[p] - few[p]) / n} for p in few | many}
        places["all of them"] = {"times": few.total(), "per step": (many.total() - few.total()) / n}
        rows += [{"schedule": name, "place": place, **counts} for place, counts in places.items()]
    return rows


def waiting(work: Gradient) -> Counter[str]:
    """How often each place in purify (or in this script) makes the host wait, after a first run."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *args: Any, **options: Any) -> None:
        if "synchroniz" in str(message):
            found[place()] += 1

    work()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def place() -> str:
    """The innermost line of purify that is being run, or of the benchmark."""
    frames = [f for f in traceback.extract_stack()[:-2] if f.filename.startswith((PACKAGE, str(Path(__file__).parent)))]
    ours = [f for f in frames if f.filename.startswith(PACKAGE)] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "inside torch"


# --- the report ---------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "gradients, float32": lambda bench: gradients(bench, FLOAT32),
    "gradients, bfloat16": lambda bench: gradients(bench, BFLOAT16),
    "memory per step": step_memory,
    "waits": waits,
    "certification": certification,
    "dry run": predictions,
    "largest batch": largest_batch,
    "gradients, bfloat16, compiled": compiled,
}


def machine(bench: Bench) -> Row:
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if cuda else "CPU",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "batch": bench.size.batch,
        "image": bench.size.image,
        "steps": bench.size.steps,
    }


def section(bench: Bench, measure: Callable[[Bench], list[Row]], late: bool) -> Row:
    """One section's rows, or the error that it ended with."""
    if late:
        return {"error": "not begun: the time was up"}
    start = time.perf_counter()
    bench.free()
    try:
        result: Row = {"rows": measure(bench)}
    except Exception as error:  # the other sections shall have their turn
        traceback.print_exc()
        result = {"error": word(error)}
    return {**result, "seconds": time.perf_counter() - start}


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/")


def markdown(report: Row) -> str:
    """The whole report as tables."""
    lines = [", ".join(f"{k} {cell(v)}" for k, v in report["machine"].items()) + "."]
    for name, found in report["sections"].items():
        rows = found.get("rows", [])
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"## {name}", "", found.get("error", "")][: 4 if "error" in found else 3]
        if rows:
            lines += ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
            lines += ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--toy", action="store_true", help="tiny networks and few steps: does it run at all?")
    p.add_argument("--device", help="cpu or cuda (default: cuda, for a toy cpu)")
    p.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=list(SECTIONS))
    p.add_argument("--minutes", type=float, default=7.0, help="no section begins later (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure section by section; write gpu.json and gpu.md after each."""
    args, start = parser().parse_args(argv), time.perf_counter()
    try:
        device = check_device(args.device or ("cpu" if args.toy else "cuda"))
        check_writable(args.out / "gpu.json")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bench = Bench(TOY if args.toy else Size(), device)
    report: Row = {"machine": machine(bench), "sections": {}}
    for name in args.only:
        late = time.perf_counter() - start > 60 * args.minutes
        report["sections"][name] = section(bench, SECTIONS[name], late)
        (args.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "gpu.md").write_text(markdown(report))
        print(f"{name}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    print("\n" + markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
