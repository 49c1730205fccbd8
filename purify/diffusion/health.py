"""Is a diffusion model wired as it was trained? Its denoising error, against trivial denoisers and other readings.

At noise level s = sigma / alpha every VP schedule makes the same noisy image u_t = (u + s z) / sqrt(1 + s^2); schedules
differ in the label that the network gets with it. So a few network calls for each labelling tell all readings apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from purify.checks import check_count, check_images
from purify.diffusion.noise import Noise, derive_seed
from purify.diffusion.precision import evaluate
from purify.diffusion.schedule import ContinuousVP, DiscreteVP, Schedule
from purify.diffusion.score import PREDICTIONS, ScoreModel

FLAT = 1e-12  # error of a trivial denoiser on flat images
MOST = 1e6  # times the trivial error: worse is not told apart
LEVELS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
LIMIT = 0.9  # of the trivial denoisers' error: above it a network has learnt nothing. Embedded ones have 0.20 to 0.64.
MARGIN = 0.1  # of the error, that another reading must take off. A cosine schedule in place of a linear one: 0.43.
ALIKE = 0.005  # of the largest label: what labellings may differ by and be one
NEAR = 1.03  # readings whose errors are this close are told apart by how little they change
VALUES = 2**19  # pixels in all images together: more say nothing new
DATA = {"": "", "unit": "images in [0, 1]", "reversed": "channels in reverse order"}


@dataclass(frozen=True)
class Reading:
    """One way to read a network.

    Attributes:
        prediction, schedule, time_scale, time_offset: as :class:`~purify.diffusion.score.ScoreModel` takes them.
        data: what the network is shown: ``""`` for images in [-1, 1], ``unit`` for [0, 1], ``reversed`` for channels
            in reverse order. A score model has no setting for these two; wrap the network.
        errors: mean squared error of the denoised image at each level, in [-1, 1] space.
    """

    prediction: str
    schedule: Schedule
    time_scale: float
    time_offset: float
    data: str = ""
    errors: tuple[float, ...] = ()

    def __str__(self) -> str:
        offset = f" - {self.time_offset:g}" if self.time_offset else ""
        scale = "t" if self.time_scale == 1 else f"{self.time_scale:g} t"
        parts = [self.prediction, schedule_text(self.schedule), f"labels {scale}{offset}", DATA[self.data]]
        return ", ".join(part for part in parts if part)

    def settings(self) -> dict[str, Any]:
        """What ``ScoreModel.with_settings`` takes to read the network so."""
        names = ("prediction", "schedule", "time_scale", "time_offset")
        return {name: getattr(self, name) for name in names}

    def changes(self, other: Reading) -> int:
        """In how many ways it differs from another; numbers of the time scale count as one."""
        times = (self.time_scale, self.time_offset) != (other.time_scale, other.time_offset)
        schedules = self.schedule.config() != other.schedule.config()
        return (self.prediction != other.prediction) + schedules + times + (self.data != other.data)


@dataclass(frozen=True)
class Health:
    """What a check of a score model found.

    Attributes:
        levels: noise levels sigma / alpha in [-1, 1] space.
        images: how many images were denoised at each.
        scaled, mean: errors of the trivial denoisers: the noisy image, scaled and shifted as is best at the level; the
            mean of the other images.
        declared: the network as its score model reads it.
        best: the reading with the least error; among equals the one nearest to what is declared.
    """

    levels: tuple[float, ...]
    images: int
    scaled: tuple[float, ...]
    mean: tuple[float, ...]
    declared: Reading
    best: Reading

    def relative(self, reading: Reading) -> float:
        """Error in units of the better trivial denoiser's, geometric mean over levels."""
        each = zip(reading.errors, self.scaled, self.mean, strict=True)
        logs = [math.log(min(max(e, FLAT) / min(scaled, mean), MOST)) for e, scaled, mean in each]
        return math.exp(sum(logs) / len(logs))

    @property
    def error(self) -> float:
        """Error as declared, in units of the better trivial denoiser's."""
        return self.relative(self.declared)

    @property
    def gain(self) -> float:
        """Share of the error that the best reading takes off; 0 where that reading is no better than trivial."""
        best = self.relative(self.best)
        return 1 - best / self.error if best <= LIMIT else 0.0

    @property
    def passed(self) -> bool:
        """Whether the network denoises, and no other reading does much better."""
        return self.error <= LIMIT and self.gain <= MARGIN

    @property
    def sentence(self) -> str:
        """What was found, and what to do."""
        if math.inf in self.declared.errors:
            level = self.levels[self.declared.errors.index(math.inf)]
            return f"This network answers NaN or infinity at noise level {level:.3g}; check its weights and precision."
        found = f"as declared ({self.declared}) its denoising error is {self.error:.2g} of the best trivial denoiser's"
        if self.gain > MARGIN:
            return f"This network's output fits {self.best}, with {self.relative(self.best):.2g}; {found}."
        if self.error > LIMIT:
            advice = "are these its trained (EMA) weights, and images like those that it was trained on?"
            return f"This network denoises no better than trivial denoisers, however it is read: {found}; {advice}"
        return f"This network denoises as it should: {found}, and no other reading does much better."


