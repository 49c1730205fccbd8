"""What only a GPU shows. CI has none: ``python -m pytest tests/test_cuda.py`` where there is one."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load_script, loss_gradient
from torch import Tensor

import purify
from purify.attacks import PGD
from purify.certify import Draws, denoised_smoothing
from purify.data import load_dataset
from purify.diffusion.noise import Noise
from purify.diffusion.precision import float32_proper
from purify.memory import Parts
from purify.purification.gradients import Checkpoint, Full, GradientEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[1]


def digits(n: int) -> tuple[Tensor, Tensor]:
    x, y = load_dataset("digits", "test")
    return x[:n], y[:n]


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(1).double().cpu(), b.flatten(1).double().cpu(), dim=1).min().item()


def test_words_of_noise_are_those_of_the_cpu():
    ids = torch.arange(7)
    here, there = (Noise.keyed(3, ids.to(device)).normal(2, (1, 9, 9)) for device in ("cpu", CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-6)  # logarithm and cosine round otherwise


@pytest.mark.parametrize("purifier", ["diffpure", "gdmp", "agdm", "gns"])
@pytest.mark.parametrize("engine", [Full(), Checkpoint(), Checkpoint(memory_budget="auto")], ids=repr)
def test_values_and_gradients_are_those_of_the_cpu(purifier: str, engine: GradientEngine):
    x, y = digits(6)
    defended = purify.wrap("digits-standard", dataset="digits", purifier=purifier, steps=4, gradient=engine)
    ids = torch.arange(len(x))
    with torch.no_grad():
        here = defended(x, sample_ids=ids)
    exact = loss_gradient(defended, x, y)
    with float32_proper():
        defended = defended.to(CUDA)
        with torch.no_grad():
            there = defended(x.to(CUDA), sample_ids=ids)
        found = loss_gradient(defended, x.to(CUDA), y.to(CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-2)
    assert cosine(found, exact) > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32+compile", "bf16+compile"])
def test_precisions_keep_the_direction(precision: str):
    x, y = (t.to(CUDA) for t in digits(6))
    defended = purify.wrap("digits-standard", dataset="digits", purifier="diffpure", t_star=0.1, steps=4).to(CUDA)
    exact = loss_gradient(defended, x, y)
    for batch in (6, 5, 1):  # one graph for all sizes above 1
        found = loss_gradient(defended.with_precision(precision), x[:batch], y[:batch])
        assert cosine(found, exact[:batch]) > 0.99


def test_an_attack_is_that_of_the_cpu():
    x, y = digits(8)
    defended = purify.wrap("digits-standard", dataset="digits", purifier="diffpure", t_star=0.1, steps=4)
    attack = PGD("Linf", eps=0.3, steps=3, eot=2)
    here = attack(defended, x, y).images
    with float32_proper():
        there = attack(defended.to(CUDA), x.to(CUDA), y.to(CUDA)).images.cpu()
    assert ((there - here).abs() < 1e-3).float().mean() > 0.97  # a sign may turn where the gradient is next to nothing


def test_what_does_not_fit_is_halved():
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**30 / total))
    try:
        parts = Parts(64)
        work = lambda rows: torch.ones(len(rows), 2**24, device=CUDA).sum(1)  # noqa: E731 - 64 MiB a row
        found = torch.cat([value for _, value in parts.of(torch.arange(64, device=CUDA), work)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(found.cpu(), torch.full((64,), 2.0**24))
    assert parts.size in (4, 8)


def test_no_step_makes_the_host_wait():
    """After a first pass, which may settle plans."""
    x, y = (t.to(CUDA) for t in digits(4))
    load_script("gpu")
    from card.waits import waiting

    counts = []
    for steps in (4, 8):
        defended = purify.wrap("digits-standard", dataset="digits", purifier="diffpure", t_star=0.1, steps=steps)
        counts.append(waiting(partial(loss_gradient, defended.to(CUDA), x, y)).total())
    assert counts[0] == counts[1]


def run(arguments: str, out: Path, *launch: str) -> str:
    """What the command prints; it must end well."""
    command = [sys.executable, *launch, "-m", "purify", *arguments.split(), "--device", "cuda", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


ATTACK = "attack --dataset digits --steps 4 --attack-steps 3 --eot 2 --n-examples 8"


@pytest.mark.parametrize("launch", [(), ("-m", "torch.distributed.run", "--nproc-per-node", "1")])
def test_the_command_chooses_a_precision(tmp_path: Path, launch: tuple[str, ...]):
    """By nccl, too."""
    said = run(f"{ATTACK} --purifier diffpure --attacks pgd-eot --precision auto", tmp_path, *launch)
    assert "attacks in " in said
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) >= 8


def test_guided_purifiers_from_the_command_line(tmp_path: Path):
    """Their guide is a network of its own."""
    run(f"{ATTACK} --purifier agdm,heterogeneous --attacks pgd-eot,adaptive --calls 600", tmp_path)


def test_distortions_from_the_command_line(tmp_path: Path):
    run("distortion --dataset digits --purifier diffpure --steps 4 --attack-steps 3 --eot 2 --n-examples 4", tmp_path)


def test_a_certificate_counts_what_the_cpu_counts():
    x, _ = digits(3)
    classifier, score = purify.zoo.classifier("digits-standard"), purify.zoo.score_model("digits")
    draws = Draws(32, 200, alpha=0.01)
    here = denoised_smoothing(classifier, score, 0.5, 64).certify(x, draws)
    there = denoised_smoothing(classifier.to(CUDA), score.to(CUDA), 0.5, 64).certify(x.to(CUDA), draws)
    assert here.counts is not None
    assert there.counts is not None
    assert (here.counts - there.counts.cpu()).abs().max() <= 2  # near ties
