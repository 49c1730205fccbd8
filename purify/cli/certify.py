"""``purify certify``, and ``benchmarks/run_certify.py``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from purify.cli.parsing import Parser, describe_parser, described, taking
from purify.cli.shell import guarded, note_data, note_part, note_shard
from purify.evaluate.budgets import DRAWS
from purify.evaluate.certification import Summary, estimates
from purify.evaluate.description import OLD, Certification
from purify.evaluate.drawtimes import table as dry_run_table
from purify.evaluate.dryrun import duration
from purify.evaluate.pictures import panels, save
from purify.evaluate.ranks import leave
from purify.evaluate.recompute import recompute
from purify.evaluate.records import SCHEMA, RunFolder, curve_picture, write_json
from purify.evaluate.systems import Ready, prepare, summed
from purify.options import PATH

INSIDE = "changed by PGD inside"
EXAMPLES = """examples:
  %(prog)s                                             the demo: digits, denoised smoothing at three sigmas
  %(prog)s --method cohen,multiscale --budget standard
  %(prog)s --sigma 0.25 --radii 0.25,0.5 --draws 10000 --sampling anytime
  %(prog)s --data fashion_mnist --method multiscale --sigma 0.25,0.5,1 --draws 10000
  %(prog)s --method dssn --model runs/train/digits-dssn.safetensors
  %(prog)s --recompute runs/digits-certified-cohen-quick --alpha 0.0001
  torchrun --nproc-per-node=4 %(prog)s --threads 1 --budget standard
"""


def parser(prog: str = "purify certify") -> Parser:
    """All options of :class:`Certification`, in groups."""
    text = "Certify smoothed classifiers, attack them inside the certified radii, and report what holds."
    p = describe_parser(Certification, prog, text, EXAMPLES)
    text = "finished run whose radii are computed anew for --alpha and --radii, from its records; nothing is drawn"
    p.add_argument("--recompute", type=taking(PATH), metavar="RUN_DIR", help=text)
    p.add_argument("--dry-run", action="store_true", help="check everything, estimate the time, and stop")
    for name in OLD:
        p.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None, prog: str = "purify certify") -> int:
    """Certify and report; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: Any, command: str) -> int:
    """Check everything, then certify, attack and report."""
    asked = described(Certification, args, OLD)
    if args.recompute is not None:
        check_recompute(command)
        return show_recomputed(args.recompute, asked)
    ready = prepare(asked)
    if args.dry_run:
        if ready.ranks.first:
            show_dry_run(ready)
        return 0
    draws = ready.order.draws
    with ready.open(command) as folder:
        if ready.ranks.first:
            note_data(asked, ready.data)
            budget = f"n0 {draws.n0}, n {draws.n}, alpha {draws.alpha:g}" if ready.drawn else "no draws, exact"
            print(f"{asked.dataset}, {len(ready.samples)} samples, {budget}; records in {folder.path}")
        ready.certify(folder)
        if ready.ranks.first and asked.part:
            note_shard(asked.part, folder)
        elif ready.ranks.first:
            show(ready, folder)
            if ready.drawn:
                small(draws.n)
    leave()
    return 0


def show_dry_run(ready: Ready) -> None:
    """Print what the certification would take at most."""
    note_data(ready.order.asked, ready.data)
    costs = ready.dry_run()
    print(f"{ready.order.asked.dataset}, {len(ready.samples)} samples; files, models and shapes are in order.")
    print(f"\n{dry_run_table(costs).to_string()}")
    total = sum(cost.seconds for cost in costs.values())
    print(f"\nAt most about {duration(total)} in one process: draws that stop early, scales not reached take nothing.")
    if part := ready.order.asked.part:
        own = ready.own()
        note_part(part, len(own), len(ready.samples), ready.seconds(costs, own))


def check_recompute(command: str) -> None:
    """Raise ValueError if a command names more than what can be recomputed, be it what the run had."""
    named = (word.partition("=")[0] for word in shlex.split(command) if word.startswith("--"))
    other = next((name for name in named if name not in ("--recompute", "--alpha", "--radii")), None)
    if other:
        raise ValueError(f"--recompute takes --alpha and --radii, all else is the run's; leave {other} out.")


