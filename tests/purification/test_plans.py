"""Execution plans: packing by brute force, network calls, and exact gradients through t* under both."""

import pytest
import torch
from conftest import TinyClassifier, assert_second_derivative, smooth_model
from torch.nn.functional import cross_entropy

from purify import DefendedClassifier, FixedDt, FixedSteps, Purifier, SSNILinear, SSNISigmoid, calibrate
from purify.diffusion.reverse import DDIM, Ancestral, EulerMaruyama, ProbabilityFlow
from purify.purification.gradients import Checkpoint, Full
from purify.purification.plans import packing

IDS = torch.arange(7)
PLANS = {"fixed_steps": FixedSteps(5), "fixed_dt": FixedDt(0.05), "refilled": FixedDt(0.05, batch=3)}
ENGINES = {
    "full": Full(),
    "checkpoint": Checkpoint(),
    "some-fit": Checkpoint(memory_budget=8_000),
    "all-fit": Full(memory_budget=10**9),
}
RULES = {"sde": EulerMaruyama(), "ddpm": Ancestral(), "ddim": DDIM(0.0), "ode": ProbabilityFlow("rk4")}


def spread(kind=SSNISigmoid, dtype=torch.float64):
    """An SSNI rule whose levels for random images lie well apart and are not clipped."""
    model = smooth_model(dtype)
    found = calibrate(model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype))
    return kind(0.4, found, bias=0.1, **({"t_max": 0.9} if kind is SSNILinear else {}))


@pytest.mark.parametrize("room", [1, 3, 8, 50])
def test_packing_gives_every_sample_its_steps_in_order(room):
    counts = torch.randint(1, 9, (30,), generator=torch.Generator().manual_seed(room))
    seen = {i: [] for i in range(30)}
    previous, sizes = None, []
    for rows, done, admitted in packing(counts, room):
        if previous is not None:
            going, joined = previous
            assert set(rows.tolist()) == going | joined
        for row, step in zip(rows.tolist(), done.tolist(), strict=True):
            seen[row].append(step)
        left = counts[rows] - done
        previous = set(rows[left > 1].tolist()), set(admitted.tolist())
        sizes.append(len(rows))
    assert all(seen[i] == list(range(counts[i])) for i in range(30))
    assert sum(sizes) == counts.sum()
    assert max(sizes) == min(room, 30)
    # Full batches as long as anybody waits; the longest first leaves a tail no longer than one sample's steps.
    assert sum(size < min(room, 30) for size in sizes) <= counts.max()


