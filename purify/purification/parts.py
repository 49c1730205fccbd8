"""What a purifier is made of, as it may be given: itself, its name, its config, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from torch import nn

from purify import registry
from purify.checks import check_count, is_number, short
from purify.diffusion.reverse import ReverseRule
from purify.fingerprint import weights_digest
from purify.purification.levels import LEVELS, Constant, NoiseLevel
from purify.purification.plans import PLANS, FixedSteps, Held, Plan

T = TypeVar("T")


def as_part(value: Any, known: Mapping[str, type[T]], base: type[T], what: str) -> T:
    """A part given as itself, by name, or as its config."""
    if isinstance(value, base):
        return value
    if isinstance(value, (str, Mapping)):
        return registry.build(value, known, what)
    raise ValueError(f"{short(value)} is not a {what}; give one of {', '.join(sorted(known))}.")


def as_level(level: float | NoiseLevel | Mapping[str, Any]) -> NoiseLevel:
    """A rule for t*; a number is constant."""
    if isinstance(level, Real):
        return Constant(float(level) if is_number(level) else level)  # type: ignore[arg-type]
    return as_part(level, LEVELS, NoiseLevel, "noise level")


def as_plan(steps: Any, rule: ReverseRule) -> Plan:
    """A plan given as itself, by its config, or as a number of steps of ``rule``."""
    if isinstance(steps, (Plan, Mapping)):
        return as_part(steps, PLANS, Plan, "execution plan")
    check_count(steps, "steps")
    return Held(steps) if rule.held else FixedSteps(steps)


def as_rounds(rounds: int | Sequence[float]) -> tuple[float, ...]:
    """Shares of t*, one per round."""
    if isinstance(rounds, int):
        check_count(rounds, "rounds")
        return (1.0,) * rounds
    try:
        shares = tuple(float(share) for share in rounds)
    except (TypeError, ValueError):
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"rounds must be a whole number, or shares of t* in (0, 1], got {short(rounds)}.")
    return shares


def held_against(network: nn.Module | None, wanted: str) -> nn.Module:
    """The auxiliary network, which must have the fingerprint that a config names."""
    if network is None or weights_digest(network) != wanted:
        what = "no" if network is None else "another"
        raise ValueError(
            f"This purifier is guided by an auxiliary network of fingerprint {wanted[:12]}, but {what} network was "
            "given; pass it as auxiliary=."
        )
    return network
