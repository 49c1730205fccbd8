"""Published defences by name: functions that return a configured Purifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from purify.checks import choose
from purify.levels import NoiseLevel
from purify.plans import Plan
from purify.purifier import DEFAULT_ENGINE, Purifier
from purify.schedule import DiscreteVP
from purify.score import ScoreModel

# DiffPure's program diffuses with the discrete table but reverses the continuous SDE down to 1e-5, and hands the
# result on unclamped.
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
            :class:`~purify.levels.SSNISigmoid` that gives each sample its own.
        steps: reverse steps, or an execution plan; with ``t_star / steps`` = 1e-3 these are DiffPure's.
        reverse: reverse rule: ``sde`` (DiffPure), ``ddpm``, ``ddim``, ``ode``, ``one-shot``, or a rule object.
        gradient: gradient engine: ``full``, ``checkpoint``, ``adjoint``, ``bpda``, ``surrogate``, or an engine object.
        variant: ``consistent`` (default), or ``published``: the released program's exact time convention, noise by
            the discrete table abar[T-1] and reverse SDE from the continuous time T/1000 to 1e-5.
    """
    options = choose(variant, DIFFPURE_VARIANTS, "DiffPure variant")
    return Purifier(score_model, t_star, reverse, steps, gradient=gradient, **options)


PURIFIERS: dict[str, Callable[..., Purifier]] = {"diffpure": diffpure}
