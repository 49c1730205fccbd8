"""AutoAttack's well-known interface over the original ``autoattack`` or the registry's ``pyautoattack``."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from purify.answers import as_logits
from purify.attacks.base import NORMS, Attack, AttackResult, check_budget, check_model
from purify.attacks.counting import count
from purify.attacks.kinks import Watched
from purify.checks import check_count, check_images, check_labels, check_writable, choose, is_number, short
from purify.diffusion.noise import derive_seed


def backend() -> ModuleType:
    """The installed AutoAttack package, the original one first.

    Raises:
        ImportError: neither is installed.
    """
    if is_original_installed():
        try:
            return import_module("autoattack")
        except ImportError as error:
            advice = "remove its folder from site-packages (torchattacks 3.3 brings one), then pyautoattack is used"
            raise ImportError(f"The installed autoattack cannot be imported ({error}); {advice}.") from error
    if util.find_spec("pyautoattack") is not None:
        return import_module("pyautoattack")
    raise ImportError("AutoAttack is not installed; run `pip install pyautoattack`.")


def is_original_installed() -> bool:
    """Whether ``autoattack`` comes from its own package and not from our stand-in (``purify.compat``)."""
    try:
        spec = util.find_spec("autoattack")
    except ValueError:  # a module without a spec: somebody else put it there
        return True
    return spec is not None and spec.origin != "purify"


VERSIONS = ("standard", "plus", "rand", "custom")
PARTS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
LOOK = 4  # images on which the model is looked at before an attack
CLASSES = {"apgd-dlr": 3, "apgd-t": 4, "fab-t": 2}  # that a model must have: DLR divides by the third logit, or fourth


class AutoAttack:
    """``autoattack.AutoAttack`` as RobustBench and most papers call it.

    Args:
        model: images in [0, 1] to logits.
        norm: ``Linf``, ``L2`` or ``L1``.
        eps: radius.
        seed: seed of the attacks (None: the clock, as in the original).
        verbose: report progress on the standard error stream.
        attacks_to_run: names of attacks, with ``version="custom"``.
        version: ``standard``, ``plus``, ``rand`` or ``custom``.
        device: where to attack; default: where the model's parameters are.
        log_path: file that the report is also written to.

    Gradients are taken inside [0, 1] where the model's vanish at its ends (:mod:`purify.attacks.kinks`). On models of
    few classes, attacks that need more are left out with a warning, and targeted ones aim at the classes that there
    are.

    The parts ``apgd``, ``apgd_targeted``, ``fab``, ``square`` and everything else are those of the backend.

    Raises:
        ValueError: unknown norm or version, a TensorFlow model.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: list[str] | None = None,
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        if is_tf_model:
            raise ValueError("Only PyTorch models are supported; pass is_tf_model=False.")
        choose(norm, dict.fromkeys(NORMS), "norm of AutoAttack")
        check_model(model)
        if not (is_number(eps) and eps >= 0 and (norm != "Linf" or eps <= 1)):
            raise ValueError(f"eps must be a number of at least 0, in Linf at most 1, got {short(eps)}.")
        choose(version, dict.fromkeys(VERSIONS), "version of AutoAttack")
        if device is None:
            parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
            device = "cpu" if parameter is None else parameter.device
        for part in attacks_to_run or []:
            choose(part, dict.fromkeys(PARTS), "attack of AutoAttack")
        if log_path is not None:
            check_writable(Path(log_path), "log_path")
        package = backend()
        self._original = package.__name__ == "autoattack"
        self.verbose, self.log_path = verbose, log_path
        self._watched, self._device = Watched(model), device
        common: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "version": version, "device": device}
        if self._original:
            extra = {"verbose": verbose, "attacks_to_run": attacks_to_run or [], "log_path": log_path}
            self._backend = package.AutoAttack(self._watched, **common, **extra)
        else:
            self._backend = package.AutoAttack(self._watched, attacks=attacks_to_run or None, **common)

    def __getattr__(self, name: str) -> Any:
        if name == "_backend":
            raise AttributeError(name)
        return getattr(self._backend, name)

    @property
    def attacks_to_run(self) -> list[str]:
        """Names of the attacks, in order."""
        return self._backend.attacks_to_run

    @attacks_to_run.setter
    def attacks_to_run(self, names: list[str]) -> None:
        self._backend.attacks_to_run = names

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks and parameters of another version."""
        choose(version, dict.fromkeys(VERSIONS), "version of AutoAttack")
        (self._backend.set_version if self._original else self._backend._set_version)(version)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Adversarial images (those that no attack broke are returned as they came), and labels if asked for."""
        _check_batch(x_orig, y_orig)
        self._prepare(x_orig)
        size = {"bs": bs, "return_labels": True} if self._original else {"batch_size": bs}
        state = {} if state_path is None else {"state_path": Path(state_path)}
        with torch.enable_grad(), self._logging():
            images, labels = self._backend.run_standard_evaluation(x_orig, y_orig, **size, **state)
        return (images, labels) if return_labels else images

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """What each attack finds by itself: name -> images, or (images, labels) if asked for."""
        _check_batch(x_orig, y_orig)
        self._prepare(x_orig)
        size = {"bs": bs, "return_labels": True} if self._original else {"batch_size": bs}
        with torch.enable_grad(), self._logging():
            found = self._backend.run_standard_evaluation_individual(x_orig, y_orig, **size)
        return found if return_labels else {name: images for name, (images, _) in found.items()}

    def _prepare(self, x: Tensor) -> None:
        """Look at the model on a few images."""
        check_model(self._watched.model)
        few = x[:LOOK].to(self._device)
        if len(few) and set(self.attacks_to_run) != {"square"}:
            self._watched.look(few)
            self._fit_classes(few[:1])

    def _fit_classes(self, x: Tensor) -> None:
        """Leave out attacks that need more classes than the model has, and aim at no more targets than there are.

        Raises:
            ValueError: no attack is left.
        """
        names = self.attacks_to_run
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            k = self._watched(x).shape[-1]
        for part in (self._backend.apgd_targeted, self._backend.fab):
            part.n_target_classes = min(part.n_target_classes, k - 1)
        kept = [name for name in names if CLASSES.get(name, 0) <= k]
        if kept == names:
            return
        lost = ", ".join(name for name in names if name not in kept)
        if not kept:
            raise ValueError(f"{lost} needs more classes than the {k} of this model; use apgd-ce, fab or square.")
        warnings.warn(f"{lost} needs more classes than the {k} of this model and is left out.", stacklevel=3)
        self.attacks_to_run = kept

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """pyautoattack reports to a logger only; the original prints and writes its file by itself."""
        handlers: list[logging.Handler] = []
        if not self._original:
            handlers += [logging.StreamHandler()] if self.verbose else []
            handlers += [logging.FileHandler(self.log_path)] if self.log_path else []
        logger = logging.getLogger("auto-attack")
        level, propagate = logger.level, logger.propagate
        if handlers:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(level)
            logger.propagate = propagate


