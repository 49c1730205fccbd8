#!/usr/bin/env python3
"""How right, how fast and how large is each gradient engine?

Every engine's input gradient is compared with float64 backpropagation through the same discrete process with the same
noise; time and memory are ratios within one process, runs interleaved. The peer is torchsde's stochastic adjoint,
driven as DiffPure drives it.

examples:
  benchmarks/gradient_fidelity.py
  benchmarks/gradient_fidelity.py --dataset fashion_mnist --steps 20 100 --out runs/fidelity
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from purify import machine, zoo
from purify.checks import check_count, check_writable
from purify.data import load_dataset
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import EulerMaruyama, ProbabilityFlow
from purify.diffusion.score import ScoreModel, per_sample
from purify.evaluate.pictures import panels, save
from purify.evaluate.records import write_json
from purify.machine import set_threads
from purify.named import check_device
from purify.purification.gradients import BPDA, Adjoint, Checkpoint, Full, GradientEngine, Surrogate, saved_bytes
from purify.purification.purifier import Purifier

PEER = "torchsde adjoint (DiffPure)"
# The same with frozen weights, and ended where the network was trained, to tell where its error and time come from.
PEER_VARIANTS: dict[str, dict[str, Any]] = {
    PEER: {},
    "torchsde, weights frozen": {"frozen": True},
    "torchsde, ended at t = 1e-3": {"t_end": 1e-3},
}


@dataclass
class Setting:
    """What is differentiated: a purifier of ``steps`` Euler-Maruyama or Euler steps from t*, then a classifier."""

    model: ScoreModel
    classifier: nn.Module
    x: Tensor
    y: Tensor
    t_star: float
    steps: int

    def double(self) -> Setting:
        """The same in float64."""
        models = (copy.deepcopy(m).double() for m in (self.model, self.classifier))
        return Setting(*models, self.x.double(), self.y, self.t_star, self.steps)

    def loss(self, x_hat: Tensor) -> Tensor:
        return cross_entropy(self.classifier(x_hat), self.y, reduction="sum")

    def purifier(self, engine: GradientEngine, rule: Any) -> Purifier:
        return Purifier(self.model, self.t_star, rule, self.steps, gradient=engine, clip=False)

    def keys(self) -> dict[str, Any]:
        return {"sample_ids": torch.arange(len(self.x), device=self.x.device), "seed": 1}


@dataclass
class Row:
    """One line of the table; ratios are to ``full`` on the same rule."""

    engine: str
    steps: int
    exact: bool
    relative_error: float = float("nan")
    cosine: float = float("nan")
    sign_agreement: float = float("nan")
    network_calls: float = float("nan")
    seconds: float = float("nan")
    time_to_full: float = float("nan")
    time_to_peer: float = float("nan")
    time_to_forward: float = float("nan")
    peak_bytes: float = float("nan")
    memory_to_full: float = float("nan")


Gradient = Callable[[], Tensor]


def engine_gradient(setting: Setting, engine: GradientEngine, rule: Any) -> Gradient:
    """The input gradient under one of our engines."""
    purifier = setting.purifier(engine, rule)

    def gradient() -> Tensor:
        x = setting.x.clone().requires_grad_()
        return torch.autograd.grad(setting.loss(purifier(x, **setting.keys())), x)[0]

    return gradient


def forward_pass(setting: Setting) -> Gradient:
    """The no-grad forward of the same process."""
    purifier = setting.purifier(Full(), EulerMaruyama())

    @torch.no_grad()
    def forward() -> Tensor:
        return setting.loss(purifier(setting.x, **setting.keys()))

    return forward


# --- the peer -----------------------------------------------------------------------------------------------------


class ReverseSDE(nn.Module):
    """The reverse VP-SDE in t' = 1 - t as torchsde wants it, after DiffPure: states are flat (N, C*H*W)."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, model: ScoreModel, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def _time(self, t: Tensor, v: Tensor) -> Tensor:
        return (1 - t.double()).expand(len(v))

    def f(self, t: Tensor, v: Tensor) -> Tensor:
        time_, u = self._time(t, v), v.reshape(len(v), *self.shape)
        beta = self.model.schedule.beta(time_)
        drift = 0.5 * per_sample(beta, u) * u
        return (drift + per_sample(beta, u) * self.model.score(u, time_)).flatten(1)

    def g(self, t: Tensor, v: Tensor) -> Tensor:
        return per_sample(self.model.schedule.beta(self._time(t, v)).sqrt(), v).expand_as(v)


