"""``purify certify``, and ``benchmarks/run_certify.py``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from purify import zoo
from purify.certify import DSSN, SSN, Cascade, Certifier, Draws, EarlyStop, Smooth, denoised_smoothing, to_grid
from purify.certify.metrics import certified_accuracy
from purify.certify.multiscale import MODES
from purify.checkpoints import default_score_model
from purify.checks import check_count, check_unique, choose
from purify.cli.build import known
from purify.cli.parsing import Parser
from purify.cli.shell import DATA_HELP, add_budget, add_run_options, called, guarded, load_samples, numbers, resolve
from purify.evaluate.certification import Inside, Summary, System, certify_all, summarize
from purify.evaluate.provenance import default_folder, environment, fingerprint_of_samples
from purify.evaluate.ranks import join, leave
from purify.evaluate.records import RunFolder, curve_picture, write_json
from purify.evaluate.runner import Samples
from purify.machine import set_threads
from purify.named import check_device, fingerprint, is_in_file, load_classifier, load_score

EXAMPLES = """examples:
  %(prog)s                                             the demo: digits, denoised smoothing at three sigmas
  %(prog)s --method cohen,multiscale --budget standard
  %(prog)s --dataset fashion_mnist --method multiscale --sigma 0.25,0.5,1 --draws 10000
  %(prog)s --method dssn --model runs/train/digits-dssn.safetensors
  torchrun --nproc-per-node=4 %(prog)s --threads 1 --budget standard
