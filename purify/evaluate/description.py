"""What is evaluated and how, typed and frozen: one description for Python, YAML files and the command line.

The command line is made from these classes (``purify.cli.parsing``), and every run's folder holds the ``run.yaml`` that
repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from purify.attacks import ATTACKS
from purify.attacks.threats import NORMS, PERCEPTUAL, THREATS
from purify.certify.multiscale import MODES
from purify.checks import check_count, check_unique, choose
from purify.diffusion.precision import FLOAT32, PRECISIONS
from purify.diffusion.reverse import REVERSE_RULES
from purify.evaluate.budgets import BUDGETS, DRAWS
from purify.evaluate.described import RUN, WHAT, Description
from purify.evaluate.precision import AUTO, COSINE
from purify.evaluate.protocols import AVERAGES, PROTOCOLS
from purify.evaluate.recipes import RECIPES
from purify.evaluate.runner import WORST_ONLY
from purify.options import (
    ASSIGNMENTS,
    NAMES,
    NUMBER,
    NUMBERS,
    PATH,
    RADII,
    SIZE,
    TEXT,
    WHOLE,
    WHOLES,
    note,
    option,
)
from purify.presets import PURIFIERS
from purify.purification.defended import AGGREGATES
from purify.purification.gradients import ENGINES
from purify.purification.levels import LEVELS

if TYPE_CHECKING:
    from purify.evaluate.certification import Summary
    from purify.evaluate.curve import Curve
    from purify.evaluate.distortion import Distortions
    from purify.evaluate.finish import Finished

SCORE_MODEL = "name or path, as for load_score_model, or file.py:function (default: the data set's)"
NO_ATTACK = "--eps 0 is no attack; name radii above 0."
DEFENCE, THREAT = "defence", "threat and attack"
GAUSSIAN, SPLITTING = "Gaussian noise (cohen, multiscale, few-step, densepure)", "splitting noise (ssn, dssn)"
BUDGET = "budget (by name, or its parts)"
SAMPLING = ("fixed", "anytime")
OLD = ("stop_radius", "looks")  # options of certificates until 0.2
EVERY_ATTACK = (
    "random-noise,transfer,adaptive,autoattack-rand,pgd-eot,pgd-eot-constant-t,pgd-eot-norm,pgd-eot-low-level,"
    "pgd-eot-first-order,pgd-eot-guide"
)
QUICK_ATTACKS = "random-noise,transfer,adaptive"  # within l_p norms: what leaves least for the time that the demo has
USUAL_ATTACKS = {  # by threat model
    **dict.fromkeys(NORMS, EVERY_ATTACK),
    **dict.fromkeys(PERCEPTUAL, "random-noise,transfer,pgd-eot,low-frequency-eot"),
    "flow": "random-noise,spatial-transfer,spatial-eot",
}
MODEL_GRADIENTS = ("exact", "bpda", "none")


@dataclass(frozen=True, kw_only=True)
class Attacking(Description):
    """A classifier, undefended and behind purifiers, with the attacks on it.

    The same name is the same defence here, in :func:`purify.wrap` and on the command line: what is not given comes from
    ``purify.settings``.
    """

    purifier: tuple[str, ...] = option(
        ("diffpure",), NAMES, DEFENCE,
        f"{', '.join(PURIFIERS)}, file.py:function, or a noise level, which is diffpure there; separated by commas",
    )  # fmt: skip
    settings: dict[str, Any] = option(
        {}, ASSIGNMENTS, DEFENCE,
        "a parameter of the purifiers or noise levels that have it, as scale=300 or tau=2, or of one of them, as "
        "gdmp.rounds=2 or ssni-l.t_min=0.01; agdm.auxiliary takes what --model takes; may be repeated", "--set",
    )  # fmt: skip
    score_model: str | None = option(None, TEXT, DEFENCE, SCORE_MODEL)
    score_classes: str | None = option(
        None, TEXT, DEFENCE,
        "what a class-conditional score network is told: unconditional, predicted (what --model says), or a class",
    )  # fmt: skip
    t_star: float | None = option(None, NUMBER, DEFENCE, "noise level in (0, 1]")
    noise_level: tuple[str, ...] | None = option(
        None, NAMES, DEFENCE,
        f"{', '.join(LEVELS)}, or file.py:Class; separated by commas (default: constant, on embedded data also ssni-l)",
    )  # fmt: skip
    calibration: Path | None = option(
        None, PATH, DEFENCE, "JSON of `purify calibrate` for SSNI (default: the embedded one)"
    )
    steps: int | None = option(None, WHOLE, DEFENCE, "reverse steps")
    dt: float | None = option(
        None, NUMBER, DEFENCE,
        "step length: t* then decides how many steps run, instead of --steps; half of --max-rows at a time",
    )  # fmt: skip
    reverse: str | None = option(None, TEXT, DEFENCE, f"reverse rule: {', '.join(REVERSE_RULES)}")
    purifications: int = option(1, WHOLE, DEFENCE, "purifications per answer")
    aggregate: str = option("logits", TEXT, DEFENCE, f"how they are combined: {', '.join(AGGREGATES)}")
    threat_model: str = option(
        "Linf", TEXT, THREAT,
        f"what is bounded: {', '.join(NORMS)}; {', '.join(PERCEPTUAL)}: perceptual distances; flow: moves pixels",
    )  # fmt: skip
    eps: float | tuple[float, ...] | None = option(
        None, RADII, THREAT,
        "radius, of flow in pixels; several, as 0.1,0.2,0.3: the curve of accuracy against them, with a run for each",
    )  # fmt: skip
    attacks: tuple[str, ...] | None = option(
        None, NAMES, THREAT,
        f"{', '.join(ATTACKS)}, file.py:Class, separated by commas; or strongest: all of the threat model (each where "
        f"it applies; default: {EVERY_ATTACK}, of --budget quick alone {QUICK_ATTACKS}, or those of another threat "
        "model); a PGD attack at one class or at the K likeliest wrong ones in turn: pgd-eot@3, bpda-eot@top-9",
    )  # fmt: skip
    norm_weights: tuple[float, ...] = option(
        (0.3,), NUMBERS, THREAT, "weights of pgd-eot-norm and autoattack-rand-norm, separated by commas"
    )
    gradient: str = option("checkpoint", TEXT, THREAT, f"{', '.join(ENGINES)}; checkpoint is exact")
    memory_budget: int | str | None = option(
        None, SIZE, THREAT,
        "bytes of step graphs that full, checkpoint or surrogate may keep, as 512M, or auto: what is free, less some "
        "room (default: full all, others 1G)",
    )  # fmt: skip
    model_gradient: str = option(
        "exact", TEXT, THREAT,
        "backward pass of the classifier: exact; bpda, that of --model-surrogate; none, attacks without gradients only",
    )  # fmt: skip
    model_surrogate: str | None = option(
        None, TEXT, THREAT, "network of --model-gradient bpda; as --model (default: DATASET-standard)"
    )
    precision: str = option(
        FLOAT32, TEXT, THREAT,
        f"of the score network under attack: {', '.join(PRECISIONS)}, or {AUTO}, the fastest of them whose gradient "
        f"has a cosine of at least {COSINE} with float32's; judges see float32",
    )  # fmt: skip
    surrogate_steps: int = option(5, WHOLE, THREAT, "steps of surrogate gradients")
    budget: str = option("quick", TEXT, BUDGET, f"effort of the attacks: {', '.join(BUDGETS)}", "--budget", "--preset")
    attack_steps: int | None = option(None, WHOLE, BUDGET, "gradient steps of every attack")
    eot: int | None = option(None, WHOLE, BUDGET, "draws per gradient of every attack")
    calls: int | None = option(None, WHOLE, BUDGET, "network calls of the attack adaptive, for each image")
    restarts: int = option(1, WHOLE, BUDGET, "random restarts of PGD")
    judge_draws: int | None = option(None, WHOLE, BUDGET, "fresh purifications that judge each image")

    def __post_init__(self) -> None:
        super().__post_init__()
        known: dict[str, Any] = {
            "aggregate": AGGREGATES,
            "threat_model": THREATS,
            "gradient": ENGINES,
            "budget": BUDGETS,
        }
        known |= {"reverse": REVERSE_RULES, "model_gradient": MODEL_GRADIENTS}
        known["precision"] = (*PRECISIONS, AUTO)
        for name, names in known.items():
            self._choose(name, names)
        if self.model_surrogate is not None and self.model_gradient != "bpda":
            raise ValueError("--model-surrogate is for --model-gradient bpda; give both or neither.")
        if self.steps is not None and self.dt is not None:
            raise ValueError("--steps and --dt exclude each other; give one.")
        if self.shard is not None and self.precision == AUTO:
            advice = "`--precision auto --dry-run` says which"
            raise ValueError(f"Each shard might choose another precision; name the one that all shall take ({advice}).")
        for name in ("attack_steps", "eot", "calls", "restarts", "judge_draws", "purifications", "surrogate_steps"):
            value = getattr(self, name)
            if value is not None:
                check_count(value, f"--{name.replace('_', '-')}")

    @property
    def attack_names(self) -> tuple[str, ...]:
        """The attacks that were named, or those of the threat model and budget.

        A budget of whose steps, draws or weights something else is said is no demo any more.
        """
        if self.attacks is not None:
            return self.attacks
        own = (self.attack_steps, self.eot, self.restarts, self.norm_weights) != (None, None, 1, (0.3,))
        quick = self.budget == "quick" and self.threat_model in NORMS and not own
        return tuple((QUICK_ATTACKS if quick else USUAL_ATTACKS[self.threat_model]).split(","))

    @property
    def several(self) -> bool:
        """Whether the curve over several eps is asked for."""
        return isinstance(self.eps, tuple)

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii that were named."""
        if self.eps is None:
            return ()
        return self.eps if isinstance(self.eps, tuple) else (self.eps,)

    def rows(self, device: torch.device) -> int:
        """Images times draws in the model at once."""
        return self.max_rows or (2048 if device.type == "cuda" else 256)  # what its caches like


