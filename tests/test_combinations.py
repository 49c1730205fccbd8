"""Every purifier with every noise level, from the registries: what is registered is tested."""

import inspect
import json

import pytest
import torch
from conftest import TinyConvolutions, assert_finite_differences, smooth_model

from purify import PURIFIERS, Purifier, calibrate
from purify.diffusion.reverse import REVERSE_RULES
from purify.purification.levels import LEVELS, Settings, build_level
from purify.purification.plans import FixedDt

NETWORKS = {"auxiliary": TinyConvolutions}  # parameters that presets cannot do without
PLANS = {"steps": 3, "dt": FixedDt(0.07, batch=3)}


def given(purifier):
    """What the preset needs beside what every preset takes."""
    parameters = inspect.signature(PURIFIERS[purifier]).parameters
    return {name: make().double() for name, make in NETWORKS.items() if name in parameters}


def mild(purifier):
    """Scales of papers are for images of more pixels."""
    return {"scale": 1.0} if "scale" in inspect.signature(PURIFIERS[purifier]).parameters else {}


def make(purifier, level, plan):
    model = smooth_model(torch.float64)
    reference = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = build_level(level, Settings(0.2, lambda: calibrate(model, reference), t_max=0.6), {})
    return PURIFIERS[purifier](model, rule, plan, **given(purifier), **mild(purifier))


def holds(purifier):
    """Whether the preset's rule holds its time, so that steps of a length say nothing."""
    rule = inspect.signature(PURIFIERS[purifier]).parameters["reverse"].default
    return (REVERSE_RULES[rule]() if isinstance(rule, str) else rule).held


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("purifier", PURIFIERS)
def test_every_purifier_takes_every_noise_level(purifier, level, plan, images):
    """It purifies by keys, its gradient is exact, its config comes back."""
    x = images.double()
    if holds(purifier) and plan == "dt":
        with pytest.raises(ValueError, match="stays at its time"):
            make(purifier, level, PLANS[plan])
        return
    built = make(purifier, level, PLANS[plan])
    found = built.purify(x, sample_ids=range(7), seed=3)
    assert found.images.isfinite().all()
    assert (len(found.t_star.unique()) > 1) == built.level.varies
    backwards = built(x.flip(0), sample_ids=range(6, -1, -1), seed=3).flip(0)
    torch.testing.assert_close(backwards, found.images, rtol=1e-9, atol=1e-12)
    config = json.loads(json.dumps(built.config()))
    again = Purifier.from_config(config, built.score_model, *given(purifier).values())
    assert torch.equal(again(x, sample_ids=range(7), seed=3), found.images)
    assert built.exact
    assert_finite_differences(built, x, 1e-5, 1e-6)
