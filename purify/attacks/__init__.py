"""Attacks on purified classifiers. Each sees a model as a function from images to logits, nothing inside."""

import re

from purify.attacks.adaptive import Adaptive
from purify.attacks.apgd import APGD
from purify.attacks.autoattack import AutoAttack, AutoAttackRand, Square
from purify.attacks.base import Attack, AttackResult
from purify.attacks.frequency import LowFrequencyPGD
from purify.attacks.goals import WRITTEN, Goal, MostLikely, OneClass, find_goal
from purify.attacks.level import ConstantLevelAutoAttackRand, ConstantLevelPGD, LowLevelPGD, NormAutoAttackRand, NormPGD
from purify.attacks.noise import RandomNoise
from purify.attacks.pgd import BPDA, PGD, FirstOrderPGD, SurrogatePGD
from purify.attacks.published import LeeKimPGD
from purify.attacks.spatial import SpatialPGD, SpatialTransfer
from purify.attacks.steps import StepsPGD
from purify.attacks.targeted import TargetedAPGD, TargetedPGD
from purify.attacks.transfer import GuidePGD, GuideTransfer, Transfer
from purify.checks import choose
from purify.plugin import is_in_file, load_class

ATTACKS: dict[str, type[Attack]] = {
    a.name: a
    for a in (
        RandomNoise,
        Adaptive,
        PGD,
        APGD,
        TargetedPGD,
        TargetedAPGD,
        StepsPGD,
        LowFrequencyPGD,
        ConstantLevelPGD,
        NormPGD,
        LowLevelPGD,
        FirstOrderPGD,
        BPDA,
        SurrogatePGD,
        AutoAttackRand,
        ConstantLevelAutoAttackRand,
        NormAutoAttackRand,
        Transfer,
        GuideTransfer,
        GuidePGD,
        Square,
        SpatialPGD,
        SpatialTransfer,
    )
}


# As papers ran them, for recipes: weaker than ours by their own steps, so no part of `strongest`.
PUBLISHED: dict[str, type[Attack]] = {LeeKimPGD.name: LeeKimPGD}


def find_attack(name: str) -> type[Attack]:
    """The attack of this name, or of ``file.py:Class``: a dataclass below :class:`Attack` with ``norm`` and ``eps``.

    Raises:
        ValueError: unknown name, or a class that is no attack.
    """
    return load_class(name, Attack, "attack") if is_in_file(name) else choose(name, ATTACKS | PUBLISHED, "attack")


def split_goal(name: str) -> tuple[str, Goal | None]:
    """``NAME@GOAL``, as ``pgd-eot@3`` or ``bpda-eot@top-9``, and the goal, if one is written there.

    Raises:
        ValueError: an attack of ours, and no goal behind the @.
    """
    start, at, goal = name.rpartition("@") if isinstance(name, str) else (name, "", "")
    ours = start in ATTACKS | PUBLISHED  # an @ of another name may be part of a file's
    return (start, find_goal(goal)) if at and (ours or WRITTEN.fullmatch(goal)) else (name, None)


def kind_of(label: str) -> type[Attack] | None:
    """The class of the attack that records call ``label``; None for an attack that is not one of ours."""
    return (ATTACKS | PUBLISHED).get(re.split(r"[(@]", label)[0])


__all__ = [
    "APGD",
    "ATTACKS",
    "BPDA",
    "PGD",
    "PUBLISHED",
    "Adaptive",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackRand",
    "ConstantLevelAutoAttackRand",
    "ConstantLevelPGD",
    "FirstOrderPGD",
    "Goal",
    "GuidePGD",
    "GuideTransfer",
    "LeeKimPGD",
    "LowFrequencyPGD",
    "LowLevelPGD",
    "MostLikely",
    "NormAutoAttackRand",
    "NormPGD",
    "OneClass",
    "RandomNoise",
    "SpatialPGD",
    "SpatialTransfer",
    "Square",
    "StepsPGD",
    "SurrogatePGD",
    "TargetedAPGD",
    "TargetedPGD",
    "Transfer",
    "find_attack",
    "kind_of",
    "split_goal",
]
