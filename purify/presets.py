"""Published defences by name: functions that return a configured Purifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from purify import registry, zoo
from purify.checks import choose, nearest
from purify.diffusion.langevin import Langevin
from purify.diffusion.reverse import DDIM
from purify.diffusion.schedule import DiscreteVP
from purify.diffusion.score import ScoreModel
from purify.plugin import is_in_file, load_function
from purify.purification.guidance import GUIDANCES
from purify.purification.levels import LEVELS, NoiseLevel
from purify.purification.likelihood import LikelihoodAscent
from purify.purification.plans import FixedDt, Held, Plan
from purify.purification.purifier import DEFAULT_ENGINE, Purifier

# DiffPure's program diffuses with the discrete table but reverses the continuous SDE down to 1e-5, with any network,
# and hands the result on unclamped.
DIFFPURE_VARIANTS: dict[str, dict[str, Any]] = {
    "consistent": {},
    "published": {"t_end": 1e-5, "forward_schedule": DiscreteVP.linear(1000), "clip": False},
}


def diffpure(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.1,
    steps: int | Plan | Mapping[str, Any] = 100,
    reverse: Any = "sde",
    gradient: Any = DEFAULT_ENGINE,
    variant: str = "consistent",
) -> Purifier:
    """DiffPure (Nie et al. 2022): one diffusion to ``t_star`` and one reverse process.

    Args:
        score_model: the diffusion model.
        t_star: noise level in (0, 1] (CIFAR-10 L_inf 8/255: 0.1; ImageNet 4/255: 0.15), or a rule such as
            :class:`~purify.purification.levels.SSNISigmoid` that gives each sample its own.
        steps: reverse steps, or an execution plan; with ``t_star / steps`` = 1e-3 these are DiffPure's.
        reverse: reverse rule: ``sde`` (DiffPure), ``ddpm``, ``ddim``, ``ode``, ``one-shot``, or a rule object.
        gradient: gradient engine: ``full``, ``checkpoint``, ``adjoint``, ``bpda``, ``surrogate``, or an engine object.
        variant: ``consistent`` (default), or ``published``: the released program's time convention, noise by the
            discrete table abar[T-1] and the continuous reverse SDE from time T/1000 to 1e-5. A network of 1000 linear
            steps is driven so with ``score_model.with_settings(schedule=ContinuousVP(), time_scale=1000,
            time_offset=0)``: labels are then 1000 t, which in steps of 1e-3 are the program's whole ones.

    Raises:
        ValueError: what :class:`~purify.purification.purifier.Purifier` refuses; ``published`` for a
            model of a discrete schedule, whose own betas and labels are not the program's.
    """
    options = choose(variant, DIFFPURE_VARIANTS, "DiffPure variant")
    if variant == "published" and isinstance(score_model, ScoreModel) and isinstance(score_model.schedule, DiscreteVP):
        raise ValueError(
            "variant='published' reverses the continuous SDE, but this score model's schedule is discrete; use "
            "variant='consistent', or drive a network of 1000 linear steps as DiffPure does: score_model.with_settings("
            "schedule=purify.ContinuousVP(), time_scale=1000, time_offset=0)."
        )
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, **options)


def _guidance(settings: Mapping[str, Any], known: Mapping[str, Any], name: str, preset: Callable[..., Purifier]) -> Any:
    """Misspelt options of the preset itself, which end among the guidance's, are named, too."""
    own = set(inspect.signature(preset).parameters) - {"score_model", "options"}
    return registry.build(settings, known, f"guidance of {name}", own)


GDMP_SCALES = {"mse": 6e4, "ssim": 1e3}


def gdmp(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.036,
    steps: int | Plan | Mapping[str, Any] = 36,
    reverse: Any = "ddpm",
    gradient: Any = DEFAULT_ENGINE,
    scale: float | None = None,
    distance: str = "mse",
    rounds: int | Sequence[float] = 4,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """GDMP (Wang et al. 2022): several short purifications, each pulled towards the image that came in.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`; the defaults are those of CIFAR-10.
        scale: a of the guidance; default: 60000 for ``mse``, 1000 for ``ssim`` (inferred: public programs' on CIFAR-10
            and ImageNet). With ``mse``, images of d pixels need about 60000 d / 3072, and a step overshoots the image
            that came in where the step's variance times s_t times 2 / d exceeds 1: see docs/gdmp.md.
        distance: ``mse`` or ``ssim``.
        rounds: purifications in a row.
        second_order: see :class:`~purify.purification.guidance.Guidance`.
        options: of that guidance (``growth``, ``reference``, ``point``, ``t_min``, ``t_max``, ssim's ``sigma``, ...).
    """
    known = {name: kind for name, kind in GUIDANCES.items() if name in ("mse", "ssim")}
    choose(distance, known, "distance of GDMP")
    scale = GDMP_SCALES[distance] if scale is None else scale
    settings = {"kind": distance, "scale": scale, "second_order": second_order, **options}
    guidance = _guidance(settings, known, "GDMP", gdmp)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance, rounds=rounds)