@dataclass(frozen=True, kw_only=True)
class Evaluation(Attacking):
    """Attacks on a classifier, undefended and behind purifiers: what ``purify attack`` runs.

    Raises:
        ValueError: a value that an option cannot take, or a name that is not known; names the option.
    """

    worst_only: str | None = option(
        None, TEXT, BUDGET,
        f"report the worst case under {' or '.join(WORST_ONLY)} only: broken samples meet no further attack",
    )  # fmt: skip
    protocol: tuple[str, ...] = option(
        ("fresh",), NAMES, BUDGET, f"how purified defences are judged: {', '.join(PROTOCOLS)}; separated by commas"
    )
    averages: tuple[int, ...] | None = option(
        None, WHOLES, BUDGET,
        f"purifications per answer of the protocol averaged (default: {','.join(map(str, AVERAGES))})",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("worst_only", WORST_ONLY)
        if self.eps == 0:
            raise ValueError(NO_ATTACK)
        if self.several and self.precision == AUTO:
            raise ValueError("Each eps might choose another precision; name the one that all shall take (--precision).")
        self._check_protocols()

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> Evaluation:
        """The evaluation of a paper, see :mod:`purify.evaluate.recipes`, with some options changed.

        Raises:
            ValueError: there is no such recipe, or an option is unknown or cannot take its value.
        """
        return cls(**{**choose(name, RECIPES, "recipe").options, **changes})

    def _check_protocols(self) -> None:
        for name in self.protocol:
            choose(name, PROTOCOLS, "--protocol")
        if self.worst_only is not None and self.protocol != ("fresh",):
            raise ValueError("--worst-only spares broken samples the attacks that --protocol needs; leave one out.")
        if self.averages is None:
            return
        if "averaged" not in self.protocol:
            raise ValueError("--averages is for --protocol averaged; add it, or leave --averages out.")
        for k in self.averages:
            check_count(k, "--averages")
        check_unique(self.averages, "entries of --averages", "name each number once")

    def run(self, progress: bool = True) -> Finished:
        """Attack, judge and check, resuming what is in the run's folder; prints nothing but the bar.

        Raises:
            ValueError: what does not fit together, or several eps (see :meth:`curve`); before any attack.
        """
        self.check_whole()
        from purify.evaluate.attacking import prepare  # builds networks from this description

        prepared = prepare(self)
        with prepared.open("from Python") as folder:
            prepared.attack(folder, progress)
            return prepared.finish(folder, progress, prepared.protocols(folder, progress))

    def curve(self, progress: bool = True) -> Curve | None:
        """Accuracy against all ``eps``, as :meth:`run` at each of them; resumes. None on torchrun's other processes.

        Raises:
            ValueError: what does not fit together; before any attack.
        """
        self.check_whole()
        from purify.evaluate.curve import measure, prepare_curve  # builds networks from this description

        return measure(prepare_curve(self), "from Python", progress)


@dataclass(frozen=True, kw_only=True)
class MinimumDistortion(Attacking):
    """The smallest radius at which fresh purifications fail, for each image: what ``purify distortion`` runs.

    Raises:
        ValueError: a value that an option cannot take, or a name that is not known; names the option.
    """

    eps: float | None = option(None, NUMBER, THREAT, "largest radius that is tried (default: twice the usual one)")
    attacks: tuple[str, ...] = option(
        ("pgd-eot",), NAMES, THREAT, "tried in turn at each radius until one succeeds; as for `purify attack`"
    )
    rate: float = option(0.5, NUMBER, BUDGET, "share of an image's fresh purifications that must fail, in (0, 1]")
    halvings: int = option(5, WHOLE, BUDGET, "halvings of the interval that holds the radius")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"--rate is a share in (0, 1], got {self.rate:g}.")
        check_count(self.halvings, "--halvings", 0)
        if self.threat_model not in NORMS:
            raise ValueError(
                f"Radii are bisected in {', '.join(NORMS)}, not in {self.threat_model}; name several radii of it for "
                "`purify attack --eps`."
            )
        if self.eps == 0:
            raise ValueError("--eps is the largest radius that is tried, and must be above 0.")
        if self.precision == AUTO:
            raise ValueError("Name the precision of the attacks: --precision auto is for `purify attack`.")

    def run(self, progress: bool = True) -> dict[str, Distortions]:
        """Search and confirm, resuming what is in the run's folder: what was found, by defence.

        Raises:
            ValueError: what does not fit together; before any attack.
        """
        self.check_whole()
        from purify.evaluate.distortion import prepare  # builds networks from this description

        ready = prepare(self)
        with ready.open("from Python") as folder:
            ready.search(folder, progress)
            return ready.finish(folder)


