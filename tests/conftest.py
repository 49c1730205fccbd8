"""Small models with known answers, shared by the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: one thread in each, and in their children
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from purify import ContinuousVP, ScoreModel

DATA = Path(__file__).parent / "data"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest_plugins = ["boards"]  # fixtures of one folder: a conftest.py there would be imported instead of this one


def loss_gradient(defended: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the summed cross-entropy, with keyed noise; (N, C, H, W)."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(defended(x, sample_ids=torch.arange(len(x))), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def assert_second_derivative(f, x: Tensor, h: float, tolerance: float) -> None:
    """The gradient of the squared gradient of ``f`` at ``x``, against finite differences of step ``h``."""

    def squared_gradient(v: Tensor, create: bool = False) -> tuple[Tensor, Tensor]:
        w = v.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(w), w, create_graph=create)
        return w, g.square().sum()

    w, value = squared_gradient(x, create=True)
    (second,) = torch.autograd.grad(value, w)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    slope = (squared_gradient(x + h * v)[1] - squared_gradient(x - h * v)[1]) / (2 * h)
    assert (second * v).sum().item() == pytest.approx(slope.item(), rel=tolerance)


def weighted(purifier: nn.Module, x: Tensor) -> Tensor:
    """A fixed smooth loss of a purification of images ``x`` with fixed noise."""
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x[0].shape)
    return (purifier(x, sample_ids=range(len(x)), seed=3, draw=1) * weights).sum()


def gradient_of_weighted(purifier: nn.Module, x: Tensor) -> Tensor:
    """The gradient of :func:`weighted` at ``x``."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(weighted(purifier, x), x)[0]


def assert_finite_differences(purifier: nn.Module, x: Tensor, tolerance: float = 1e-6, h: float = 1e-5) -> None:
    """The gradient of :func:`weighted` at float64 ``x``, along a random direction."""
    exact = gradient_of_weighted(purifier, x)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with torch.no_grad():
        found = (weighted(purifier, x + h * v) - weighted(purifier, x - h * v)) / (2 * h)
    assert (exact * v).sum().item() == pytest.approx(found.item(), rel=tolerance)


def load_script(name: str) -> ModuleType:
    """A script under benchmarks/ as a module; scripts find one another there."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


class SmoothNet(nn.Module):
    """A small smooth random network that sees the time; its float64 copy is the same function."""

    def __init__(self, channels: int = 1, out_channels: int | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, 8, 3, padding=1)
            self.time = nn.Linear(1, 8)
            self.last = nn.Conv2d(8, out_channels or channels, 3, padding=1)

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        hidden = self.first(u) + self.time(labels[:, None] / 1000)[:, :, None, None]
        return self.last(torch.tanh(hidden))


class GaussianEps(nn.Module):
    """eps of the exact score of data N(mean, covariance) under a VP schedule: labels are 1000 t."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.mean, self.covariance = mean.double(), covariance.double()
        self.schedule = ContinuousVP()

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        t = labels.double() / 1000
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        d = len(self.mean)
        total = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * torch.eye(d, dtype=torch.float64)
        residual = u.flatten(1).double() - alpha * self.mean
        return (sigma * torch.linalg.solve(total, residual)).reshape(u.shape).to(u.dtype)


class MixtureEps(nn.Module):
    """eps of the exact score of a mixture of isotropic Gaussians."""

    def __init__(self, means: Tensor, std: float, weights: Tensor) -> None:
        super().__init__()
        self.means, self.std, self.weights = means.double(), std, weights.double()
        self.schedule = ContinuousVP()

    def responsibilities(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(component | u_t) (N, K), residuals to the component means (N, K, d), variances (N,)."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = alpha**2 * self.std**2 + sigma**2
        residual = u.flatten(1).double()[:, None] - alpha[:, None, None] * self.means
        log_p = self.weights.log() - 0.5 * residual.square().sum(-1) / variance[:, None]
        return log_p.softmax(1), residual, variance

    def forward(self, u: Tensor, labels: Tensor) -> Tensor:
        t = labels.double() / 1000
        share, residual, variance = self.responsibilities(u, t)
        score = -(share[..., None] * residual).sum(1) / variance[:, None]
        return (-self.schedule.sigma(t)[:, None] * score).reshape(u.shape).to(u.dtype)


def smooth_model(dtype: torch.dtype = torch.float32, channels: int = 1, size: int = 4) -> ScoreModel:
    """An eps-prediction ScoreModel around :class:`SmoothNet`."""
    return ScoreModel(SmoothNet(channels), ContinuousVP(), image_shape=(channels, size, size)).to(dtype)


class TinyClassifier(nn.Module):
    """A smooth random classifier of 4x4 images, in eval mode."""

    def __init__(self, classes: int = 5, channels: int = 1, size: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(
                nn.Flatten(), nn.Linear(channels * size**2, 16), nn.Tanh(), nn.Linear(16, classes)
            )
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Linear(nn.Module):
    """Two logits of 4x4 images, +-w.(x - centre): the best attack on label 1 moves against w."""

    def __init__(self, centre: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(0)), requires_grad=False)
        self.centre = centre
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        value = (x.flatten(1) - self.centre) @ self.w
        return torch.stack([-value, value], 1)


class TinyConvolutions(nn.Module):
    """A small convolutional classifier with two activations of different sizes."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first, self.second = nn.Conv2d(channels, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.early, self.late = nn.ReLU(), nn.ReLU(inplace=True)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(self.first(x)))).mean((-2, -1))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or writes to, the user's own downloads."""
    monkeypatch.setenv("PURIFY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tables() -> dict[str, np.ndarray]:
    """Tables made with the original programs (tests/data/schedules.npz)."""
    with np.load(DATA / "schedules.npz") as f:
        return dict(f)


@pytest.fixture
def images() -> Tensor:
    """Seven 4x4 images away from the edges of [0, 1]."""
    return 0.2 + 0.6 * torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def labels() -> Tensor:
    """Seven labels of five classes."""
    return torch.arange(7) % 5