def agdm(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.1,
    steps: int | Plan | Mapping[str, Any] = 100,
    reverse: Any = "ddpm",
    gradient: Any = DEFAULT_ENGINE,
    auxiliary: nn.Module | str | None = None,
    scale: float = 1.0,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """Robust diffusion, AGDM (Lin et al. 2024): one purification, guided by an adversarially trained network.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`.
        auxiliary: the network c_phi from images in [0, 1] to logits, or the name or path of one of the zoo's
            (``digits-guide``, ``fashion_mnist-guide``).
        scale: s of the guidance.
        second_order: see :class:`~purify.purification.guidance.Guidance`.
        options: of :class:`~purify.purification.guidance.AdversarialGuidance` (``layer``, ``point``, ``reference``,
            ``growth``, ``through_score``, ``t_min``, ``t_max``).
    """
    network = zoo.classifier(auxiliary) if isinstance(auxiliary, str) else auxiliary
    settings = {"kind": "adversarial", "scale": scale, "second_order": second_order, "auxiliary": network, **options}
    guidance = _guidance(settings, GUIDANCES, "AGDM", agdm)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance)


GNS_ROUNDS = tuple(step / 125 for step in (30, 30, 30, 30, 50, 50, 125, 125))


def gns(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.125,
    steps: int | Plan | Mapping[str, Any] = FixedDt(1e-3),  # noqa: B008 - immutable
    reverse: Any = "ddpm",
    gradient: Any = DEFAULT_ENGINE,
    rounds: int | Sequence[float] = GNS_ROUNDS,
) -> Purifier:
    """Gradual noise scheduling (Lee & Kim 2023): eight purifications in a row, with noise that grows.

    Theirs averages the logits of 10 runs: ``DefendedClassifier(classifier, gns(...), purifications=10)``, and was
    attacked through ``gradient=Surrogate(steps=(1, 1, 5), rounds=(3, 5, 7))``; the default gradient is exact.

    Args:
        score_model, reverse, gradient: as for :func:`diffpure`.
        t_star: noise level of the last rounds.
        steps: steps of every round; published: as many as the round's level has thousandths.
        rounds: the levels of the rounds as shares of ``t_star``; published: 30, 30, 30, 30, 50, 50, 125, 125 of 125.
    """
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, rounds=rounds)


def freqpure(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 1.0,
    steps: int | Plan | Mapping[str, Any] = 100,
    reverse: Any = DDIM(1.0),  # noqa: B008 - immutable
    gradient: Any = DEFAULT_ENGINE,
    scale: float = 1.0,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """FreqPure (Pei et al. 2025): the estimate's low frequencies follow those of the image that came in.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`; the defaults are the released program's.
        scale: share of the way to the projected estimate; 0 is DiffPure.
        second_order: see :class:`~purify.purification.conditioning.Conditioning`.
        options: of :class:`~purify.purification.frequency.FrequencyProjection` (``amplitude_radius``, ``phase_radius``,
            ``delta``, ``reference``, ``reference_t``, ``t_min``, ``t_max``).
    """
    settings = {"kind": "frequency", "scale": scale, "second_order": second_order, **options}
    guidance = _guidance(settings, GUIDANCES, "FreqPure", freqpure)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance)


DIFFAP_SCALE = 30_000 / 16  # the program's, whose mean goes over its batch of 16, too


def diffap(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 1.0,
    steps: int | Plan | Mapping[str, Any] = 5,
    reverse: Any = "random",
    gradient: Any = DEFAULT_ENGINE,
    scale: float = DIFFAP_SCALE,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """DiffAP (Zhang et al. 2024): random sampling, its estimates pulled towards the image that came in.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`; the defaults are the released program's.
        scale: of the pull; of images of d values about 1875 d / 3072, see docs/pulled.md.
        second_order: see :class:`~purify.purification.conditioning.Conditioning`.
        options: of :class:`~purify.purification.pulled.MediatorPull` (``t_min``, ``t_max``).
    """
    settings = {"kind": "mediator", "scale": scale, "second_order": second_order, **options}
    guidance = _guidance(settings, GUIDANCES, "DiffAP", diffap)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance)


MIMIC_SCALE = 3_000 / 16  # the program's, whose mean goes over its batch of 16, too


def mimicdiffusion(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 1.0,
    steps: int | Plan | Mapping[str, Any] = 100,
    reverse: Any = DDIM(1.0),  # noqa: B008 - immutable
    gradient: Any = DEFAULT_ENGINE,
    scale: float = MIMIC_SCALE,
    t_min: float = 0.1,
    t_max: float = 0.79,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """MimicDiffusion (Song et al. 2024): guided by long- and short-range Manhattan distances to the image that came in.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`; the defaults are the released program's.
        scale: of the guidance; of images of n pixels about 187.5 n / 1024.
        t_min, t_max: only steps that start in (t_min, t_max] are guided; the program's.
        second_order: see :class:`~purify.purification.conditioning.Conditioning`.
        options: of :class:`~purify.purification.pulled.ManhattanPull` (``factor``, ``softness``).
    """
    window = {"t_min": t_min, "t_max": t_max}
    settings = {"kind": "manhattan", "scale": scale, "second_order": second_order, **window, **options}
    guidance = _guidance(settings, GUIDANCES, "MimicDiffusion", mimicdiffusion)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance)


