"""The training loop: resume equals an undisturbed run, EMA by hand, losses fall, attacks stay in their ball."""

import json
import math

import pytest
import torch
from conftest import SmoothNet, TinyClassifier
from torch import nn

from purify import ContinuousVP, Noise, ScoreModel, zoo
from purify.certify.splitting import Splitting, SplittingLevels
from purify.data import load_dataset
from purify.networks.embedded import SmallCNN, build_network
from purify.train.__main__ import build, main, recipe_name
from purify.train.loop import Hyper, learning_rate, train, update_ema
from purify.train.losses import (
    AdversarialCrossEntropy,
    BridgeLoss,
    ClassEpsLoss,
    CrossEntropy,
    DiffusionCalibration,
    EpsLoss,
    FlowMatching,
    SplittingLoss,
    Trades,
    ascend,
    divergence,
    shifted,
    training_times,
)
from purify.train.recipes import RECIPES

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


def test_flow_matching_is_the_error_of_the_velocity_on_the_straight_path():
    """The network sees (1 - tau) u + tau z at 1000 tau and should say z - u."""
    seen, (images, labels) = [], data()
    images, labels = images[:6], labels[:6]

    class Slow(torch.nn.Module):
        def forward(self, x, at):
            seen.append((x, at))
            return 0.3 * x

    model = ScoreModel(Slow(), ContinuousVP(), "velocity")
    found = FlowMatching()(model, images, labels, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    t, z = training_times(6, generator), torch.randn(images.shape, generator=generator)
    ratio = model.schedule.sigma(t) / model.schedule.alpha(t)
    tau = (ratio / (1 + ratio)).reshape(-1, 1, 1, 1).float()
    x = (1 - tau) * (2 * images - 1) + tau * z
    torch.testing.assert_close(seen[0][0], x)
    torch.testing.assert_close(seen[0][1], 1000 * tau.flatten())
    assert found.item() == pytest.approx((0.3 * x - z + 2 * images - 1).square().mean().item())


def test_the_bridge_goes_from_the_diffused_attacked_image_to_the_clean_one():
    """At T it is the attacked image diffused; at any time the target's u0_hat is the clean image."""
    model, (images, _) = network(), data()
    images, generator = images.double(), torch.Generator().manual_seed(1)
    adversarial = (images + 0.2 * torch.rand(images.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    z = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    top = torch.linspace(0.1, 0.2, len(images), dtype=torch.float64)
    loss = BridgeLoss("digits-standard", 0.3)
    alpha, sigma = (f(top).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    u_t, _ = loss.bridge(model, images, adversarial, top, top, z)
    torch.testing.assert_close(u_t, alpha * (2 * adversarial - 1) + sigma * z)
    for share in (0.05, 0.5, 1.0):
        u_t, target = loss.bridge(model, images, adversarial, share * top, top, z)
        torch.testing.assert_close(model.denoised(target, u_t, share * top), 2 * images - 1)
    torch.testing.assert_close(loss.bridge(model, images, images, top, top, z)[1], z)


def test_the_bridge_is_trained_against_the_classifier():
    """Its attack raises the cross-entropy of the estimate, and eps = 0 is the usual loss at its times."""
    images, labels = (t[:32] for t in load_dataset("digits", "train"))
    model = zoo.score_model("digits").requires_grad_(True)
    values = [
        BridgeLoss("digits-standard", eps, attack_steps=steps)(model, images, labels, torch.Generator().manual_seed(0))
        for eps, steps in ((0.0, 0), (0.3, 0), (0.3, 3))
    ]
    assert values[0] < values[1] < values[2]
    values[2].backward()
    assert all(p.grad is not None for p in model.network.parameters())
    assert not any(p.requires_grad for p in BridgeLoss("digits-standard", 0.3).frozen.parameters())
    with pytest.raises(ValueError, match="t_star must lie in"):
        BridgeLoss("digits-standard", 0.3, t_star=0.0)


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


META_LOSSES = {
    "eps": (EpsLoss(), "digits"),
    "class": (ClassEpsLoss(), "digits-classes"),
    "flow": (FlowMatching(), "digits-flow"),
    "shifted": (CrossEntropy(shift=1), None),
    "adversarial": (AdversarialCrossEntropy(0.1, 2, 1), None),
    "trades": (Trades(0.1, attack_steps=2), None),
    "calibration": (DiffusionCalibration("digits-standard"), "digits"),
    "bridge": (BridgeLoss("digits-standard", 0.1), "digits"),
}


@pytest.mark.parametrize("name", META_LOSSES)
def test_losses_work_where_the_images_are(name):
    """Meta tensors stand for a GPU's: torch refuses to mix them with those of a CPU."""
    loss, score = META_LOSSES[name]
    module = zoo.classifier("digits-standard") if score is None else zoo.score_model(score)
    images, labels = torch.rand(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    value = loss(module.to("meta").requires_grad_(True), images, labels, torch.Generator().manual_seed(0))
    value.backward()
    assert value.device.type == "meta"
    assert any(p.grad is not None for p in module.parameters())


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
    adversarial = ascend(model, images, 0.1, 5, generator, lambda x: value(model(x), labels))
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
    moved = ascend(model, images, 0.1, 3, torch.Generator().manual_seed(0), lambda x: divergence(target, model(x)))
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
    assert main(["digits-guide", "--dataset", "fashion_mnist"]) == 2
    assert "digits-guide is a recipe for digits, not for fashion_mnist" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(capsys):
    assert main(["digits-standard", "--steps", "2", "--out", "/proc/x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: /proc/x/digits-standard.json cannot be written (No such file")
    assert err.count("\n") == 1


def test_a_recipe_may_be_named_without_its_data_set():
    assert recipe_name("guide", None) == recipe_name("guide", "digits") == recipe_name("digits-guide", None)
    assert recipe_name("guide", "fashion_mnist") == "fashion_mnist-guide"
    assert recipe_name("fashion_mnist", "fashion_mnist") == "fashion_mnist"


# --- splitting noise and diffusion calibration --------------------------------------------------------------------


def split_by_hand(images, seed, lam, kind):
    """What the loss draws from a generator: a seed for SSN's noise, and a level for DSSN's."""
    g = torch.Generator().manual_seed(seed)
    rows, draw = [], (torch.randint(2**62, (), generator=g), torch.randint(int(510 * lam), (len(images),), generator=g))
    for i, x in enumerate(images):
        noise = Noise.keyed(int(draw[0]), [i], int(draw[1][i]))
        rows.append((SplittingLevels(lam) if kind == "dssn" else Splitting(lam))(x[None], noise))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["ssn", "dssn"])
def test_splitting_loss_by_hand(kind):
    images, labels = data()
    network = TinyClassifier()
    got = SplittingLoss(0.2, kind)(network, images, labels, torch.Generator().manual_seed(7))
    logits = network(split_by_hand(images, 7, 0.2, kind))
    expected = torch.stack([-logits[i].log_softmax(0)[y] for i, y in enumerate(labels)]).mean()
    torch.testing.assert_close(got, expected)


def test_stability_loss_by_hand():
    """-log p(y|x1) + 6 KL(p(x1) || p(x2))."""
    images, labels = data()
    network, loss = TinyClassifier(), SplittingLoss(0.2, stability=6.0)
    g = torch.Generator().manual_seed(7)
    p1, p2 = (network(loss.split(images, g)).softmax(1) for _ in range(2))
    assert not torch.equal(p1, p2)
    divergence = (p1 * (p1.log() - p2.log())).sum(1)
    expected = (-p1[torch.arange(40), labels].log() + 6 * divergence).mean()
    torch.testing.assert_close(loss(network, images, labels, torch.Generator().manual_seed(7)), expected)


def test_splitting_loss_refuses_unknown_noise():
    with pytest.raises(ValueError, match="Unknown splitting noise 'gaussian'; known: dssn, ssn"):
        SplittingLoss(0.2, "gaussian")
    for bad in (
        lambda: SplittingLoss(0.001),
        lambda: SplittingLoss(0.2, stability=-3),
        lambda: DiffusionCalibration("tiny", ()),
        lambda: DiffusionCalibration("tiny", (-1.0,)),
        lambda: DiffusionCalibration("tiny", weight=float("nan")),
    ):
        with pytest.raises(ValueError, match=r"must lie in|at least 0|positive sigmas"):
            bad()


def calibration_parts(module, classifier, images, labels, sigmas, choice, generator):
    """L_brier and L_anti image by image, from the formulas."""
    shares = []
    for _ in range(2):
        z = torch.randn(images.shape, generator=generator)
        rows = []
        for i, x in enumerate(images):
            sigma = 2 * sigmas[choice[i]]  # in [-1, 1] space
            t = torch.tensor([module.schedule.time_of_sigma(sigma)]).double()
            alpha = 1 / (1 + sigma**2) ** 0.5
            u_t = alpha * (2 * x[None] - 1 + sigma * z[i])
            u0 = ((u_t - sigma * alpha * module.eps(u_t, t)) / alpha).clamp(-1, 1)
            rows.append(classifier((u0 + 1) / 2).softmax(1))
        shares.append(torch.cat(rows))
    brier = anti = 0.0
    for i, y in enumerate(labels.tolist()):
        onehot = torch.zeros(shares[0].shape[1])
        onehot[y] = 1
        brier = brier + ((shares[0][i] - onehot) ** 2).sum()
        y1 = int(shares[0][i].argmax())
        if y1 != y:
            anti = anti - torch.log(1 - shares[1][i, y1])
    return brier / len(labels), anti / len(labels)


def test_diffusion_calibration_by_hand(monkeypatch):
    """Both terms, the sum, and their gradient against the formulas; the classifier gets no gradient."""
    images, labels = data()
    classifier = TinyClassifier(classes=3)
    monkeypatch.setattr(zoo, "classifier", lambda name: classifier.requires_grad_(False))
    loss = DiffusionCalibration("tiny", (0.25, 0.5), weight=0.7, anti=0.4)
    module = network()
    g = torch.Generator().manual_seed(3)
    diffusion = EpsLoss()(module, images, labels, g)
    choice = torch.randint(2, (40,), generator=g)
    brier, anti = calibration_parts(module, classifier, images, labels, loss.sigmas, choice, g)
    assert anti.item() > 0
    expected = diffusion + 0.7 * (brier + 0.4 * anti)
    got = loss(module, images, labels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    parameters = list(module.parameters())
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_calibration_without_weight_is_the_diffusion_loss():
    images, labels = load_dataset("digits", "train")
    images, labels = images[:8], labels[:8]
    module = zoo.score_model("digits")
    loss = DiffusionCalibration("digits-standard", weight=0.0)
    plain = EpsLoss()(module, images, labels, torch.Generator().manual_seed(0))
    assert loss(module, images, labels, torch.Generator().manual_seed(0)) == plain


def test_calibration_starts_at_the_embedded_weights_and_moves_them(tmp_path):
    module = build(RECIPES["digits-calibrated"])
    assert equal(module, zoo.score_model("digits"))
    assert all(p.requires_grad for p in module.parameters())
    assert main(["digits-calibrated", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    entry = json.loads((tmp_path / "digits-calibrated.json").read_text())
    assert entry["start"] == "digits"
    assert {"denoised_accuracy_sigma0.25", "denoised_accuracy_sigma1"} < set(entry["measured"])
    assert not equal(zoo.score_model(tmp_path / "digits-calibrated.safetensors"), zoo.score_model("digits"))


def test_command_trains_for_splitting_noise(tmp_path):
    assert main(["digits-dssn", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "split_accuracy" in (tmp_path / "digits-dssn.md").read_text()
    assert json.loads((tmp_path / "digits-dssn.json").read_text())["loss"]["lam"] == 1.0
