"""The options of ``purify attack`` and ``benchmarks/run_autoattack.py``."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from purify.attacks import ATTACKS
from purify.attacks.base import NORMS
from purify.cli.parsing import Parser, number, size
from purify.cli.shell import DATA_HELP, add_budget, add_run_options
from purify.diffusion.reverse import REVERSE_RULES
from purify.evaluate.budgets import PRESETS
from purify.evaluate.runner import WORST_ONLY
from purify.presets import PURIFIERS
from purify.purification.defended import AGGREGATES
from purify.purification.gradients import ENGINES
from purify.purification.levels import LEVELS, TAU_UNITS

EXAMPLES = """examples:
  %(prog)s                                     the demo: digits, reduced budget
  %(prog)s --budget standard                   the same with an attack worth quoting
  %(prog)s --dataset fashion_mnist --t-star 0.15 --budget standard
  %(prog)s --noise-level ssni-l,ssni-n --t-star 0.25 --ssni-tau 2
  %(prog)s --purifier diffpure,gdmp,agdm --noise-level constant,ssni-n --set gdmp.scale=300
  %(prog)s --attacks pgd-eot,bpda-eot,autoattack-rand --threat-model L2 --eps 1
  %(prog)s --dataset cifar10 --model Standard --score-model score-sde-cifar10 --budget paper --device cuda
"""


def parser(prog: str = "purify attack") -> Parser:
    """All options, in groups."""
    p = Parser(
        prog=prog,
        description="Attack a purified classifier through exact gradients and report what holds.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    g = p.add_argument_group("what is attacked")
    g.add_argument("--data", "--dataset", dest="dataset", default="digits", help=DATA_HELP)
    g.add_argument("--data-dir", type=Path, help="folder with the data set's files")
    g.add_argument(
        "--model",
        help="zoo name, RobustBench name, or file.py:function (default: DATASET-standard, or RobustBench's Standard)",
    )
    g.add_argument("--n-examples", type=int, help="test images to attack")
    g = p.add_argument_group("defence")
    g.add_argument(
        "--purifier",
        default="diffpure",
        help=f"comma-separated: {', '.join(PURIFIERS)}; the name of a noise level is diffpure there "
        "(default: diffpure)",
    )
    g.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[PART.]NAME=VALUE",
        help="a parameter of the purifier, e.g. scale=300, or gdmp.rounds=2 where there are several; or of a noise "
        "level, ssni-l.t_min=0.01; agdm.auxiliary takes what --model takes; may be repeated",
    )
    g.add_argument(
        "--score-model", help="name or path, as for load_score_model, or file.py:function (default: the data set's)"
    )
    g.add_argument("--t-star", type=number, help="noise level in (0, 1] (default: the data set's usual one)")
    g.add_argument(
        "--noise-level",
        help=f"comma-separated: {', '.join(LEVELS)} (default: constant, on embedded data also ssni-l)",
    )
    g.add_argument("--calibration", type=Path, help="JSON of `purify calibrate` for SSNI (default: the embedded one)")
    g.add_argument("--ssni-bias", type=float, help="b, added to the level (default: 0)")
    g.add_argument("--ssni-t-max", type=float, help="greatest level (default: t* + b)")
    g.add_argument("--ssni-tau", type=float, help="temperature of ssni-n (default: 1 std; on CIFAR-10 20 norm)")
    g.add_argument("--tau-unit", help=f"unit of tau: {', '.join(TAU_UNITS)} (default: that of tau's default)")
    g.add_argument("--steps", type=int, help="reverse steps (default: 10 on embedded data, otherwise --dt 1e-3)")
    g.add_argument(
        "--dt",
        type=number,
        help="step length: t* then decides how many steps run, instead of --steps; half of --max-rows at a time",
    )
    g.add_argument(
        "--reverse",
        help=f"one of {', '.join(REVERSE_RULES)} (default: ddpm; for diffpure on other than embedded data sde)",
    )
    g.add_argument("--purifications", type=int, default=1, help="purifications per answer (default: 1)")
    g.add_argument("--aggregate", default="logits", help=f"how they are combined: {', '.join(AGGREGATES)}")
    g = p.add_argument_group("threat and attack")
    g.add_argument("--threat-model", default="Linf", help=f"one of {', '.join(NORMS)} (default: Linf)")
    g.add_argument("--eps", type=number, help="radius (default: the data set's usual one)")
    g.add_argument(
        "--attacks",
        default="random-noise,transfer,autoattack-rand,pgd-eot,pgd-eot-constant-t,pgd-eot-norm,pgd-eot-low-level,pgd-eot-first-order,"
        "pgd-eot-guide",
        help=f"comma-separated: {', '.join(ATTACKS)}; or strongest: all (default: %(default)s; each where it applies)",
    )
    g.add_argument(
        "--norm-weights",
        default="0.3",
        help="comma-separated weights of pgd-eot-norm and autoattack-rand-norm (default: %(default)s)",
    )
    g.add_argument(
        "--gradient", default="checkpoint", help=f"one of {', '.join(ENGINES)} (default: checkpoint, which is exact)"
    )
    g.add_argument(
        "--memory-budget",
        type=size,
        help="bytes of step graphs that full, checkpoint or surrogate may keep, as 512M (default: full all, others 1G)",
    )
    g.add_argument("--surrogate-steps", type=int, default=5, help="steps of surrogate gradients (default: 5)")
    g = p.add_argument_group("budget (by name, or its parts)")
    add_budget(g, PRESETS)
    g.add_argument("--attack-steps", type=int, help="gradient steps of every attack")
    g.add_argument("--eot", type=int, help="draws per gradient of every attack")
    g.add_argument("--restarts", type=int, default=1, help="random restarts of PGD (default: 1)")
    g.add_argument("--judge-draws", type=int, help="fresh purifications that judge each image")
    g.add_argument(
        "--worst-only",
        metavar="CRITERION",
        help=f"report the worst case under one of {', '.join(WORST_ONLY)} only: broken samples meet no further attack",
    )
    g = add_run_options(p, batch_size=64, gpu_rows=2048)
    g.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate time and memory, and stop before any attack"
    )
    return p
