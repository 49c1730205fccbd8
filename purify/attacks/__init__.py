"""Attacks on purified classifiers. Each sees a model as a function from images to logits, nothing inside."""

from purify.attacks.autoattack import AutoAttack, AutoAttackRand
from purify.attacks.base import Attack, AttackResult
from purify.attacks.level import ConstantLevelAutoAttackRand, ConstantLevelPGD, NormPGD
from purify.attacks.pgd import BPDA, PGD, SurrogatePGD

ATTACKS: dict[str, type[Attack]] = {
    a.name: a
    for a in (PGD, ConstantLevelPGD, NormPGD, BPDA, SurrogatePGD, AutoAttackRand, ConstantLevelAutoAttackRand)
}

__all__ = [
    "ATTACKS",
    "BPDA",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackRand",
    "ConstantLevelAutoAttackRand",
    "ConstantLevelPGD",
    "NormPGD",
    "SurrogatePGD",
]