def schedule_text(schedule: Schedule) -> str:
    """A schedule in a few words."""
    config = schedule.config()
    if isinstance(schedule, DiscreteVP):
        kind = "table" if config["kind"] == "table" else config["kind"]
        return f"{kind} schedule of {schedule.steps} steps"
    if isinstance(schedule, ContinuousVP):
        usual = (schedule.beta_min, schedule.beta_max) == (0.1, 20.0)
        return "continuous schedule" + ("" if usual else f" (beta {schedule.beta_min:g} to {schedule.beta_max:g})")
    return f"{config.get('kind', 'own')} schedule"


def check(model: ScoreModel, images: Tensor, n: int = 32, levels: Sequence[float] = LEVELS, seed: int = 0) -> Health:
    """See :meth:`purify.diffusion.score.ScoreModel.check`."""
    check_count(n, "images")
    check_images(images, model.image_shape, model.dtype)
    check_count(len(images), "images to check a score model on")
    u = 2 * images[: max(2, min(n, VALUES // images[0].numel()))] - 1
    model.eval()
    levels = tuple(dict.fromkeys(_on_grid(model.schedule, levels)))
    noise = Noise.keyed(derive_seed(seed, "health"), torch.arange(len(u), device=u.device))
    z = [noise.normal(i, u.shape[1:], u.dtype) for i in range(len(levels))]
    scaled, mean = zip(*(_trivial(u, s, one) for s, one in zip(levels, z, strict=True)), strict=True)
    declared = Reading(model.prediction, model.schedule, model.time_scale, model.time_offset)
    readings = _read(model, declared, u, levels, z)
    for asked in _labellings(model, declared, levels, u.shape[1]):
        with suppress(RuntimeError, IndexError):  # labels that the network cannot take
            readings += _read(model, asked, u, levels, z)
    found = Health(levels, len(u), scaled, mean, readings[0], readings[0])
    least = min(map(found.relative, readings))
    near = [r for r in readings if found.relative(r) <= NEAR * least]
    return replace(found, best=min(near, key=lambda r: (r.changes(declared), found.relative(r))))


def times_of(schedule: Schedule, levels: Sequence[float]) -> Tensor:
    """The times at which sigma / alpha is each of ``levels``, or 1 where it never is, float64."""
    target = -torch.tensor(levels, dtype=torch.float64).square().log1p()
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = schedule.log_alpha_bar(middle) <= target
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return high


def _on_grid(schedule: Schedule, levels: Sequence[float]) -> list[float]:
    """The noise levels nearest to these at which the schedule has steps: labels are then whole, as in training."""
    t = times_of(schedule, levels)
    if isinstance(schedule, DiscreteVP):
        t = (t * schedule.steps).round().clamp_min(1) / schedule.steps
    return torch.expm1(-schedule.log_alpha_bar(t)).sqrt().tolist()


def _trivial(u: Tensor, s: float, z: Tensor) -> tuple[float, float]:
    """Errors of the noisy image, scaled and shifted by least squares, and of the mean of the other images."""
    clean, n = u.double(), len(u)
    noisy, centred = (v - v.mean() for v in (clean + s * z, clean))
    scaled = centred - noisy * (noisy * centred).sum() / noisy.square().sum()
    mean = (clean.sum(0) - clean) / (n - 1) if n > 1 else clean.mean()
    first, second = (max(float(error.square().mean()), FLAT) for error in (scaled, mean - clean))
    return first, second


def _labellings(model: ScoreModel, declared: Reading, levels: Sequence[float], channels: int) -> list[Reading]:
    """Other readings that differ in the labels that the network gets, or in its data."""
    schedules: list[Schedule] = [declared.schedule]
    scales = [declared.time_scale, 1000.0, 1.0]
    if isinstance(declared.schedule, DiscreteVP):
        scales.append(float(declared.schedule.steps))
        schedules.append(DiscreteVP.cosine(declared.schedule.steps))
    schedules += [DiscreteVP.linear(), DiscreteVP.cosine(), ContinuousVP()]
    most = _most_label(model.network)
    known, found = [_labels(model, declared, levels)], []
    for schedule, scale, i in product(schedules, scales, range(3)):
        usual = float(isinstance(schedule, DiscreteVP) and scale != 1)
        offset = (declared.time_offset if scale == declared.time_scale else usual, usual, 1 - usual)[i]
        asked = replace(declared, schedule=schedule, time_scale=scale, time_offset=offset)
        labels = _labels(model, asked, levels)
        if labels.max() <= most and all((labels - k).abs().max() > ALIKE * labels.abs().max() for k in known):
            known.append(labels)
            found.append(asked)
    data = ["unit"] + (["reversed"] if channels > 1 else [])
    return found + [replace(declared, data=name) for name in data]


def _most_label(network: nn.Module) -> float:
    """The largest label that an embedding table in the network can take; a GPU does not recover from a larger one."""
    tables = [m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)]
    return min(tables) - 1 if tables else math.inf


def _labels(model: ScoreModel, reading: Reading, levels: Sequence[float]) -> Tensor:
    """What the network is told at these noise levels, float64."""
    return model.with_settings(**reading.settings()).labels(times_of(reading.schedule, levels))


@torch.no_grad()
def _read(model: ScoreModel, asked: Reading, u: Tensor, levels: Sequence[float], z: Sequence[Tensor]) -> list[Reading]:
    """``asked`` and its siblings, all that the network's output may predict, with their errors."""
    learned = model.prediction == "learned_variance"
    kinds = [model.prediction, *(k for k in ("eps", "x0", "v", "score") if k != model.prediction)]
    kinds = [k for k in kinds if not (learned and k == "eps")]
    unit, flipped = asked.data == "unit", asked.data == "reversed"
    shown = (u + 1) / 2 if unit else u.flip(1) if flipped else u
    # Half the contrast under half the noise is the same problem.
    levels = [s / 2 for s in levels] if unit else levels
    labels = _labels(model, replace(asked, prediction=model.prediction), levels).to(u.device, u.dtype)
    errors: dict[str, list[float]] = {kind: [] for kind in kinds}
    for s, label, noise in zip(levels, labels, z, strict=True):
        alpha = u.new_tensor(1 / math.sqrt(1 + s * s))
        noisy = alpha * shown + s * alpha * (noise.flip(1) if flipped else noise)
        seen, classes = model.seen(noisy, alpha, s * alpha), model.classes_for(noisy)
        output = evaluate(model.network, seen, label.expand(len(u)), model.autocast, classes).to(u.dtype)
        model.check_output(output, noisy)
        for kind in kinds:
            part = output.chunk(2, dim=1)[0] if learned and kind != model.prediction else output
            eps = PREDICTIONS[kind](part, noisy, alpha, s * alpha).eps
            error = (2 if unit else 1) * ((noisy - s * alpha * eps) / alpha - shown)
            errors[kind].append(float(error.double().square().mean().nan_to_num(math.inf)))
    return [replace(asked, prediction=kind, errors=tuple(errors[kind])) for kind in kinds]


def plot(health: Health, path: str | Path, title: str = "") -> None:
    """Errors against the noise level, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = [("noisy image, scaled", health.scaled, "0.6", ":"), ("mean image", health.mean, "0.6", "--")]
    lines += [(f"as declared: {health.declared}", health.declared.errors, "tab:blue", "-")]
    if health.best != health.declared:
        lines += [(f"best reading: {health.best}", health.best.errors, "tab:orange", "-")]
    for label, errors, colour, style in lines:
        axes.plot(health.levels, errors, style, color=colour, marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel="noise level sigma / alpha", ylabel="mean squared error, [-1, 1] space")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
