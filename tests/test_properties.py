"""What holds for every input: schedules, projections, plans, intervals, packing, records and options (hypothesis)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from purify import ContinuousVP, DiscreteVP, FixedDt, FixedSteps
from purify.attacks.norms import BALLS, L1Ball
from purify.diffusion.noise import Noise
from purify.evaluate.metrics import difference, estimate, mean_correct, wilson, worst_mean
from purify.evaluate.records import parse, to_line
from purify.options import _number, _size
from purify.purification.plans import packing, reverse_times

FEW = settings(max_examples=40, deadline=None, derandomize=True)  # the same examples everywhere
UNIT = st.floats(0, 1, allow_nan=False)
IMAGES = st.lists(st.lists(UNIT, min_size=9, max_size=9), min_size=1, max_size=3)
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=6, unique=True)
STEPS = st.lists(st.lists(st.floats(-2, 2), min_size=9, max_size=9), min_size=3, max_size=3)


def batch(values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 3, 3)


@FEW
@given(st.floats(1e-3, 5), st.floats(0, 30), st.lists(st.floats(1e-6, 1), min_size=2, max_size=9))
def test_a_continuous_schedule_preserves_variance_and_only_adds_noise(low, more, times):
    schedule, t = ContinuousVP(low, low + more), torch.tensor(times).double().sort().values
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    assert (schedule.alpha(t).diff() <= 0).all()
    slope = torch.func.vmap(torch.func.grad(lambda s: -schedule.log_alpha_bar(s)))(t)
    torch.testing.assert_close(slope, schedule.beta(t))
    ratio = float(schedule.sigma(t[-1]) / schedule.alpha(t[-1]))
    if ratio < 1e3:
        assert schedule.time_of_sigma(ratio) == pytest.approx(float(t[-1]), rel=1e-6)


@FEW
@given(st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=40))
def test_a_discrete_schedule_is_the_product_of_its_betas(betas):
    schedule = DiscreteVP(betas)
    t = torch.arange(1, len(betas) + 1).double() / len(betas)
    expected = torch.tensor([math.prod(1 - b for b in betas[:k]) for k in range(1, len(betas) + 1)]).double()
    torch.testing.assert_close(schedule.alpha_bar(t), expected)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("norm", BALLS)
@FEW
@given(IMAGES, STEPS, st.floats(0.01, 3))
def test_a_projection_is_in_ball_and_box_and_changes_nothing_there(norm, images, steps, eps):
    ball, x = BALLS[norm], batch(images)
    z = x + batch(steps)[: len(x)]
    once = ball.project(z, x, eps)
    assert (ball.distance(once - x) <= eps * (1 + 1e-6) + 1e-9).all()
    assert (once >= 0).all()
    assert (once <= 1).all()
    torch.testing.assert_close(ball.project(once, x, eps), once, rtol=0, atol=1e-9)


@FEW
@given(IMAGES, STEPS, st.floats(0.05, 3), st.integers(0, 2**31))
def test_no_point_of_ball_and_box_is_nearer_than_the_l1_projection(images, steps, eps, seed):
    ball, x = L1Ball(), batch(images)
    z = x + batch(steps)[: len(x)]
    near = (ball.project(z, x, eps) - z).flatten(1).norm(dim=1)
    g = torch.Generator().manual_seed(seed)
    for _ in range(20):
        inside = (x + torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(0, 1)
        share = (eps / ball.distance(inside - x).clamp_min(1e-12)).clamp_max(1)
        other = x + (inside - x) * share.reshape(-1, 1, 1, 1)
        assert ((other - z).flatten(1).norm(dim=1) >= near - 1e-6).all()


@pytest.mark.parametrize("norm", BALLS)
@FEW
@given(IMAGES, STEPS)
def test_a_direction_ascends_and_has_unit_length(norm, images, steps):
    ball, x = BALLS[norm], batch(images)
    gradient = batch(steps)[: len(x)]
    moved = ball.direction(gradient, x, x)
    assert ((moved * gradient).flatten(1).sum(1) >= 0).all()
    length = ball.distance(moved)
    assert ((length <= 1 + 1e-9) & ((length > 1 - 1e-6) | (length == 0))).all()


@FEW
@given(st.floats(1e-3, 1), st.integers(1, 50), st.floats(0, 0.5))
def test_reverse_times_fall_from_t_star_to_the_end(t_star, steps, share):
    t_end = share * t_star
    times = torch.stack(reverse_times(torch.tensor([t_star], dtype=torch.float64), steps, t_end))[:, 0]
    assert len(times) == steps + 1
    assert float(times[0]) == t_star
    assert (times.diff() <= 0).all()
    assert float(times[-1]) == pytest.approx(min(t_end, t_star / steps))


@FEW
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=6), st.sampled_from([1e-2, 0.03, 0.1]))
def test_a_fixed_dt_takes_as_many_steps_as_the_level_has_lengths(levels, dt):
    t = torch.tensor(levels).double()
    counts = FixedDt(dt).counts(t)
    assert ((counts.double() * dt - t).abs() <= dt / 2 + 1e-12)[counts > 1].all()
    assert (counts >= 1).all()
    assert FixedSteps(7).counts(t).tolist() == [7] * len(t)


@FEW
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 8))
def test_packing_gives_every_sample_its_steps_in_order_and_fills_the_room(counts, room):
    seen: dict[int, list[int]] = {i: [] for i in range(len(counts))}
    batches = list(packing(torch.tensor(counts), room))
    for rows, done, _ in batches:
        assert len(rows) <= room
        for row, step in zip(rows.tolist(), done.tolist(), strict=True):
            seen[row].append(step)
    assert seen == {i: list(range(n)) for i, n in enumerate(counts)}
    full = sum(len(rows) == room for rows, _, _ in batches)
    assert full >= len(batches) - max(counts)


@FEW
@given(st.integers(1, 400), st.data())
def test_wilsons_interval_holds_the_share_and_solves_its_equation(n, data):
    k = data.draw(st.integers(0, n))
    found = wilson(k, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    z = stats.norm.ppf(0.975)
    for p in (found.low, found.high):
        if 0 < p < 1:
            assert abs(k / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-6)


@FEW
@given(st.lists(UNIT, min_size=2, max_size=40), st.integers(0, 5))
def test_intervals_hold_their_mean_and_do_not_depend_on_the_order(values, seed):
    values = np.array(values)
    found = estimate(values, seed)
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12
    assert found.value == pytest.approx(values.mean())
    assert difference(values, values).value == 0


@FEW
@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 12), st.integers(0, 2**31))
def test_the_worst_mean_is_between_the_best_single_draw_and_the_weakest_attack(attacks, n, draws, seed):
    g = np.random.default_rng(seed)
    labels = g.integers(0, 3, n)
    right = [g.integers(0, 3, (n, draws)) == labels[:, None] for _ in range(attacks)]
    worst = worst_mean(right)
    assert worst.shape == (n,)
    assert ((worst >= 0) & (worst <= 1)).all()
    assert worst.mean() <= min(r.mean() for r in right) + 1e-12
    single = worst_mean(right[:1])
    np.testing.assert_allclose(single, mean_correct(np.where(right[0], labels[:, None], 9), labels))


@FEW
@given(
    st.text(min_size=1, max_size=9), st.integers(0, 2**40), st.lists(st.integers(-1, 9), min_size=1, max_size=9), UNIT
)
def test_records_come_back_from_their_line(name, sample, predictions, level):
    record = {"defence": name, "attack": "pgd-eot", "sample": sample, "label": 3, "predictions": predictions}
    record["t_star"] = level
    line = to_line(record)
    assert line.count("\n") == 1
    assert parse(line.encode()) == record
    assert parse(line.encode()[: len(line) // 2]) is None


@FEW
@given(st.integers(1, 2**20), st.integers(1, 2**20), st.integers(0, 2**50))
def test_numbers_and_sizes_are_what_they_say(a, b, size):
    assert _number(f"{a}/{b}") == pytest.approx(a / b)
    assert _number(repr(a / b)) == a / b
    assert _size(str(size)) == _size(size) == size
    assert _size(f"{a}M") == a * 2**20


@FEW
@given(st.integers(0, 2**62), IDS, st.integers(0, 99))
def test_noise_of_a_sample_depends_on_its_keys_alone(seed, ids, step):
    rows = torch.tensor(ids)
    whole = Noise.keyed(seed, rows).normal(step, (1, 2, 2))
    last = Noise.keyed(seed, rows[-1:]).normal(step, (1, 2, 2))
    assert torch.equal(whole[-1:], last)
    assert not torch.equal(whole[0], whole[1])
