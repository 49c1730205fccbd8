"""The training loop: resume equals an undisturbed run, EMA by hand, losses fall, attacks stay in their ball."""

import math

import pytest
import torch
from conftest import SmoothNet
from torch import nn

from purify import ContinuousVP, ScoreModel
from purify.train.__main__ import main
from purify.train.loop import Hyper, learning_rate, train, update_ema
from purify.train.losses import (
    CrossEntropy,
    EpsLoss,
    Trades,
    ascend,
    divergence,
    shifted,
    training_times,
)
from purify.zoo.architectures import SmallCNN, build_network

HYPER = Hyper(steps=12, batch_size=8, lr=1e-2, warmup=3, ema=0.9)


def data():
    g = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, 4, 4, generator=g), torch.randint(3, (40,), generator=g)


def network():
    return ScoreModel(SmoothNet(), ContinuousVP())


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_resumed_equals_undisturbed(tmp_path):
    whole = train(network(), EpsLoss(), *data(), HYPER)

    class Stop(Exception):
        pass

    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise Stop
        return EpsLoss()(*args)

    with pytest.raises(Stop):
        train(network(), interrupted, *data(), HYPER, tmp_path / "c", save_every=5)
    resumed = train(network(), EpsLoss(), *data(), HYPER, tmp_path / "c", save_every=5)
    assert equal(whole, resumed)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    train(network(), EpsLoss(), *data(), HYPER, tmp_path / "c", save_every=5)
    other = Hyper(**{**vars(HYPER), "lr": 0.1})
    with pytest.raises(ValueError, match=r"another training \(hyper\)"):
        train(network(), EpsLoss(), *data(), other, tmp_path / "c")
    with pytest.raises(ValueError, match=r"another training \(loss\)"):
        train(network(), EpsLoss(), *data(), HYPER, tmp_path / "c", {"loss": "other"})
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        train(network(), EpsLoss(), *data(), HYPER, tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        train(network(), lambda *a: EpsLoss()(*a) * float("nan"), *data(), HYPER)


def test_a_checkpoint_never_executes_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"identity": Evil()}, tmp_path / "c")
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        train(network(), EpsLoss(), *data(), HYPER, tmp_path / "c")


def test_ema_by_hand():
    average, module = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    average.weight.data.fill_(1.0)
    expected = 1.0
    for step, value in enumerate([3.0, -1.0, 2.0]):
        module.weight.data.fill_(value)
        update_ema(average, module, 0.3, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.weight.item() == pytest.approx(expected)


def test_learning_rate_warms_up_and_decays():
    hyper = Hyper(steps=100, lr=2.0, warmup=10)
    assert learning_rate(0, hyper) == pytest.approx(0.2)
    assert learning_rate(50, hyper) == pytest.approx(1.0)
    assert learning_rate(99, hyper) == pytest.approx(1 + math.cos(math.pi * 0.99))


def test_losses_fall():
    images, labels = data()
    hyper = Hyper(steps=150, batch_size=32, lr=2e-2, warmup=5, ema=0.9)

    def value(module, loss):
        generator = torch.Generator().manual_seed(1)
        return loss(module, images, labels, generator).item()

    score = network()
    before = value(score, EpsLoss())
    assert value(train(score, EpsLoss(), images, labels, hyper), EpsLoss()) < 0.8 * before
    cnn = SmallCNN(1, [8], 3)
    before = value(cnn, CrossEntropy())
    assert value(train(cnn, CrossEntropy(), images, labels, hyper), CrossEntropy()) < before


def test_half_of_the_training_times_lie_where_purification_happens():
    t = training_times(4000, torch.Generator().manual_seed(0))
    assert t.min() >= 1e-3
    assert t.max() <= 1
    assert (t <= 0.4).double().mean().item() == pytest.approx(0.5 + 0.5 * 0.4, abs=0.03)


def test_adversarial_training_attacks_inside_its_ball_and_raises_the_loss():
    images, labels = data()
    model = SmallCNN(1, [8], 3).eval().requires_grad_(False)
    value = nn.functional.cross_entropy
    generator = torch.Generator().manual_seed(0)
    adversarial = ascend(model, images, 0.1, 5, generator, lambda logits: value(logits, labels))
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert value(model(adversarial), labels) > value(model(images), labels)


def test_trades_by_hand():
    images, labels = data()
    model = SmallCNN(1, [8], 3)
    loss = Trades(eps=0.1, beta=2.0, attack_steps=3)
    found = loss(model, images, labels, torch.Generator().manual_seed(0))
    target = model(images).log_softmax(1).detach()
    moved = ascend(model, images, 0.1, 3, torch.Generator().manual_seed(0), lambda logits: divergence(target, logits))
    p, q = model(images).softmax(1), model(moved).softmax(1)
    kl = (p * (p / q).log()).sum(1)
    assert (kl > (p * (p / model(0.999 * images).softmax(1)).log()).sum(1)).all()  # the attack raises it
    expected = nn.functional.cross_entropy(model(images), labels) + 2 * kl.mean()
    torch.testing.assert_close(found, expected)


def test_shifts_by_a_loop():
    images, _ = data()
    moved = shifted(images, 1, torch.Generator().manual_seed(3))
    dy, dx = torch.randint(3, (2, len(images)), generator=torch.Generator().manual_seed(3))
    for i in range(len(images)):
        frame = torch.zeros(6, 6)
        frame[1:5, 1:5] = images[i, 0]
        assert torch.equal(moved[i, 0], frame[dy[i] : dy[i] + 4, dx[i] : dx[i] + 4])


def test_networks_start_the_same_under_a_seed():
    config = {"kind": "small-cnn", "channels": 1, "widths": [8], "num_classes": 3}
    assert equal(build_network(config, 1), build_network(config, 1))
    assert not equal(build_network(config, 1), build_network(config, 2))


def test_command(tmp_path, capsys):
    assert main(["digits-standard", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert {p.suffix for p in tmp_path.iterdir()} >= {".safetensors", ".json", ".md"}
    assert "clean_accuracy" in (tmp_path / "digits-standard.md").read_text()
    assert main(["nothing"]) == 2
    assert "Unknown recipe 'nothing'; known: digits" in capsys.readouterr().err