@dataclass(frozen=True, kw_only=True)
class Certification(Description):
    """Certificates of smoothed classifiers, attacked inside their radii: what ``purify certify`` runs.

    Raises:
        ValueError: a value that an option cannot take, or a name that is not known; names the option.
    """

    batch_size: int = option(16, WHOLE, RUN, "samples at once")
    method: tuple[str, ...] = option(
        ("cohen",), NAMES, WHAT, "cohen, multiscale, few-step, densepure, ssn, dssn; separated by commas"
    )
    sigma: tuple[float, ...] = option((0.25, 0.5, 1.0), NUMBERS, GAUSSIAN, "scales, separated by commas")
    score_model: tuple[str, ...] | None = option(
        None, NAMES, GAUSSIAN, f"denoisers, separated by commas: {SCORE_MODEL}; none: no denoiser"
    )
    precision: str = option(
        FLOAT32, TEXT, GAUSSIAN, f"of the denoiser, part of what is certified: {', '.join(PRECISIONS)}"
    )
    p0: float = option(0.5, NUMBER, GAUSSIAN, "threshold of the cascade")
    mode: str = option("strict", TEXT, GAUSSIAN, f"bounds of the cascade: {', '.join(MODES)}")
    votes: int = option(5, WHOLE, GAUSSIAN, "reverse processes of densepure for each noisy image")
    reverse_steps: int | None = option(
        None, WHOLE, GAUSSIAN, "reverse steps of each, and of few-step (default: 5 for densepure, 2 for few-step)"
    )
    reverse: str | None = option(
        None, TEXT, GAUSSIAN,
        f"their rule: {', '.join(REVERSE_RULES)} (default: ddpm for densepure, ddim for few-step)",
    )  # fmt: skip
    lam: float | None = option(
        None, NUMBER, SPLITTING, "lambda (default: the one that the classifier was trained with)"
    )
    budget: str = option("quick", TEXT, BUDGET, f"draws: {', '.join(DRAWS)}", "--budget", "--preset")
    selection_draws: int | None = option(None, WHOLE, BUDGET, "n0, draws that choose the class")
    draws: int | None = option(None, WHOLE, BUDGET, "n, draws that bound its probability")
    alpha: float = option(0.001, NUMBER, BUDGET, "probability of failure")
    sampling: str = option(
        "fixed", TEXT, BUDGET,
        f"{' or '.join(SAMPLING)}: all draws, or for each image until it is settled which of --radii hold",
    )  # fmt: skip
    attack_examples: int | None = option(None, WHOLE, BUDGET, "images attacked inside their radius")
    attack_steps: int = option(20, WHOLE, BUDGET, "steps of that PGD")
    eot: int = option(16, WHOLE, BUDGET, "draws per gradient of that PGD")
    radii: tuple[float, ...] | None = option(
        None, NUMBERS, RUN,
        "radii of the table and of anytime sampling, separated by commas (default: L2 up to 2, L1 shares of lambda)",
    )  # fmt: skip

    linf_radii: tuple[float, ...] | None = option(
        None, NUMBERS, RUN, "also a table and curve in L_inf at these radii, which follow from each system's own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("mode", MODES)
        self._choose("budget", DRAWS)
        self._choose("sampling", SAMPLING)
        if self.reverse is not None:
            self._choose("reverse", REVERSE_RULES)
        self._choose("precision", PRECISIONS)

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in given.items() if name not in OLD}
        if given.get("stop_radius") is not None:
            radius = given["stop_radius"]
            note(f"--stop-radius {radius} is now called --sampling anytime --radii {radius}, and needs no --looks")
            found.update(sampling="anytime", radii=radius)
        return found

    def run(self) -> dict[str, Summary]:
        """Certify and attack inside the radii, resuming what is in the run's folder: a summary for each system.

        Raises:
            ValueError: what does not fit together; before anything is drawn.
        """
        self.check_whole()
        from purify.evaluate.systems import prepare  # builds networks from this description

        ready = prepare(self)
        with ready.open("from Python") as folder:
            ready.certify(folder)
            return ready.finish(folder)