"""

# n0, n, samples, attacked samples
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "quick": (50, 500, 32, 4),  # the demo, too little to publish
    "standard": (100, 10_000, 200, 16),
    "paper": (100, 100_000, 500, 50),
}
RADII = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)  # L2
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # L1: of lambda, which no radius can exceed by more than half a level


def parser(prog: str = "purify certify") -> Parser:
    """All options, in groups."""
    p = Parser(
        prog=prog,
        description="Certify smoothed classifiers, attack them inside the certified radii, and report what holds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    g = p.add_argument_group("what is certified")
    g.add_argument("--method", default="cohen", help=f"comma-separated: {', '.join(METHODS)} (default: cohen)")
    g.add_argument("--data", "--dataset", dest="dataset", default="digits", help=DATA_HELP)
    g.add_argument("--data-dir", type=Path, help="folder with the data set's files")
    g.add_argument(
        "--model",
        help="classifier: zoo name, path of a purify .safetensors, RobustBench name, or file.py:function (default: "
        "DATASET-standard behind the denoiser; DATASET-ssn, DATASET-dssn for splitting noise)",
    )
    g.add_argument("--n-examples", type=int, help="test images to certify")
    g = p.add_argument_group("Gaussian noise (cohen, multiscale)")
    g.add_argument("--sigma", default="0.25,0.5,1", help="comma-separated scales (default: %(default)s)")
    g.add_argument(
        "--score-model",
        help="denoisers, comma-separated: name or path as for load_score_model, file.py:function, or none (default: "
        "the data set's)",
    )
    g.add_argument("--p0", type=float, default=0.5, help="threshold of the cascade (default: 0.5)")
    g.add_argument("--mode", default="strict", help=f"bounds of the cascade: {', '.join(MODES)} (default: strict)")
    g = p.add_argument_group("splitting noise (ssn, dssn)")
    g.add_argument("--lam", type=float, help="lambda (default: the one that the classifier was trained with)")
    g = p.add_argument_group("budget (by name, or its parts)")
    add_budget(g, PRESETS)
    g.add_argument("--selection-draws", type=int, help="n0, draws that choose the class")
    g.add_argument("--draws", type=int, help="n, draws that bound its probability")
    g.add_argument("--alpha", type=float, default=0.001, help="probability of failure (default: 0.001)")
    g.add_argument("--stop-radius", type=float, help="stop drawing once it is settled whether this radius holds")
    g.add_argument("--looks", type=int, default=4, help="looks at the bound under --stop-radius (default: 4)")
    g.add_argument("--attack-examples", type=int, help="images attacked inside their radius")
    g.add_argument("--attack-steps", type=int, default=20, help="steps of that PGD (default: 20)")
    g.add_argument("--eot", type=int, default=16, help="draws per gradient of that PGD (default: 16)")
    g = add_run_options(p, batch_size=16, gpu_rows=8192)
    g.add_argument("--radii", help="comma-separated radii of the table (default: L2 up to 2, L1 shares of lambda)")
    return p


def main(argv: list[str] | None = None, prog: str = "purify certify") -> int:
    """Certify and report; returns the exit status."""
    return guarded(parser(prog), run, argv)


def run(args: argparse.Namespace, command: str) -> int:
    """Check everything, then certify, attack and report."""
    set_threads(args.threads)
    ranks, device = join(check_device(args.device))
    resolve(args)
    check_count(args.batch_size, "batch size")
    draws, inside, n = build_budget(args)
    methods = [m.strip() for m in args.method.split(",")]
    builders = [choose(m, METHODS, "method") for m in methods]
    if args.model and len({m in GAUSSIAN for m in methods}) > 1:
        raise ValueError("One --model cannot serve Gaussian and splitting noise; run these methods one by one.")
    check_meant(args, methods)
    systems = [s for build in builders for s in build(args, draws, inside, device)]
    advice = "name each method and sigma once, and give each denoiser a file name of its own"
    check_unique([s.name for s in systems], "systems", advice)
    radii = build_radii(args, systems)
    samples = load_samples(args, n, device)
    if any(s.certifier.norm == "L1" for s in systems):
        samples = replace(samples, images=to_grid(samples.images))
    config = {
        "dataset": args.dataset,
        "data": fingerprint_of_samples(samples),
        "n_examples": n,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "systems": {s.name: {**s.config, "draws": asdict(s.draws), "attack": asdict(s.attack)} for s in systems},
    }
    drawn = not set(READ_BY["draws"]).isdisjoint(methods)
    name = f"{called(args)}-certified-{'-'.join(methods)}-{args.preset}"
    folder = RunFolder(args.out or default_folder(name, config), config, environment(device, command, ranks), ranks)
    if ranks.first:
        budget = f"n0 {draws.n0}, n {draws.n}, alpha {draws.alpha:g}" if drawn else "no draws, exact"
        print(f"{args.dataset}, {n} samples, {budget}; records in {folder.path}")
    certify_all(folder, systems, samples, args.seed, args.batch_size)
    if ranks.first:
        show(folder, systems, samples, radii, args.preset)
        if drawn:
            small(draws.n)
    leave()
    return 0


# Options that only some methods read.
READ_BY = {
    "sigma": ("cohen", "multiscale"),
    "score_model": ("cohen", "multiscale"),
    "p0": ("multiscale",),
    "mode": ("multiscale",),
    "lam": ("ssn", "dssn"),
    "selection_draws": ("cohen", "multiscale", "ssn"),
    "draws": ("cohen", "multiscale", "ssn"),
    "alpha": ("cohen", "multiscale", "ssn"),
    "stop_radius": ("cohen", "ssn"),
    "looks": ("cohen", "ssn"),
}


def check_meant(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Raise ValueError if an option was changed that no method of this run reads."""
    usual = parser().parse_args([])
    for option, readers in READ_BY.items():
        if getattr(args, option) != getattr(usual, option) and not set(readers) & set(methods):
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} says nothing about {', '.join(methods)}; it is for {', '.join(readers)}.")


def build_radii(args: argparse.Namespace, systems: Sequence[System]) -> dict[str, list[float]]:
    """Radii of the table of each norm."""
    found = {}
    for norm in {s.certifier.norm for s in systems}:
        if args.radii is not None:
            found[norm] = numbers(args.radii, "radii")
        elif norm == "L1":
            lam = max(s.config["lam"] for s in systems if s.certifier.norm == norm)
            found[norm] = [share * lam for share in SHARES]
        else:
            found[norm] = list(RADII)
        if not all(math.isfinite(r) and r >= 0 for r in found[norm]):
            raise ValueError(f"--radii takes numbers of at least 0, got {args.radii!r}.")
    return found


