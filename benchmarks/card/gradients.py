"""Exact gradients against DiffPure's adjoint and a plain loop, and what a further step takes."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from gradient_fidelity import Gradient, Peer, Setting, engine_gradient, forward_pass, peak_bytes, ratio, seconds
from torch import Tensor

from card.bench import BFLOAT16, COMPILED, ENGINES, FLOAT32, GIB, Bench, Row, word
from purify.diffusion.noise import Noise
from purify.diffusion.reverse import EulerMaruyama
from purify.purification.gradients import Checkpoint

PEER, PLAIN = "torchsde adjoint (DiffPure), weights frozen", "plain loop, all graphs kept"


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
    except (RuntimeError, ValueError) as failure:
        return {"error": word(failure)}
    return {"cosine to float64": cosine.item(), "relative error": error.item(), "peak GiB": peak / GIB}


def compiled(bench: Bench) -> list[Row]:
    with torch._functorch.config.patch(donated_buffer=False):  # torchsde goes through a graph twice
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