def test_no_samples():
    purifier = Purifier(smooth_model(), 0.2, "ddpm", FixedDt(0.05))
    assert purifier(torch.rand(0, 1, 4, 4)).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_at_whole_multiples_both_plans_are_one(images, rule, batch):
    dt = Purifier(smooth_model(), 0.3, RULES[rule], FixedDt(0.05, batch))(images, sample_ids=IDS)
    steps = Purifier(smooth_model(), 0.3, RULES[rule], 6)(images, sample_ids=IDS)
    torch.testing.assert_close(dt, steps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_samples_come_back_in_order_and_do_not_depend_on_the_batch(images, plan):
    level = spread(dtype=torch.float32)
    purifier = Purifier(smooth_model(), level, "sde", PLANS[plan], t_end=0.01)
    whole = purifier.purify(images, sample_ids=IDS)
    assert whole.t_star.std() > 0.02
    assert whole.network_calls.tolist() == (8 + PLANS[plan].counts(whole.t_star)).tolist()
    for i in range(7):
        alone = purifier(images[i : i + 1], sample_ids=[i])
        torch.testing.assert_close(alone[0], whole.images[i], rtol=0, atol=1e-5)


def test_the_first_step_absorbs_the_remainder():
    plan = FixedDt(0.1)
    t_star = torch.tensor([0.04, 0.12, 0.16, 0.3], dtype=torch.float64)
    assert plan.counts(t_star).tolist() == [1, 1, 2, 3]
    purifier = Purifier(smooth_model(), 0.3, "ddpm", plan, t_end=0.001)
    noise = purifier.noise(4, torch.device("cpu"), [0, 1, 2, 3], 0, 0)
    one_round = purifier.process(t_star, noise).rounds[0]
    times: dict[int, list[tuple[float, float]]] = {i: [] for i in range(4)}
    for step in one_round.reverse:
        for i, t, s in zip(step.noise.sample_ids.tolist(), step.t.tolist(), step.s.tolist(), strict=True):
            times[i].append((pytest.approx(t), pytest.approx(s)))
    assert times == {
        0: [(0.04, 0.001)],
        1: [(0.12, 0.001)],
        2: [(0.16, 0.1), (0.1, 0.001)],
        3: [(0.3, 0.2), (0.2, 0.1), (0.1, 0.001)],
    }


@pytest.mark.parametrize("batch", [None, 64, 100])
def test_network_calls_are_the_sum_of_the_samples_steps(batch):
    """256 samples with a real spread of t*: no call is spent on a sample that has finished."""
    x = torch.rand(256, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    purifier = Purifier(smooth_model(), spread(dtype=torch.float32), "ddpm", FixedDt(0.02, batch))
    sizes = []
    purifier.score_model.network.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    found = purifier.purify(x, sample_ids=range(256))
    steps = purifier.plan.counts(found.t_star)
    assert steps.float().mean() < 0.75 * steps.max()
    assert sum(sizes) == steps.sum() + 8 * 256 == found.network_calls.sum()
    assert batch is None or max(sizes[8:]) == batch  # after the score norm


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("kind", [SSNILinear, SSNISigmoid])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_by_finite_differences(images, plan, engine, kind, through):
    """Exact through t*; with t* held constant, exact for the process that takes the levels as they are."""
    level, x, y = spread(kind), images.double(), IDS % 5
    purifier = Purifier(
        smooth_model(torch.float64), level, "ddpm", PLANS[plan], gradient=ENGINES[engine], clip=False
    ).with_gradient(through_level=through)
    model = DefendedClassifier(TinyClassifier().double(), purifier)
    held = purifier.purify(x, sample_ids=IDS).t_star

    def loss(v):
        if through:
            return cross_entropy(model(v, sample_ids=IDS), y, reduction="sum")
        noise = purifier.noise(7, v.device, IDS, 0, 0)
        u = purifier.process(held, noise).run(2 * v - 1, lambda step, w: step(w))
        return cross_entropy(model.classifier((u + 1) / 2), y, reduction="sum")

    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(model(v, sample_ids=IDS), y, reduction="sum"), v)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = 1e-6
    with torch.no_grad():
        slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    assert (g * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", ["sde", "ddim", "ode"])
def test_gradients_by_finite_differences_for_other_rules(images, plan, rule):
    purifier = Purifier(smooth_model(torch.float64), spread(), RULES[rule], PLANS[plan], clip=False)
    x = images.double()
    v = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(purifier(v, sample_ids=IDS).square().sum(), v)
    direction, h = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 1e-6
    with torch.no_grad():
        ends = [purifier(x + s * h * direction, sample_ids=IDS).square().sum() for s in (1, -1)]
    assert (g * direction).sum().item() == pytest.approx(((ends[0] - ends[1]) / (2 * h)).item(), rel=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_through_the_level_matters(images, plan):
    x = images.double()
    purifier = Purifier(smooth_model(torch.float64), spread(), "ddpm", PLANS[plan], clip=False)

    def gradient(p):
        v = x.clone().requires_grad_()
        return torch.autograd.grad(p(v, sample_ids=IDS).square().sum(), v)[0]

    exact, held = gradient(purifier), gradient(purifier.with_gradient(through_level=False))
    assert (exact - held).norm() > 1e-3 * exact.norm()
    assert torch.equal(purifier(x, sample_ids=IDS), purifier.with_gradient(through_level=False)(x, sample_ids=IDS))


@pytest.mark.parametrize("engine", ["full", "checkpoint", "some-fit"])
@pytest.mark.parametrize("plan", PLANS)
def test_double_backward_through_the_level(images, plan, engine):
    purifier = Purifier(smooth_model(torch.float64), spread(), "sde", PLANS[plan], gradient=ENGINES[engine])
    x = images[:3].double()
    assert_second_derivative(lambda w: purifier(w, sample_ids=range(3)).square().sum(), x, 1e-6, 1e-5)


def test_a_budget_keeps_what_fits_of_a_packed_round(images):
    """Rows recomputed in the backward pass fall from all to none as the budget grows."""

    def rows(engine):
        purifier = Purifier(smooth_model(), spread(dtype=torch.float32), "ddpm", FixedDt(0.05), gradient=engine)
        sizes = []
        purifier.score_model.network.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
        v = images.clone().requires_grad_()
        torch.autograd.grad(purifier(v, sample_ids=IDS).sum(), v)
        return sum(sizes)

    least = rows(Full())
    assert rows(Checkpoint()) == 2 * least
    assert rows(Checkpoint(memory_budget=10**9)) == least
    some = [rows(Checkpoint(memory_budget=b)) for b in (0, 5_000, 10_000, 20_000)]
    assert sorted(some, reverse=True) == some
    assert least < some[2] < some[0]


def test_surrogate_and_bpda_run_under_both_plans(images):
    for plan in PLANS.values():
        purifier = Purifier(smooth_model(), spread(dtype=torch.float32), "ddpm", plan)
        for engine in ("bpda", {"kind": "surrogate", "steps": 2}):
            v = images.clone().requires_grad_()
            x_hat = purifier.with_gradient(engine)(v, sample_ids=IDS)
            assert torch.equal(x_hat, purifier(images, sample_ids=IDS))
            (g,) = torch.autograd.grad(x_hat.sum(), v)
            assert g.isfinite().all()
            assert g.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedDt(0.0), r"dt must lie in \(0, 1\]"),
        (lambda: FixedDt(0.1, batch=0), "batch of the fixed_dt plan must be"),
        (lambda: FixedSteps(0), "steps must be"),
        (lambda: Purifier(smooth_model(), 0.2, "sde", {"kind": "fixed"}), "Unknown execution plan 'fixed'"),
        (lambda: Purifier(smooth_model(), 0.2, "one-shot", FixedDt(0.1)), "one-shot rule denoises in one step"),
        (lambda: Purifier(smooth_model(), 0.2, "sde", FixedDt(0.1), gradient="adjoint"), "needs the plan fixed_steps"),
        (lambda: Purifier(smooth_model(), 0.2, "sde", FixedDt(0.1)).with_gradient("adjoint"), "fixed_steps"),
        (lambda: Purifier(smooth_model(), 0.2, "sde", FixedDt(0.01), t_end=0.01), "smaller than a step"),
        (lambda: Purifier(smooth_model(), 0.04, "sde", FixedDt(0.1), t_end=0.05), "smaller than a step, 0.04"),
        (lambda: Purifier(smooth_model(), 0.2, "sde", FixedDt(0.05), t_end=0.1), "smaller than a step, 0.05"),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(ValueError, match=message):
        make()