def _check_batch(images: Tensor, labels: Tensor) -> None:
    check_images(images)
    check_labels(labels, len(images))
    check_count(len(images), "images to attack")


def set_apgd_steps(apgd: Any, steps: int) -> None:
    """Give the package's APGD another number of steps.

    It places its checkpoints when it is made, for 100 steps: with ``n_iter`` alone changed to 20 the first would come
    after the last step, and the step size would stay at 2 eps.
    """
    apgd.n_iter = apgd.n_iter_orig = steps
    shares = {"n_iter_2": 0.22, "n_iter_min": 0.06, "size_decr": 0.03}  # Croce & Hein 2020, section 3.1
    for name, share in shares.items():
        setattr(apgd, name, max(int(share * steps), 1))


@dataclass(frozen=True)
class _Library(Attack):
    """An attack of the AutoAttack package, run on fixed groups of sample ids under a seed of the group's own.

    AutoAttack decides on a single draw: an image that is wrong on its first draw is not attacked, and one that no
    attack broke is returned as it came. Judged on fresh draws such images score like clean ones, so never quote such an
    attack alone for a randomized defence.
    """

    group_size: ClassVar[int | None] = 32

    @abstractmethod
    def prepare(self, model: nn.Module, seed: int, device: torch.device) -> AutoAttack:
        """The package's attack with this one's budget."""

    def run(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        assert self.group_size is not None
        images = x.clone()
        groups = ids // self.group_size
        attacked = self.attacked(model)
        with self._counting(attacked, 0 if self.black_box else self.gradient_calls(model)):
            for group in groups.unique().tolist():
                rows = (groups == group).nonzero()[:, 0]
                rows = rows[ids[rows].argsort()]
                images[rows] = self._run_group(attacked, x[rows], y[rows], derive_seed(seed, group))
        return AttackResult(images, torch.full((len(x),), float("nan"), device=x.device))

    @contextmanager
    def _counting(self, model: Any, each: int) -> Iterator[None]:
        """Counts the model's calls: those with a gradient, or all of a black-box attack. Functions are not counted.

        ``each``: network calls of one; 0 where they are queries, which are seen by themselves.
        """

        def called(model: Any, inputs: tuple[Any, ...], output: Any) -> None:
            logits = as_logits(output)
            if self.black_box or logits.requires_grad:
                count(len(logits), each)

        hook = model.register_forward_hook(called) if isinstance(model, nn.Module) else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _run_group(self, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            found = self.prepare(model, seed % 2**31, x.device).run_standard_evaluation(x, y, bs=len(x))
        assert isinstance(found, Tensor)
        return found.detach()


@dataclass(frozen=True)
class AutoAttackRand(_Library):
    """AutoAttack's ``rand`` version: APGD on cross-entropy and on DLR, with EOT (Croce & Hein 2020).

    Args:
        norm, eps: threat model and radius.
        steps: APGD iterations (the original: 100).
        eot: draws per gradient (the original: 20).

    It decides on a single draw (see :class:`_Library`): never quote it alone for a randomized defence.
    """

    steps: int = 100
    eot: int = 20

    name: ClassVar[str] = "autoattack-rand"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.steps, self.eot, 1)

    def prepare(self, model: nn.Module, seed: int, device: torch.device) -> AutoAttack:
        attack = AutoAttack(model, self.norm, self.eps, seed, verbose=False, version="rand", device=device)
        set_apgd_steps(attack.apgd, self.steps)
        attack.apgd.eot_iter = self.eot
        return attack

    @property
    def gradients(self) -> int:
        return 2 * (self.steps + 1) * self.eot  # on cross-entropy and on DLR

    def on_deterministic(self) -> Attack:
        return replace(self, eot=1)


@dataclass(frozen=True)
class Square(_Library):
    """Square (Andriushchenko et al. 2020), black box: ``queries`` random squares, kept where they raise the loss.

    The squares shrink over ``queries``, by the schedule published for 10,000 (ibid., section 4.1) rescaled.
    It needs no gradient, so it must not beat the attacks that have one; where it does, their gradient is masked.
    """

    queries: int = 1000

    name: ClassVar[str] = "square"
    black_box: ClassVar[bool] = True
    takes_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.queries, "queries")

    @property
    def forwards(self) -> int:
        return self.queries

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "schedule": "rescaled"}  # older runs did not, and are not resumed

    def prepare(self, model: nn.Module, seed: int, device: torch.device) -> AutoAttack:
        settings: dict[str, Any] = {"version": "custom", "attacks_to_run": ["square"], "verbose": False}
        attack = AutoAttack(model, self.norm, self.eps, seed, device=device, **settings)
        attack.square.n_queries = self.queries
        attack.square.rescale_schedule = True  # else squares shrink as if there were 10,000 queries
        return attack
