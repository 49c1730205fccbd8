"""Nothing is left on the CPU where the networks are elsewhere; see pretended.py. `test_cuda.py` asks a GPU itself.

Left out: Fourier transforms (no kernel there) and torchdiffeq, whose writes into views lose their gradient there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import loss_gradient
from pretended import NAME

import purify
from purify.__main__ import main
from purify.attacks import PGD
from purify.attacks.adaptive import Adaptive
from purify.certify import Draws, denoised_smoothing
from purify.data import load_dataset
from purify.purification.defended import DefendedClassifier

X, Y = (t[:3] for t in load_dataset("digits", "test"))
PURIFIERS = [name for name in purify.PURIFIERS if name != "freqpure"]  # its Fourier transform has no kernel there


def wrapped(purifier: str = "diffpure", **options: object) -> DefendedClassifier:
    return purify.wrap("digits-standard", dataset="digits", purifier=purifier, steps=3, **options)


def assert_the_same_there(defended: DefendedClassifier) -> None:
    """The gradient."""
    here = loss_gradient(defended, X, Y)
    there = loss_gradient(defended.to(NAME), X.to(NAME), Y.to(NAME)).cpu()
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4 * here.abs().max().item())


def test_devices_do_not_mix():
    x = torch.rand(3, 4)
    there = x.to(NAME)
    assert torch.equal((2 * there).cpu(), 2 * x)
    for mixed in (lambda: there + x, lambda: x[there[:, 0] > 0.5], lambda: torch.cat([x, there])):
        with pytest.raises(RuntimeError, match=r"same device|on cpu or on the same|two devices"):
            mixed()


@pytest.mark.parametrize("purifier", PURIFIERS)
def test_purifiers(purifier: str):
    assert_the_same_there(wrapped(purifier))


@pytest.mark.parametrize("options", [{"gradient": "full"}, {"gradient": "adjoint"}, {"reverse": "ddim"}], ids=str)
def test_engines_and_rules(options: dict[str, str]):
    assert_the_same_there(wrapped(**options))


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_levels(engine: str):
    assert_the_same_there(wrapped("ssni-l", gradient=engine))


@pytest.mark.parametrize("purifier", ["agdm", "mimicdiffusion", "heterogeneous"])
def test_a_guide_goes_where_the_score_model_is(purifier: str):
    score_model = purify.zoo.score_model("digits").to(NAME)
    assert {p.device.type for p in wrapped(purifier, score_model=score_model).purifier.parameters()} == {NAME}


@pytest.mark.parametrize("attack", [PGD("Linf", 0.3, steps=2, eot=2), Adaptive("Linf", 0.3, calls=300)], ids=type)
def test_attacks(attack: PGD | Adaptive):
    defended = wrapped()
    here = attack(defended, X, Y).images
    there = attack(defended.to(NAME), X.to(NAME), Y.to(NAME)).images.cpu()
    assert ((there - here).abs() < 1e-3).float().mean() > 0.97  # a sign may turn where the gradient is next to nothing


def test_certificates():
    networks = purify.zoo.classifier("digits-standard"), purify.zoo.score_model("digits")
    here = denoised_smoothing(*networks, 0.5, 64).certify(X, Draws(32, 100, alpha=0.01))
    there = denoised_smoothing(*(n.to(NAME) for n in networks), 0.5, 64).certify(X.to(NAME), Draws(32, 100, alpha=0.01))
    assert torch.equal(there.counts.cpu(), here.counts)


QUICK = "--dataset digits --steps 3 --attack-steps 2 --eot 2 --n-examples 3"
COMMANDS = {
    "attack": f"attack {QUICK} --purifier agdm,heterogeneous --noise-level constant,ssni-l --attacks pgd-eot,transfer",
    "adaptive": f"attack {QUICK} --purifier diffpure --attacks adaptive --calls 600",
    "distortion": f"distortion {QUICK} --purifier diffpure",
    "certify": "certify --dataset digits --method cohen,ssn --n-examples 3 --draws 100 --attack-examples 1",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("purify.evaluate.attacking.check_device", torch.device)
    assert main([*COMMANDS[name].split(), "--device", NAME, "--out", str(tmp_path)]) == 0
