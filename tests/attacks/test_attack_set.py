"""APGD, low-frequency, intermediate-step, transfer and Square attacks against closed forms and by hand."""

from dataclasses import replace

import pytest
import torch
from conftest import Linear, TinyClassifier, smooth_model
from scipy.fft import dctn
from torch.nn.functional import cross_entropy

from purify import DefendedClassifier, FixedDt, Purifier, SSNISigmoid, calibrate, diffpure
from purify.attacks import (
    APGD,
    ATTACKS,
    PGD,
    AutoAttackRand,
    LeeKimPGD,
    LowFrequencyPGD,
    NormAutoAttackRand,
    Square,
    StepsPGD,
    SurrogatePGD,
    Transfer,
    kind_of,
)
from purify.attacks.apgd import checkpoints
from purify.attacks.frequency import low_pass, projector
from purify.attacks.norms import BALLS, unit
from purify.attacks.pgd import LOSSES
from purify.purification.guidance import AdversarialGuidance

IDS = torch.arange(7)


def defended(**options):
    return DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, 4, "ddpm"), **options)


# --- whose gradient -----------------------------------------------------------------------------------------------


# All but autoattack-rand-norm, which mixes the statistic in before the gradient can be seen.
KINDS = [k for k in ATTACKS.values() if issubclass(k, PGD | AutoAttackRand)]
GRADIENTS = [k for k in KINDS if k is not NormAutoAttackRand]


@pytest.mark.parametrize("kind", GRADIENTS)
def test_attacks_say_whether_they_differentiate_the_judged_model(kind, images, labels):
    """On a purifier where each stand-in, and each part held constant, changes the gradient."""
    score = smooth_model()
    found = calibrate(score, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    guidance = AdversarialGuidance(20.0, auxiliary=TinyClassifier(size=4), layer="layers.2")
    purifier = Purifier(score, SSNISigmoid(0.4, found), "ddpm", 4, guidance=guidance)
    model = DefendedClassifier(TinyClassifier(), purifier)
    attack = kind(kind.threats[0], 0.1, **({"surrogate_steps": 2} if kind is SurrogatePGD else {}))
    attack = replace(attack, goal="any") if isinstance(attack, PGD) else attack
    draws = torch.zeros(7, dtype=torch.long)

    def gradient(evaluate):
        x = images.clone().requires_grad_()
        return torch.autograd.grad(evaluate(x, labels, IDS, draws)[0].sum(), x)[0]

    own = attack.evaluator if isinstance(attack, PGD) else PGD("Linf", 0.1).evaluator
    used, true = gradient(own(attack.attacked(model), 3)), gradient(PGD("Linf", 0.1).evaluator(model, 3))
    assert torch.allclose(used, true, rtol=1e-4, atol=1e-6) is attack.exact_gradient


def test_records_name_the_kind_of_an_attack():
    for kind in ATTACKS.values():
        assert kind_of(kind(norm=kind.threats[0], eps=0.1).label) is kind
    assert kind_of("one of somebody else's") is None


# --- APGD ---------------------------------------------------------------------------------------------------------


def test_apgd_checkpoints_are_the_published_ones():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_reaches_the_optimum_of_a_linear_model(norm, images):
    model, eps = Linear(), {"Linf": 0.1, "L2": 0.2}[norm]
    found = APGD(norm, eps, steps=20, eot=1)(model, images, torch.ones(7, dtype=torch.long))
    w = model.w.reshape(1, 4, 4)
    delta = -eps * (w.sign() if norm == "Linf" else w / w.norm())
    torch.testing.assert_close(found.images, images + delta.expand_as(images), atol=1e-4, rtol=0)
    expected = -2 * ((images + delta).flatten(1) @ model.w)
    torch.testing.assert_close(found.loss, expected, atol=1e-4, rtol=1e-4)


def test_apgd_steps_carry_momentum(images, labels):
    """The third iterate by hand: a quarter of the last displacement is in the next one."""
    model, attack = TinyClassifier(), APGD("L2", 5.0, steps=50, eot=1, step_size=0.005, random_start=False)
    run = attack._iterates(attack.target(model, images, labels, IDS, 0), 0, images)
    points = [next(run)[0] for _ in range(3)]
    v = points[1].clone().requires_grad_()
    (g,) = torch.autograd.grad(LOSSES["margin"](model(v), labels).sum(), v)
    step = points[1] + 0.01 * unit(g)
    expected = points[1] + 0.75 * (step - points[1]) + 0.25 * (points[1] - points[0])
    torch.testing.assert_close(points[2], expected, atol=1e-6, rtol=0)
    assert (points[1] - points[0]).abs().max() > 1e-3


def test_apgd_halves_its_step_where_nothing_is_gained(images):
    """On a loss with a kink, large steps jump to and fro; halving ends at the optimum and plain steps do not."""

    class Kink(torch.nn.Module):
        def forward(self, x):
            value = -(x.flatten(1) - 0.5).abs().sum(1)
            return torch.stack([value, torch.zeros_like(value)], 1)

    target = torch.ones(7, dtype=torch.long)
    found = APGD("Linf", 0.4, steps=60, eot=1)(Kink().eval(), images, target)
    plain = PGD("Linf", 0.4, steps=60, eot=1, schedule="constant", loss="margin")(Kink().eval(), images, target)
    assert (found.loss > -0.25).all()  # 16 pixels
    assert (plain.loss < found.loss - 0.5).all()


def test_apgd_is_per_sample(images, labels):
    attack = APGD("Linf", 0.2, steps=6, eot=2)
    whole = attack(defended(), images, labels, sample_ids=IDS).images
    rows = torch.tensor([4, 1])
    part = attack(defended(), images[rows], labels[rows], sample_ids=rows).images
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-4)