class Peer:
    """torchsde's ``sdeint_adjoint`` by Euler's method with DiffPure's step, on a Brownian path of its own.

    The weights require gradients unless ``frozen``, as a network has them unless one switches them off (programs
    derived from DiffPure only call ``eval()``), and the adjoint integrates those along. The path is kept from one run
    to the next, so that its noise costs the peer nothing in the timings.
    """

    def __init__(self, setting: Setting, t_end: float = 1e-5, frozen: bool = False) -> None:
        import torchsde

        self.setting, self.sdeint_adjoint = setting, torchsde.sdeint_adjoint
        self.model = copy.deepcopy(setting.model).requires_grad_(not frozen)
        x = setting.x
        self.times = torch.tensor([1 - setting.t_star, 1 - t_end], device=x.device)
        size = (len(x), x[0].numel())
        self.path = torchsde.BrownianInterval(
            self.times[0], self.times[1], size=size, entropy=1, device=x.device, cache_size=None
        )
        self.dt = setting.t_star / setting.steps
        noise = Noise.keyed(1, torch.arange(len(x), device=x.device))
        t_star = torch.full((len(x),), setting.t_star, dtype=torch.float64, device=x.device)
        self.diffuse = setting.purifier(Full(), EulerMaruyama()).process(t_star, noise).rounds[0].diffuse

    def gradient(self) -> Tensor:
        s = self.setting
        x = s.x.clone().requires_grad_()
        u = self.diffuse(2 * x - 1).flatten(1)
        sde = ReverseSDE(self.model, s.x.shape[1:])
        u = self.sdeint_adjoint(sde, u, self.times, bm=self.path, method="euler", dt=self.dt)[-1]
        return torch.autograd.grad(s.loss((u.reshape(x.shape) + 1) / 2), x)[0]

    def exact(self, rows: slice = slice(None)) -> Tensor:
        """float64 backpropagation, of some rows, through the very steps and increments of the peer's forward pass."""
        s = self.setting.double()
        x = s.x.clone().requires_grad_()
        sde = ReverseSDE(s.model, s.x.shape[1:])
        u = self.diffuse(2 * x - 1).flatten(1)[rows]
        t, last = self.times[0], self.times[-1]
        while t < last:
            following = torch.minimum(t + self.dt, last)
            step = (following - t).double()
            u = u + sde.f(t, u) * step + sde.g(t, u) * self.path(t, following)[rows].double()
            t = following
        s.y = s.y[rows]
        return torch.autograd.grad(s.loss((u.reshape(-1, *x.shape[1:]) + 1) / 2), x)[0][rows]


# --- measuring ----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors made inside the context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}

    def _release(self, key: int) -> None:
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen and storage._cdata not in given:  # a turned weight takes nothing
                    self.seen[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._release, storage._cdata)
        return out


def peak_bytes(gradient: Gradient, device: torch.device) -> int:
    """Peak memory of one gradient above what lived before.

    On a CPU it is counted in a dispatch mode, after which PyTorch before 2.14 runs compiled networks layer by layer.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        gradient()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        gradient()
    return live.peak


def network_rows(gradient: Gradient, network: nn.Module) -> int:
    """Rows that one gradient sends through the network."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    gradient()
    handle.remove()
    return sum(rows)


def seconds(gradients: dict[str, Gradient], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Wall time of each, ``repeats`` times, interleaved so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in gradients}
    for gradient in gradients.values():
        gradient()
    for _ in range(repeats):
        for name, gradient in gradients.items():
            taken[name].append(machine.seconds(gradient, device))
    return taken


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(p / q for p, q in zip(a, b, strict=True))


def compare(row: Row, got: Tensor, exact: Tensor) -> None:
    """Fill in the errors of a gradient."""
    a, b = got.double().flatten(), exact.double().flatten()
    row.relative_error = ((a - b).norm() / b.norm()).item()
    row.cosine = torch.dot(a, b).item() / (a.norm() * b.norm()).item()
    row.sign_agreement = (a.sign() == b.sign()).double().mean().item()