def build_budget(args: argparse.Namespace) -> tuple[Draws, Inside, int]:
    """The preset with the user's changes: draws, the cross-check, samples."""
    asked = (args.selection_draws, args.draws, args.n_examples, args.attack_examples)
    usual = choose(args.preset, PRESETS, "preset")
    n0, n, samples, attacked = (u if a is None else a for a, u in zip(asked, usual, strict=True))
    check_count(samples, "n-examples")
    stop = None if args.stop_radius is None else EarlyStop(args.stop_radius, args.looks)
    return Draws(n0, n, args.alpha, stop), Inside(attacked, args.attack_steps, args.eot), samples


@dataclass(frozen=True)
class Denoised:
    """The smoothed classifiers behind one denoiser, one per sigma; what tells them from others; and their networks."""

    scales: tuple[Smooth, ...]
    suffix: str
    networks: dict[str, Any]


def gaussian(args: argparse.Namespace, device: torch.device) -> list[Denoised]:
    """One entry for each denoiser of the command line."""
    standard = f"{known(args)}-standard"
    default = standard if standard in zoo.names("classifier") else "Standard"
    classifier = any_classifier(args.model or default, args, "L2").to(device)
    sigmas = numbers(args.sigma, "sigma")
    names = [n.strip() for n in (args.score_model or default_score_model(known(args))).split(",")]
    found = []
    for name in names:
        networks, suffix = {"classifier": fingerprint(classifier)}, f", {short(name)}" if len(names) > 1 else ""
        if name == "none":
            scales = [Smooth(classifier, s, max_rows=args.max_rows) for s in sigmas]
        else:
            score = load_score(name, known(args)).to(device)
            networks["score_model"] = score.fingerprint()
            scales = [denoised_smoothing(classifier, score, s, args.max_rows) for s in sigmas]
        found.append(Denoised(tuple(scales), suffix, networks))
    return found


def short(name: str) -> str:
    """How a table calls a denoiser: its file's name, or file.function."""
    path, _, function = name.rpartition(":") if is_in_file(name) else (name, "", "")
    return ".".join(part for part in (Path(path).stem, function) if part)


def cohen(args: argparse.Namespace, draws: Draws, inside: Inside, device: torch.device) -> list[System]:
    """Smoothing at each sigma by itself."""
    return [
        System(f"cohen {s.sigma:g}{d.suffix}", s, draws, inside, {**s.config(), **d.networks})
        for d in gaussian(args, device)
        for s in d.scales
    ]


def multiscale(args: argparse.Namespace, draws: Draws, inside: Inside, device: torch.device) -> list[System]:
    """The cascade over all sigmas."""
    if draws.stop is not None:
        raise ValueError("A cascade makes all its draws; leave --stop-radius out.")
    systems = []
    for d in gaussian(args, device):
        cascade = Cascade(d.scales, args.p0, args.mode)
        name = f"multiscale{d.suffix}"
        systems.append(System(name, cascade, draws, inside, {**cascade.config(), **d.networks}))
    return systems


def splitting(kind: type[SSN] | type[DSSN]) -> Callable[..., list[System]]:
    """SSN or DSSN, over a classifier trained for it."""
    name = kind.__name__.lower()

    def build(args: argparse.Namespace, draws: Draws, inside: Inside, device: torch.device) -> list[System]:
        model = args.model or f"{known(args)}-{name}"
        classifier = any_classifier(model, args, "L1").to(device)
        lam = args.lam if args.lam is not None else trained_lam(model)
        certifier: Certifier = kind(classifier, lam, max_rows=args.max_rows)
        return [System(name, certifier, draws, inside, {**certifier.config(), "classifier": fingerprint(classifier)})]

    return build


METHODS: dict[str, Callable[..., list[System]]] = {
    "cohen": cohen,
    "multiscale": multiscale,
    "ssn": splitting(SSN),
    "dssn": splitting(DSSN),
}
GAUSSIAN = ("cohen", "multiscale")


