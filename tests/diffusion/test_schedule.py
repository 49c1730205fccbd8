"""Schedules against the tables of the original programs."""

import json

import numpy as np
import pytest
import torch
from conftest import DATA

from purify.diffusion.schedule import ContinuousVP, DiscreteVP, schedule_from_config

SCHEDULES = {
    "continuous": ContinuousVP(),
    "linear": DiscreteVP.linear(1000),
    "cosine": DiscreteVP.cosine(4000),
    "table": DiscreteVP([0.01, 0.02, 0.3]),
}


def test_continuous_matches_score_sde(tables):
    t = torch.from_numpy(tables["vpsde_t_grid"].astype(np.float64))
    schedule = ContinuousVP()
    np.testing.assert_allclose(schedule.alpha(t), tables["vpsde_mean_coef_f64"], rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t), tables["vpsde_std_f64"], rtol=1e-6)
    np.testing.assert_allclose(schedule.beta(t), tables["vpsde_beta_t"], rtol=1e-6)


def test_sigma_keeps_its_digits_at_small_times():
    for t in (1e-3, 1e-5, 1e-8):
        exact = 0.1 * t + 0.5 * 19.9 * t * t  # -log abar; 1 - exp(-y) = y - y^2/2 + y^3/6
        series = exact - exact**2 / 2 + exact**3 / 6
        got = ContinuousVP().sigma(torch.tensor([t], dtype=torch.float64)).item()
        assert got == pytest.approx(series**0.5, rel=1e-12)


@pytest.mark.parametrize(("name", "prefix"), [("linear", "guided"), ("cosine", "cosine")])
def test_discrete_tables(tables, name, prefix):
    schedule = SCHEDULES[name]
    k = torch.arange(1, schedule.steps + 1, dtype=torch.float64)
    np.testing.assert_allclose(schedule.betas, tables[f"{prefix}_betas"], rtol=1e-11)
    np.testing.assert_allclose(schedule.alpha_bar(k / schedule.steps), tables[f"{prefix}_alphas_cumprod"], rtol=1e-11)


def test_linear_table_is_the_discrete_table_of_the_vp_sde(tables):
    np.testing.assert_allclose(DiscreteVP.linear(1000).betas, tables["vpsde_discrete_betas_f32"], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_is_the_slope_of_log_alpha_bar(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0.01131, 0.89137, 50, dtype=torch.float64, requires_grad=True)  # off the steps k/N
    (slope,) = torch.autograd.grad(schedule.log_alpha_bar(t).sum(), t)
    torch.testing.assert_close(schedule.beta(t).detach(), -slope, rtol=1e-10, atol=0)
    step = 1e-7
    difference = (schedule.log_alpha_bar(t + step) - schedule.log_alpha_bar(t - step)) / (2 * step)
    torch.testing.assert_close(slope, difference.detach(), rtol=1e-4, atol=1e-6)


def test_time_of_sigma_matches_the_reference_rule():
    expected = json.loads((DATA / "sigma_to_t.json").read_text())
    for key, schedule in (("guided_linear1000", SCHEDULES["linear"]), ("improved_cosine4000", SCHEDULES["cosine"])):
        for sigma, (index, ratio) in expected[key].items():
            t = schedule.time_of_sigma(2 * float(sigma))
            assert round(t * schedule.steps) - 1 == index
            at = torch.tensor([t], dtype=torch.float64)
            assert (schedule.sigma(at) / schedule.alpha(at)).item() == pytest.approx(ratio, rel=1e-9)


def test_time_of_sigma_inverts_the_continuous_schedule():
    schedule = ContinuousVP()
    for sigma in (1e-3, 0.25, 0.5, 1.0, 10.0):
        t = torch.tensor([schedule.time_of_sigma(sigma)], dtype=torch.float64)
        assert (schedule.sigma(t) / schedule.alpha(t)).item() == pytest.approx(sigma, rel=1e-10)


def test_nothing_is_noised_at_time_zero():
    zero = torch.zeros(1, dtype=torch.float64)
    for steps in (3, 50, 57, 1000):
        for schedule in (DiscreteVP.linear(steps), DiscreteVP.cosine(steps), ContinuousVP()):
            assert schedule.sigma(zero).item() == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_round_trip(name):
    schedule = SCHEDULES[name]
    again = schedule_from_config(json.loads(json.dumps(schedule.config())))
    t = torch.rand(20, dtype=torch.float64)
    assert torch.equal(schedule.alpha(t), again.alpha(t))


def test_errors():
    with pytest.raises(ValueError, match="beta_min"):
        ContinuousVP(2.0, 1.0)
    with pytest.raises(ValueError, match="betas in"):
        DiscreteVP(np.array([0.1, 1.0]), {})
    with pytest.raises(ValueError, match="known: continuous, cosine, linear, table"):
        schedule_from_config({"kind": "nope"})
    with pytest.raises(ValueError, match="positive number"):
        ContinuousVP().time_of_sigma(-1.0)
    with pytest.raises(ValueError, match="beyond the end"):
        DiscreteVP.linear(1000).time_of_sigma(1e9)