# --- low frequencies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "cutoff", "kept"), [(8, 0.5, 4), (7, 0.5, 4), (4, 1.0, 4), (9, 0.1, 1)])
def test_the_projector_keeps_the_lowest_cosines(size, cutoff, kept):
    p = projector(size, cutoff)
    torch.testing.assert_close(p @ p, p)
    assert torch.linalg.matrix_rank(p) == kept
    v = torch.randn(2, 3, size, size, dtype=torch.float64)
    before, after = (dctn(x.numpy(), axes=(2, 3), norm="ortho") for x in (v, low_pass(v, cutoff)))
    assert abs(after[..., kept:, :]).max(initial=0) < 1e-12
    assert abs(after[..., :, kept:]).max(initial=0) < 1e-12
    assert abs(after - before)[..., :kept, :kept].max() < 1e-12


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.3), ("L1", 1.0)])
def test_low_frequency_perturbations_are_smooth_inside_the_ball_and_do_harm(norm, eps, images, labels):
    model = TinyClassifier()
    found = LowFrequencyPGD(norm, eps, steps=20, eot=1)(model, images, labels)
    delta = found.images - images
    assert (BALLS[norm].distance(delta) <= eps + 1e-5).all()

    def above(v):
        """Share of the energy above the cutoff."""
        return ((v - low_pass(v, 0.5)).square().sum() / v.square().sum()).item()

    plain = PGD(norm, eps, steps=20, eot=1)(model, images, labels).images - images
    assert above(delta) < (1e-6 if norm == "L2" else 0.5 * above(plain))  # the L2 ball scales, and no pixel is clipped
    assert (found.loss > LOSSES["margin"](model(images), labels) + 1e-3).all()
    full = LowFrequencyPGD(norm, eps, steps=20, eot=1, cutoff=1.0)(model, images, labels)
    assert (full.loss >= found.loss - 1e-4).all()


# --- intermediate steps -------------------------------------------------------------------------------------------


def test_deviation_by_hand(images):
    purifier = diffpure(smooth_model(torch.float64), 0.3, 4, "ddpm")
    u = 2 * images.double() - 1
    noise = purifier.noise(7, u.device, IDS, 2, 5)
    one_round = purifier.process(torch.full((7,), 0.3, dtype=torch.float64), noise).rounds[0]
    z = noise.normal(0, u.shape[1:], torch.float64)
    state, expected = one_round.diffuse(u), torch.zeros(7, dtype=torch.float64)
    for step in one_round.reverse:
        state = step(state)
        alpha = smooth_model().schedule.alpha(step.s)[0]
        sigma = smooth_model().schedule.sigma(step.s)[0]
        expected += alpha * (state - alpha * u - sigma * z).square().mean((1, 2, 3)) / 4
    found = purifier.purify(images.double(), sample_ids=IDS, draw=2, seed=5, deviation=True)
    torch.testing.assert_close(found.deviation, expected)
    assert purifier.purify(images.double()).deviation is None


@pytest.mark.parametrize("engine", ["full", "checkpoint"])
def test_gradient_of_the_deviation_by_finite_differences(engine, images):
    purifier = diffpure(smooth_model(torch.float64), 0.3, 4, "ddpm", gradient=engine)
    x = images.double()

    def value(v):
        return purifier.purify(v, sample_ids=IDS, deviation=True).deviation.sum()

    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(value(v), v)
    direction, h = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-6
    slope = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert (g * direction).sum().item() == pytest.approx(slope.item(), rel=1e-7)


def test_the_step_attack_raises_the_deviation(images, labels):
    def deviation(weight):
        attack = StepsPGD("Linf", 0.2, steps=8, eot=2, step_weight=weight)
        last = list(attack._iterates(attack.target(defended(), images, labels, IDS, 0), 0, None))[-1][0]
        return defended().details(last, sample_ids=IDS, draw=9, deviation=True).deviation.mean()

    assert deviation(100.0) > deviation(0.0) > deviation(-100.0)


def test_deviation_of_packed_processes_is_refused(images):
    purifier = diffpure(smooth_model(), 0.3, FixedDt(0.1), "ddpm")
    with pytest.raises(ValueError, match="under the plan fixed_steps only"):
        purifier.purify(images, deviation=True)