def any_classifier(name: str, args: argparse.Namespace, norm: str) -> nn.Module:
    """A classifier by any of the names that --model takes."""
    if name in (f"{known(args)}-ssn", f"{known(args)}-dssn") and name not in zoo.names("classifier"):
        raise ValueError(
            f"There is no embedded {name}; pass --model, or train one with `python -m purify.train {name}` and pass "
            f"--model runs/train/{name}.safetensors."
        )
    return load_classifier(name, known(args), norm)


def trained_lam(model: str) -> float:
    """The lambda of a classifier that purify trained on splitting noise."""
    known = model.endswith(".safetensors") or model in zoo.names("classifier")
    lam = zoo.describe(model).get("loss", {}).get("lam") if known else None
    if lam is None:
        raise ValueError(f"{model} does not say for which lambda it was trained; pass --lam.")
    return float(lam)


# --- what a run shows ---------------------------------------------------------------------------------------------


def small(n: int) -> None:
    """Say what fewer draws than the standard budget's mean."""
    standard = PRESETS["standard"][1]
    if n < standard:
        print(
            f"This is a REDUCED budget, n {n} instead of {standard}: the certificates hold, but their radii are "
            "smaller, and a cascade abstains more often. State n with any number, or use --budget standard."
        )


def show(
    folder: RunFolder,
    systems: Sequence[System],
    samples: Samples,
    radii: dict[str, list[float]],
    preset: str,
) -> None:
    """Print the tables, write result.json and the curve for each norm."""
    found = {s.name: summarize(folder, s, samples, radii[s.certifier.norm]) for s in systems}
    body = {s.name: {"norm": s.certifier.norm, **plain(found[s.name])} for s in systems}
    write_json(folder.path / "result.json", {"preset": preset, "sessions": folder.sessions, "results": body})
    written = [folder.path / "result.json"]
    for norm in radii:
        part = {s.name: found[s.name] for s in systems if s.certifier.norm == norm}
        print(f"\n{norm}: certified accuracy in % at radii, [95 % interval]\n{table(part).to_string()}")
        print(f"\n{worth(part).to_string()}")
        written.append(curve(curve_picture(folder.path, norm), part, norm))
    for name, summary in found.items():
        if summary.refuted:
            changed = f"{summary.refuted} of {summary.attacked} attacks inside the radius changed the answer"
            print(f"\nFAILED {name}: {changed}")
    print(f"\nWrote {', '.join(map(str, written))}.")


def plain(summary: Summary) -> dict[str, Any]:
    """A summary for result.json, without what the records hold."""
    return {k: v for k, v in asdict(summary).items() if k != "correct"}


def table(found: dict[str, Summary]) -> pd.DataFrame:
    """Certified accuracy: systems by radii."""
    rows = {n: {f"{r:g}": str(e) for r, e in zip(s.radii, s.certified, strict=True)} for n, s in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def worth(found: dict[str, Summary]) -> pd.DataFrame:
    """Average certified radius, abstentions, draws and the cross-check: one row per system."""
    rows = {
        name: {
            "ACR": f"{s.acr.value:.3f} [{s.acr.low:.3f}, {s.acr.high:.3f}]",
            "abstained %": str(s.abstained),
            "draws per image": f"{s.draws:.0f}",
            "changed by PGD inside": f"{s.refuted} of {s.attacked}" + (f" ({s.unsure} unsure)" if s.unsure else ""),
        }
        for name, s in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def curve(path: Path, found: dict[str, Summary], norm: str) -> Path:
    """PNG of certified accuracy over the radius."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4 + 0.12 * len(found)), dpi=120, layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.subplots()
    top = max(max(float(s.correct.max()) for s in found.values()), 1e-3)
    grid = torch.linspace(0, 1.05 * top, 400).numpy()
    for name, summary in found.items():
        shares = 100 * certified_accuracy(summary.correct, grid)
        ax.step(grid, shares, where="post", label=f"{name} (ACR {summary.acr.value:.3f})")
    ax.set(xlabel=f"{norm} radius", ylabel="certified accuracy in %", ylim=(0, 100), xlim=(0, 1.05 * top))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2, fontsize=8)
    fig.savefig(path)
    return path