def heterogeneous(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.2,
    steps: int | Plan | Mapping[str, Any] = 100,
    reverse: Any = "ddim",
    gradient: Any = DEFAULT_ENGINE,
    auxiliary: nn.Module | str | None = None,
    second_order: bool = True,
    **options: Any,
) -> Purifier:
    """Heterogeneous noise (Pei et al. 2025): t* where a network looks, less noise elsewhere.

    Args:
        score_model, t_star, steps, reverse, gradient: as for :func:`diffpure`; the defaults are the released program's.
        auxiliary: the network whose attention counts, or the name or path of one of the zoo's; published: the
            classifier that is defended.
        second_order: see :class:`~purify.purification.conditioning.Conditioning`.
        options: of :class:`~purify.purification.heterogeneous.HeterogeneousNoise` (``threshold``, ``t_weak``,
            ``resample``, ``layers``, ``scale``, ``t_min``, ``t_max``).
    """
    network = zoo.classifier(auxiliary) if isinstance(auxiliary, str) else auxiliary
    settings = {"kind": "heterogeneous", "second_order": second_order, "auxiliary": network, **options}
    guidance = _guidance(settings, GUIDANCES, "heterogeneous noise", heterogeneous)
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, guidance=guidance)


LIKELIHOOD_STEPS = Held(5, spread=0.185)  # noise-to-signal 0.4 to 0.6 about 0.5


def likelihood(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.145,
    steps: int | Plan | Mapping[str, Any] = LIKELIHOOD_STEPS,
    reverse: Any = "likelihood",
    gradient: Any = DEFAULT_ENGINE,
    rate: float = 0.1,
    softness: float = 0.0,
) -> Purifier:
    """Score optimisation (Zhang et al. 2023; Chen et al. 2024): Adam steps of the image down its diffusion loss.

    Args:
        score_model, gradient: as for :func:`diffpure`.
        t_star: where the loss is taken.
        steps: how many, all at t*, or :class:`~purify.purification.plans.Held` with a spread; published: 5.
        reverse: the rule ``likelihood``, or one of one's own.
        rate, softness: of :class:`~purify.purification.likelihood.LikelihoodAscent`.
    """
    rule = LikelihoodAscent(rate, softness) if reverse == "likelihood" else reverse
    return Purifier(score_model, t_star, rule, steps, gradient=gradient)


def langevin(
    score_model: ScoreModel,
    t_star: float | NoiseLevel | Mapping[str, Any] = 0.01,
    steps: int | Plan | Mapping[str, Any] = 1500,
    reverse: Any = "langevin",
    gradient: Any = DEFAULT_ENGINE,
    step: float = 0.01,
    temperature: float = 1.0,
) -> Purifier:
    """Langevin purification (Hill et al. 2021): many noisy steps along the score, from the image as it came.

    Args:
        score_model, gradient: as for :func:`diffpure`; an energy is a score model, too.
        t_star: at which the score is asked (ours: an energy has no time).
        steps: how many; published: 1500.
        reverse: the rule ``langevin``, or one of one's own.
        step, temperature: of :class:`~purify.diffusion.langevin.Langevin`.
    """
    rule = Langevin(step, temperature) if reverse == "langevin" else reverse
    return Purifier(score_model, t_star, rule, steps, gradient=gradient)


PURIFIERS: dict[str, Callable[..., Purifier]] = {
    "diffpure": diffpure,
    "gdmp": gdmp,
    "agdm": agdm,
    "gns": gns,
    "freqpure": freqpure,
    "diffap": diffap,
    "mimicdiffusion": mimicdiffusion,
    "heterogeneous": heterogeneous,
    "likelihood": likelihood,
    "langevin": langevin,
}
SHARED = ("score_model", "t_star", "steps", "reverse", "gradient")  # parameters that every preset takes


def find_preset(name: str) -> tuple[Callable[..., Purifier], str | None]:
    """The preset of this name or ``file.py:function``, or DiffPure and the noise level of this name, at which it is.

    Raises:
        ValueError: unknown name; a preset that does not take what every preset takes.
    """
    if isinstance(name, str) and name not in PURIFIERS and name in LEVELS:
        return diffpure, name
    if isinstance(name, str) and is_in_file(name):
        preset = load_function(name)
    elif not isinstance(name, str) or name not in PURIFIERS:
        known, levels = (", ".join(sorted(names)) for names in (PURIFIERS, LEVELS))
        meant = nearest(name, [*PURIFIERS, *LEVELS])
        raise ValueError(
            f"Unknown purifier {name!r}{meant}; known: {known}, DiffPure's noise levels {levels}, and file.py:function."
        )
    else:
        preset = PURIFIERS[name]
    parameters = inspect.signature(preset).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [p for p in SHARED if p not in parameters and not (takes_any and p != "score_model")]
    if missing:
        raise ValueError(
            f"The purifier {name} lacks the parameter {', '.join(missing)}; every preset takes {', '.join(SHARED)}."
        )
    return preset, None