@pytest.mark.parametrize("engine", ["bpda", "adjoint", "surrogate"])
def test_deviation_and_its_attack_need_an_exact_engine(engine, images, labels):
    model = defended().with_gradient(engine)
    with pytest.raises(ValueError, match="engines full and checkpoint only"):
        model.purifier.purify(images, deviation=True)
    attack = StepsPGD("Linf", 0.1, steps=1, eot=1)
    assert attack.applies_to(defended())
    assert not attack.applies_to(model)
    with pytest.raises(ValueError, match="with the gradient full or checkpoint; this one does not"):
        attack(model, images, labels)


# --- black boxes --------------------------------------------------------------------------------------------------


def test_transfer_is_pgd_on_the_bare_classifier(images, labels):
    class Renamed(PGD):
        name = Transfer.name

    model = defended()
    expected = Renamed("Linf", 0.2, steps=5, eot=1)(model.classifier, images, labels)
    found = Transfer("Linf", 0.2, steps=5, eot=7)
    assert torch.equal(found(model, images, labels).images, expected.images)
    assert found.budget()["eot"] == 1


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.3), ("L2", 1.0)])
def test_square_asks_without_gradients_and_within_its_queries(norm, eps):
    asked, images = [], torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Spy(TinyClassifier):
        def forward(self, x):
            asked.append((len(x), torch.is_grad_enabled() and x.requires_grad))
            return super().forward(x)

    model = Spy(size=8)
    labels = model(images).argmax(1)
    asked.clear()
    found = Square(norm, eps, queries=30)(model, images, labels).images
    assert not any(grad for _, grad in asked)
    assert sum(n for n, _ in asked) <= 7 * 33 + 1  # the queries, two looks at the clean image, one at the result
    assert (BALLS[norm].distance(found - images) <= eps + 1e-5).all()
    assert (model(found).argmax(1) != labels).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowFrequencyPGD("Linf", 0.1, cutoff=0), "cutoff of the low-frequency attack"),
        (lambda: Square("Linf", 0.1, queries=0), "queries must be"),
        (lambda: StepsPGD("Linf", 0.1, step_weight=float("inf")), "step_weight must be a finite number"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attacks_about_purifiers_refuse_bare_classifiers(images, labels):
    for kind, needed in ((Transfer, "has a purifier"), (StepsPGD, "steps all samples together")):
        with pytest.raises(ValueError, match=f"for a model that {needed}"):
            kind("Linf", 0.1)(TinyClassifier(), images, labels)
    packed = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.3, FixedDt(0.1), "ddpm"))
    assert not StepsPGD("Linf", 0.1).applies_to(packed)
    assert Transfer("Linf", 0.1).applies_to(packed)


# --- answers to iterates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [APGD, LowFrequencyPGD, SurrogatePGD])
def test_answers_to_iterates_are_counted(kind, images, labels):
    """Against what a hook on the model sees: every draw at every iterate of both runs, the last included."""
    model, asked = defended(), torch.zeros(7, 2, dtype=torch.long)

    def see(module, args, kwargs, logits):
        for i, answer in zip(kwargs["sample_ids"].tolist(), logits.argmax(1).tolist(), strict=True):
            asked[i] += torch.tensor([1, int(answer != labels[i])])

    model.register_forward_hook(see, with_kwargs=True)
    found = kind("Linf", 0.2, steps=3, eot=2, restarts=2).run(model, images, labels, IDS, 3).submitted
    assert found.asked.tolist() == asked[:, 0].tolist() == [2 * (3 + 1) * 2] * 7
    assert found.wrong.tolist() == asked[:, 1].tolist()
    assert 0 < found.wrong.sum() < found.asked.sum()


def test_answers_of_another_network_are_not_counted(images, labels):
    found = Transfer("Linf", 0.2, steps=3, eot=2).run(defended(), images, labels, IDS, 3)
    assert found.submitted is None


# --- as papers ran them -------------------------------------------------------------------------------------------


def test_lee_kims_attack_against_a_loop(images, labels):
    """Signs of the mean gradient of cross-entropy, from the clean image, and the last iterate."""
    model, eps = defended(), 0.02
    found = LeeKimPGD("Linf", eps, steps=4, eot=2).run(model, images, labels, IDS, 3)
    z = images
    for step in range(4):
        x = z.clone().requires_grad_()
        losses = [cross_entropy(model(x, sample_ids=IDS, draw=2 * step + d, seed=3), labels) for d in range(2)]
        (gradient,) = torch.autograd.grad(sum(losses), x)
        z = (z + 0.007 * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    torch.testing.assert_close(found.images, z, rtol=0, atol=1e-6)
    assert (found.images - images).abs().max() == pytest.approx(eps)
    assert found.submitted is None  # its losses do not say which answers were wrong
    assert kind_of("pgd-eot-lee-kim") is LeeKimPGD
    assert "pgd-eot-lee-kim" not in ATTACKS  # strongest is without it