def half_budget(setting: Setting) -> int:
    """Bytes that keep half of the step graphs."""
    purifier = setting.purifier(Full(), EulerMaruyama())
    u = (2 * setting.x - 1).requires_grad_()
    noise = Noise.keyed(1, torch.arange(len(u), device=u.device))
    t_star = torch.full((len(u),), setting.t_star, dtype=torch.float64, device=u.device)
    _, one = saved_bytes(purifier.process(t_star, noise).rounds[0].reverse[0], u)
    return one * setting.steps // 2


def measure(setting: Setting, repeats: int) -> list[Row]:
    """All engines at one number of steps."""
    device = setting.x.device
    sde, ode = EulerMaruyama(), ProbabilityFlow("euler")
    engines: dict[str, tuple[GradientEngine, Any]] = {
        "full": (Full(), sde),
        "checkpoint": (Checkpoint(), sde),
        "checkpoint, half fits": (Checkpoint(memory_budget=half_budget(setting)), sde),
        "adjoint (SDE)": (Adjoint(), sde),
        "surrogate, 5 steps": (Surrogate(5), sde),
        "bpda": (BPDA(), sde),
        "full (ODE)": (Full(), ode),
        "adjoint (ODE)": (Adjoint(), ode),
    }
    gradients = {name: engine_gradient(setting, *parts) for name, parts in engines.items()}
    double = setting.double()
    exact = {rule: engine_gradient(double, Full(), rule)() for rule in (sde, ode)}
    references = {name: exact[rule] for name, (_, rule) in engines.items()}
    peers = load_peers(setting)
    for name, peer in peers.items():
        gradients[name], references[name] = peer.gradient, peer.exact()
    taken = seconds({**gradients, "forward": forward_pass(setting)}, repeats, device)
    rows = []
    for name, gradient in gradients.items():
        base = "full (ODE)" if "ODE" in name else "full"
        row = Row(name, setting.steps, name in engines and engines[name][0].exact)
        compare(row, gradient(), references[name])
        network = peers[name].model.network if name in peers else setting.model.network
        row.network_calls = network_rows(gradient, network) / len(setting.x)
        row.seconds = statistics.median(taken[name])
        row.time_to_full = ratio(taken[name], taken[base])
        row.time_to_forward = ratio(taken[name], taken["forward"])
        if peers:
            row.time_to_peer = ratio(taken[name], taken[PEER])
        row.peak_bytes = peak_bytes(gradient, device)
        rows.append(row)
    peaks = {row.engine: row.peak_bytes for row in rows}
    for row in rows:
        row.memory_to_full = row.peak_bytes / peaks["full (ODE)" if "ODE" in row.engine else "full"]
    return rows


def load_peers(setting: Setting) -> dict[str, Peer]:
    """The peers by name, or nothing and a word on how to get them."""
    try:
        return {name: Peer(setting, **options) for name, options in PEER_VARIANTS.items()}
    except ImportError:
        print("torchsde is not installed, its rows are left out: pip install 'purify[peers]'", file=sys.stderr)
        return {}


def targets(rows: list[Row]) -> list[tuple[str, float, float]]:
    """(what, measured, limit) for every promise; the measured value must not exceed the limit."""
    checks = []
    peaks: dict[int, float] = {}
    to_full = {(row.engine, row.steps): row.time_to_full for row in rows}
    for row in rows:
        at = f"{row.engine}, {row.steps} steps"
        if row.exact:
            checks.append((f"relative error of {at}", row.relative_error, 1e-5))
        if row.engine == "full":
            checks.append((f"time of {at}, to torchsde", row.time_to_peer, 0.6))
            checks.append((f"time of {at}, to the forward pass", row.time_to_forward, 2.3))
        if row.engine == "checkpoint":
            checks.append((f"time of {at}, to torchsde", row.time_to_peer, 0.85))
            peaks[row.steps] = row.peak_bytes
            half = to_full["checkpoint, half fits", row.steps]
            checks.append((f"time of full to half a budget, {row.steps} steps", 1 / half, 1.0))
            checks.append((f"time of half a budget to checkpoint, {row.steps} steps", half / row.time_to_full, 1.0))
    if len(peaks) > 1:
        few, many = min(peaks), max(peaks)
        checks.append((f"memory of checkpoint, {many} to {few} steps", peaks[many] / peaks[few], 1.3))
    return checks


