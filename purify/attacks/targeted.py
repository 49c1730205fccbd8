"""Attacks at the most likely wrong classes in turn. Every other PGD attack takes a goal, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from purify.attacks.apgd import APGD
from purify.attacks.goals import Goal
from purify.attacks.pgd import PGD


@dataclass(frozen=True)
class TargetedPGD(PGD):
    """PGD+EOT at the three most likely wrong classes in turn (multi-targeted, Gowal et al. 2019)."""

    goal: Goal | int | str = "top-3"

    name: ClassVar[str] = "pgd-eot-targeted"


@dataclass(frozen=True)
class TargetedAPGD(APGD):
    """APGD+EOT at the three most likely wrong classes in turn (AutoAttack's targeted APGD aims at nine)."""

    goal: Goal | int | str = "top-3"

    name: ClassVar[str] = "apgd-targeted"