def show_recomputed(folder: Path, asked: Certification) -> int:
    """Print the tables of a finished run at another alpha, and write them beside its result.json."""
    found = recompute(folder, asked.alpha, asked.radii)
    for norm in dict.fromkeys(r.norm for r in found.values()):
        part = {name: r.summary for name, r in found.items() if r.norm == norm}
        rest = further(part, {name: r.reachable for name, r in found.items()}).drop(columns=INSIDE)
        print(f"\n{norm}, alpha {asked.alpha:g}: certified accuracy in % at radii, [95 % interval]")
        print(f"{table(part).to_string()}\n\n{rest.to_string()}")
    path = folder / f"result-alpha-{asked.alpha:g}.json"
    results = {name: {"norm": r.norm, **summed(r.summary)} for name, r in found.items()}
    write_json(path, {"schema": SCHEMA, "alpha": asked.alpha, "results": results})
    print(f"\nWrote {path}.")
    return 0


def small(n: int) -> None:
    """Say what fewer draws than the standard budget's mean."""
    standard = DRAWS["standard"][1]
    if n < standard:
        print(
            f"This is a REDUCED budget, n {n} instead of {standard}: the certificates hold, but their radii are "
            "smaller, and a cascade abstains more often. State n with any number, or use --budget standard."
        )


def show(ready: Ready, folder: RunFolder) -> None:
    """Print the tables, write result.json and the curve for each norm."""
    found = ready.finish(folder)
    reachable = {s.name: s.certifier.reachable(s.draws) for s in ready.systems}
    written = [folder.path / "result.json"]
    for norm in ready.radii:
        part = {s.name: found[s.name] for s in ready.systems if s.certifier.norm == norm}
        print(f"\n{norm}: certified accuracy in % at radii, [95 % interval]\n{table(part).to_string()}")
        print(f"\n{further(part, reachable).to_string()}")
        written.append(curve(curve_picture(folder.path, norm), part, norm))
    linf = ready.linf(found)
    if linf:
        print("\nL_inf: certified accuracy in % at radii, from those above, [95 % interval]")
        print(table(linf).to_string())
        written.append(curve(curve_picture(folder.path, "Linf"), linf, "L_inf"))
    for name, summary in found.items():
        if summary.refuted:
            changed = f"{summary.refuted} of {summary.attacked} attacks inside the radius changed the answer"
            print(f"\nFAILED {name}: {changed}")
    print(f"\nWrote {', '.join(map(str, written))}.")


def table(found: dict[str, Summary]) -> pd.DataFrame:
    """Certified accuracy: systems by radii."""
    rows = {n: {f"{r:g}": str(e) for r, e in zip(s.radii, s.certified, strict=True)} for n, s in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def further(found: dict[str, Summary], reachable: dict[str, float]) -> pd.DataFrame:
    """Average certified radius and the largest that the draws can give, abstentions, draws, cross-check: a row each."""
    rows = {
        name: {
            "ACR": f"{s.acr.value:.3f} [{s.acr.low:.3f}, {s.acr.high:.3f}]",
            "reachable": f"{reachable[name]:.3f}",
            "abstained %": str(s.abstained),
            "draws per image": f"{s.draws:.0f}",
            INSIDE: f"{s.refuted} of {s.attacked}" + (f" ({s.unsure} unsure)" if s.unsure else ""),
        }
        for name, s in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def curve(path: Path, found: dict[str, Summary], norm: str) -> Path:
    """PNG of certified accuracy over the radius, with bands of Wilson's 95 % intervals."""
    fig, ax = panels(7, 4 + 0.12 * len(found))
    top = max(max(float(s.correct.max()) for s in found.values()), 1e-3)
    grid = torch.linspace(0, 1.05 * top, 400).numpy()
    for name, summary in found.items():
        points = estimates(summary.correct, grid)
        low, high = (100 * np.array([getattr(p, side) for p in points]) for side in ("low", "high"))
        shares, label = [100 * p.value for p in points], f"{name} (ACR {summary.acr.value:.3f})"
        (line,) = ax.step(grid, shares, where="post", label=label)
        ax.fill_between(grid, low, high, step="post", color=line.get_color(), alpha=0.12, linewidth=0)
    ax.set(xlabel=f"{norm} radius", ylabel="certified accuracy in %", ylim=(0, 100), xlim=(0, 1.05 * top))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2, fontsize=8)
    return save(fig, path)
