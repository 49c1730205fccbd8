#!/usr/bin/env python
"""Different t* in one batch: network calls and time of the packed plan against padding every sample to the longest.

A batch of clean digits with some adversarial ones gets its noise levels from SSNI-L. `fixed_dt` runs it packed; the
peer, in the same process and interleaved, runs the longest sample's number of steps on all and discards what a
finished sample did not need. Prints ratios and checks them; writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from purify import FixedDt, Purifier, SSNILinear, diffpure, zoo
from purify.attacks import PGD
from purify.checks import check_count, check_writable
from purify.data import load_dataset
from purify.evaluate.records import write_json
from purify.machine import seconds, set_threads
from purify.purification.process import ReverseStep


def batch(n: int, attacked: int) -> Tensor:
    """Test images, the first ``attacked`` of them adversarial for the undefended classifier."""
    images, labels = load_dataset("digits", "test")
    if n > len(images):
        raise ValueError(f"digits has {len(images)} test images; --samples {n} is too many.")
    images, labels = images[:n], labels[:n]
    adversarial = PGD("Linf", 0.3, steps=10, eot=1)(zoo.classifier("digits-standard"), images, labels).images
    return torch.cat([adversarial[:attacked], images[attacked:]])


def padded(purifier: Purifier, x: Tensor, ids: Tensor, t_star: Tensor, size: int) -> Tensor:
    """The same purification with every sample of a chunk of ``size`` in every step of the longest."""
    return torch.cat(
        [padded_chunk(purifier, *part) for part in zip(x.split(size), ids.split(size), t_star.split(size), strict=True)]
    )


def padded_chunk(purifier: Purifier, x: Tensor, ids: Tensor, t_star: Tensor) -> Tensor:
    plan = purifier.plan
    assert isinstance(plan, FixedDt)
    noise = purifier.noise(len(x), x.device, ids, 0, 0)
    counts = plan.counts(t_star)
    u = purifier.process(t_star, noise).rounds[0].diffuse(2 * x - 1)
    for j in range(int(counts.max())):
        left = (counts - j).clamp_min(1)
        t = t_star if j == 0 else left * plan.dt
        step = ReverseStep(purifier.rule, purifier.score_model, t, (left - 1) * plan.dt, noise, j + 1)
        u = torch.where((j < counts).reshape(-1, 1, 1, 1), step(u), u)
    return (u.clamp(-1, 1) + 1) / 2


def counted(purifier: Purifier, work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Result of ``work`` and the samples its network calls saw."""
    sizes: list[int] = []
    handle = purifier.score_model.network.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    result = work()
    handle.remove()
    return result, sum(sizes)


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Input gradient of the sum of squares."""
    v = x.clone().requires_grad_()
    return torch.autograd.grad(forward(v).square().sum(), v)[0]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=256, help="images (default: %(default)s)")
    p.add_argument("--attacked", type=int, default=24, help="adversarial ones among them (default: %(default)s)")
    p.add_argument("--batch", type=int, default=256, help="samples in the network at once (default: %(default)s)")
    p.add_argument("--dt", type=float, default=0.01, help="step length (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads for torch")
    p.add_argument("--out", type=Path, default=Path("runs/throughput.json"), help="JSON (default: %(default)s)")
    return p


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Ratios of the packed plan to padding, and what they were measured on."""
    device = torch.device(args.device)
    x, ids = batch(args.samples, args.attacked).to(device), torch.arange(args.samples, device=device)
    level = SSNILinear(0.2, zoo.calibration("digits"), t_max=0.4)
    plan = FixedDt(args.dt, args.batch)
    purifier = diffpure(zoo.score_model("digits").to(device), level, plan, "ddpm", gradient="full")
    held = purifier.with_gradient(through_level=False)
    t_star = purifier.purify(x, sample_ids=ids).t_star
    steps = plan.counts(t_star)
    fixed = Purifier(purifier.score_model, 0.2, "ddpm", plan, gradient="full")

    def packed_run(v: Tensor) -> Tensor:
        noise = fixed.noise(len(v), device, ids, 0, 0)
        return (fixed.engine(lambda n: fixed.process(t_star, noise, n), 2 * v - 1) + 1) / 2

    def padded_run(v: Tensor) -> Tensor:
        return padded(fixed, v, ids, t_star, args.batch)

    with torch.no_grad():
        packed_result, packed_calls = counted(fixed, lambda: packed_run(x))
        padded_result, padded_calls = counted(fixed, lambda: padded_run(x))
        whole_calls = counted(held, lambda: held(x, sample_ids=ids))[1]
    torch.testing.assert_close(packed_result, padded_result, rtol=0, atol=1e-4)
    works = {
        "packed": lambda: packed_run(x),
        "padded": lambda: padded_run(x),
        "packed gradient": lambda: gradient(packed_run, x),
        "padded gradient": lambda: gradient(padded_run, x),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            with torch.set_grad_enabled("gradient" in name):
                times[name].append(seconds(work, device))
    spent = {name: median(values) for name, values in times.items()}
    return {
        "samples": args.samples,
        "mean steps": steps.double().mean().item(),
        "longest": int(steps.max()),
        "mean to longest": (steps.double().mean() / steps.max()).item(),
        "calls to sum of steps": packed_calls / int(steps.sum()),
        "calls with the score norm, to steps + draws": whole_calls / int((steps + level.calls).sum()),
        "calls to padding": packed_calls / padded_calls,
        "time to padding": spent["packed"] / spent["padded"],
        "gradient time to padding": spent["packed gradient"] / spent["padded gradient"],
        "seconds packed": spent["packed"],
        "seconds padded": spent["padded"],
    }


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for name in ("samples", "batch", "repeats"):
            check_count(getattr(args, name), name)
        check_count(args.attacked, "attacked", minimum=0)
        if args.attacked > args.samples:
            raise ValueError(f"--attacked {args.attacked} is more than the images, --samples {args.samples}.")
        set_threads(args.threads)
        check_writable(args.out)
        found = measure(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name:45s} {value:.4g}")
    limits = {"calls to sum of steps": 1.05, "time to padding": 0.75, "gradient time to padding": 0.75}
    if found["mean to longest"] <= 0.5:
        for name, limit in limits.items():
            print(f"{'ok  ' if found[name] <= limit else 'MISS'} {name}: {found[name]:.3f} (limit {limit})")
    write_json(args.out, found)
    print(f"Wrote {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
