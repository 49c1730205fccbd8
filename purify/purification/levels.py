"""Noise-level rules: how far each sample is diffused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from purify import registry
from purify.checks import choose, is_number, short
from purify.diffusion.noise import Noise
from purify.diffusion.score import ScoreModel
from purify.plugin import is_in_file, load_class
from purify.purification.scorenorm import Calibration, Total


@dataclass(frozen=True)
class Settings:
    """What whoever names a rule (a command line, :func:`purify.wrap`) can tell it; see :attr:`NoiseLevel.takes`.

    Attributes:
        t_star: the base level.
        find_calibration: loads the calibration of the score norm, or gives None; called only for rules that take it.
        bias, t_max, tau, tau_unit: of :class:`SSNILinear` and :class:`SSNISigmoid`; None: the rule's default.
    """

    t_star: float
    find_calibration: Callable[[], Calibration | None]
    bias: float | None = None
    t_max: float | None = None
    tau: float | None = None
    tau_unit: str | None = None

    @property
    def calibration(self) -> Calibration | None:
        return self.find_calibration()


class NoiseLevel(ABC):
    """A statistic of each image and a map from it to the noise level t*.

    Attributes:
        varies: whether t* differs between images.
        takes: which of the rule's parameters :class:`Settings` may fill, where it has parameters of these names.
        calls: network calls per image that the statistic takes.
        centre, scale: the statistic's mean and spread on clean images, so that attacks can speak of it in units of
            its own.
    """

    varies: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("t_star",)

    @property
    def calls(self) -> int:
        return 0

    @property
    def highest(self) -> float:
        """A bound that t* never exceeds."""
        return 1.0

    @property
    def centre(self) -> float:
        return 0.0

    @property
    def scale(self) -> float:
        return 1.0

    @abstractmethod
    def statistic(self, model: ScoreModel, u: Tensor, noise: Noise, total: Total) -> Tensor:
        """Float64 (N,), differentiable, of images u (N, C, H, W) in [-1, 1] space.

        Network evaluations of u go through ``total(terms, u)``, their sum, so that the gradient engine can keep or
        recompute their graphs.
        """

    @abstractmethod
    def level(self, statistic: Tensor) -> Tensor:
        """Noise levels in (0, 1], float64 (N,), differentiable almost everywhere."""

    def check(self, model: ScoreModel) -> None:  # noqa: B027 - most rules take any model
        """Raise ValueError if the rule cannot be used with ``model``."""

    @classmethod
    def parameters(cls) -> set[str]:
        """Names of the rule's own parameters."""
        return {f.name for f in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def taken(cls, settings: Settings) -> dict[str, Any]:
        """The parameters that ``settings`` fills."""
        found = {name: getattr(settings, name) for name in cls.takes if name in cls.parameters()}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Constant(NoiseLevel):
    """The same t* in (0, 1] for every sample (DiffPure)."""

    t_star: float

    varies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_level(self.t_star, "t_star")

    @property
    def highest(self) -> float:
        return self.t_star

    def statistic(self, model: ScoreModel, u: Tensor, noise: Noise, total: Total) -> Tensor:
        return torch.zeros(len(u), dtype=torch.float64, device=u.device)

    def level(self, statistic: Tensor) -> Tensor:
        return torch.full_like(statistic, self.t_star)


@dataclass(frozen=True)
class _SSNI(NoiseLevel):
    """What the two SSNI rules share.

    Args:
        t_star: the base level in (0, 1].
        calibration: from :func:`purify.calibrate`, or its config.
        bias: b, added to the level.
        t_min: least level (inferred; one discrete step).
        t_max: greatest level; default ``t_star + bias``, that of the largest reference norm (inferred).

    Raises:
        ValueError: no calibration, levels outside (0, 1].
    """

    t_star: float
    calibration: Calibration | None = None
    bias: float = 0.0
    t_min: float = 1e-3
    t_max: float | None = None

    takes: ClassVar[tuple[str, ...]] = ("t_star", "calibration", "bias", "t_max")

    def __post_init__(self) -> None:
        _check_level(self.t_star, "t_star")
        if isinstance(self.calibration, Mapping):
            object.__setattr__(self, "calibration", Calibration.from_config(self.calibration))
        if not isinstance(self.calibration, Calibration):
            raise ValueError(
                "SSNI needs a calibration on clean training images: pass "
                "calibration=purify.calibrate(score_model, images)."
            )
        if not (is_number(self.bias) and 0 <= self.bias < 1):
            raise ValueError(f"The SSNI bias must lie in [0, 1), got {self.bias}.")
        _check_level(self.t_min, "t_min")
        _check_level(self.highest, "t_max (default: t_star + bias)")
        if self.t_min > self.highest:
            raise ValueError(f"t_min = {self.t_min} must not exceed t_max = {self.highest}.")

    @property
    def reference(self) -> Calibration:
        """The calibration, which is there."""
        assert isinstance(self.calibration, Calibration)
        return self.calibration

    @property
    def highest(self) -> float:
        """The greatest level."""
        return self.t_star + self.bias if self.t_max is None else self.t_max

    @property
    def calls(self) -> int:
        return self.reference.norm.draws

    @property
    def centre(self) -> float:
        return self.reference.mean

    @property
    def scale(self) -> float:
        return self.reference.std

    def statistic(self, model: ScoreModel, u: Tensor, noise: Noise, total: Total) -> Tensor:
        return self.reference.norm(model, u, noise, total)

    def check(self, model: ScoreModel) -> None:
        self.reference.check(model)

    def level(self, statistic: Tensor) -> Tensor:
        return self._unclipped(statistic).clamp(self.t_min, self.highest)

    @abstractmethod
    def _unclipped(self, norm: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SSNILinear(_SSNI):
    """SSNI-L (Sun et al. 2025): t*(x) = clip((n - xi_min) / (xi_max - xi_min) t* + b, t_min, t_max).

    n is the score norm, xi_min and xi_max its range on clean images. Arguments as in :class:`_SSNI`'s docstring:
    ``t_star``, ``calibration``, ``bias`` (b), ``t_min``, ``t_max``.
    """

    def _unclipped(self, norm: Tensor) -> Tensor:
        low, high = self.reference.xi_min, self.reference.xi_max
        return (norm - low) / (high - low) * self.t_star + self.bias


TAU_UNITS = ("std", "norm")


@dataclass(frozen=True)
class SSNISigmoid(_SSNI):
    """SSNI-N (Sun et al. 2025): t*(x) = clip((t* + b) / (1 + exp(-(n - mu) / tau)), t_min, t_max).

    Arguments as for :class:`SSNILinear`, and

        tau: temperature.
        tau_unit: ``std``: tau is in standard deviations of the reference norms, which carries over between models;
            ``norm``: in units of the norm, as in the paper (20 on CIFAR-10, inferred).
    """

    tau: float = 1.0
    tau_unit: str = "std"

    takes: ClassVar[tuple[str, ...]] = (*_SSNI.takes, "tau", "tau_unit")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.tau_unit, dict.fromkeys(TAU_UNITS), "unit of tau")
        if not (is_number(self.tau) and self.tau > 0):
            raise ValueError(f"tau must be a positive number, got {self.tau}.")

    def _unclipped(self, norm: Tensor) -> Tensor:
        tau = self.tau * (self.reference.std if self.tau_unit == "std" else 1.0)
        return (self.t_star + self.bias) * torch.sigmoid((norm - self.reference.mean) / tau)


@dataclass(frozen=True)
class Share(NoiseLevel):
    """A share in (0, 1] of another rule's level: for attacks that look at less noise than there is."""

    rule: NoiseLevel
    share: float

    def __post_init__(self) -> None:
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise ValueError(f"A share of the noise level must lie in (0, 1], got {short(self.share)}.")

    @property
    def calls(self) -> int:
        return self.rule.calls

    @property
    def highest(self) -> float:
        return self.share * self.rule.highest

    @property
    def centre(self) -> float:
        return self.rule.centre

    @property
    def scale(self) -> float:
        return self.rule.scale

    def statistic(self, model: ScoreModel, u: Tensor, noise: Noise, total: Total) -> Tensor:
        return self.rule.statistic(model, u, noise, total)

    def level(self, statistic: Tensor) -> Tensor:
        return self.share * self.rule.level(statistic)

    def check(self, model: ScoreModel) -> None:
        self.rule.check(model)


def _check_level(value: Any, what: str) -> None:
    if not (is_number(value) and 0 < value <= 1):
        steps = is_number(value) and value > 1
        advice = f"; of 1000 diffusion steps, {value:g} are {value / 1000:g}" if steps and value <= 1000 else ""
        raise ValueError(f"{what} must lie in (0, 1], got {short(value)}{advice}.")


LEVELS: dict[str, type[NoiseLevel]] = {"constant": Constant, "ssni-l": SSNILinear, "ssni-n": SSNISigmoid}


def find_level(name: str) -> type[NoiseLevel]:
    """The rule of this name, or of ``file.py:Class``.

    Raises:
        ValueError: unknown name, or a class that is no rule.
    """
    if is_in_file(name):
        return load_class(name, NoiseLevel, "noise level")
    return choose(name, LEVELS, "noise level")


def build_level(name: str, settings: Settings, own: Mapping[str, Any]) -> NoiseLevel:
    """The rule of this name: what it takes from ``settings``, and on top its ``own`` parameters.

    Raises:
        ValueError: unknown names; as the rule.
    """
    kind = find_level(name)
    if "kind" in own:
        raise ValueError(f"The noise level {name} has no parameter 'kind'; name another level instead.")
    return registry.build({"kind": name, **kind.taken(settings), **own}, {name: kind}, f"noise level {name}")