def plot(rows: list[Row], path: Path) -> None:
    """Relative error, time and memory of every engine as bars."""
    steps = sorted({r.steps for r in rows})
    names = list(dict.fromkeys(r.engine for r in rows))
    fig, axes = panels(13, 0.55 * len(names) + 1.6, columns=3, sharey=True)
    shown = (
        ("relative_error", "relative error to float64 (log)", True),
        ("time_to_full", "time, ratio to full", False),
        ("memory_to_full", "peak memory, ratio to full", False),
    )
    for ax, (key, title, log) in zip(axes, shown, strict=True):
        for i, n in enumerate(steps):
            of = {r.engine: getattr(r, key) for r in rows if r.steps == n}
            height = 0.8 / len(steps)
            positions = [p + i * height for p in range(len(names))]
            ax.barh(positions, [of.get(name, 0) for name in names], height, label=f"{n} steps")
        ax.set_title(title, fontsize=10)
        if log:
            ax.set_xscale("log")
            ax.axvline(1e-5, color="gray", ls=":", lw=1)
        ax.grid(axis="x", alpha=0.3)
    ax.set_yticks([p + 0.4 * (1 - 1 / len(steps)) for p in range(len(names))], names)
    ax.invert_yaxis()
    ax.legend(fontsize=9)
    save(fig, path)


def parser() -> argparse.ArgumentParser:
    summary, examples = (__doc__ or "").split("examples:")
    p = argparse.ArgumentParser(
        description=summary, epilog="examples:" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dataset", default="digits", help="digits or fashion_mnist (default: digits)")
    p.add_argument("--data-dir", type=Path, help="folder with the data set's files")
    p.add_argument("--t-star", type=float, default=0.1, help="noise level (default: %(default)s)")
    p.add_argument("--steps", type=int, nargs="+", default=[20, 100], help="reverse steps (default: 20 100)")
    p.add_argument("--batch-size", type=int, default=64, help="images (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="interleaved timings (default: %(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    p.add_argument("--out", type=Path, default=Path("runs/gradient_fidelity"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Print the table and the promises; write fidelity.json and fidelity.png."""
    args = parser().parse_args(argv)
    try:
        set_threads(args.threads)
        check_count(args.repeats, "repeats")
        check_count(args.batch_size, "batch size")
        device = check_device(args.device)
        images, labels = load_dataset(args.dataset, "test", args.data_dir)
        models = (zoo.score_model(args.dataset), zoo.classifier(f"{args.dataset}-standard"))
        for steps in args.steps:
            Purifier(models[0], args.t_star, "sde", steps)  # refuses bad settings before anything runs
        check_writable(args.out / "fidelity.json")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model, classifier = (m.to(device) for m in models)
    x, y = images[: args.batch_size].to(device), labels[: args.batch_size].to(device)
    rows = [
        row
        for steps in args.steps
        for row in measure(Setting(model, classifier, x, y, args.t_star, steps), args.repeats)
    ]
    frame = pd.DataFrame([asdict(r) for r in rows])
    print(frame.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    print()
    checks = targets(rows)
    for what, value, limit in checks:
        verdict = "    " if value != value else ("ok  " if value <= limit else "FAIL")
        print(f"{verdict} {what}: {value:.3g} (limit {limit:g})")
    promises = [{"what": w, "measured": v, "limit": m} for w, v, m in checks]
    content = {"arguments": {k: str(v) for k, v in vars(args).items()}, "threads": torch.get_num_threads()}
    content |= {"torch": torch.__version__, "rows": [asdict(r) for r in rows], "promises": promises}
    write_json(args.out / "fidelity.json", content)
    plot(rows, args.out / "fidelity.png")
    print(f"\nWrote {args.out / 'fidelity.json'} and {args.out / 'fidelity.png'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
