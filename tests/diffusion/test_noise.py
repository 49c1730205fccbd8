"""Keyed noise against Random123's known answers, statistics, and independence from the batch."""

import pytest
import torch
from scipy import stats

from purify.diffusion.noise import MASK, Noise, derive_seed, philox

SHAPE = (1, 5, 3)  # not a multiple of four numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK, MASK), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor([c]) for c in counter], key)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_normal_and_uniform_have_their_laws():
    noise = Noise.keyed(7, torch.arange(200), 3)
    assert stats.kstest(noise.normal(1, (500,), torch.float64).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(noise.uniform(1, (500,), torch.float64).flatten().numpy(), "uniform").pvalue > 1e-3
    z = noise.normal(2, (500,), torch.float64)
    assert abs(torch.corrcoef(z[:100])[0, 1:]).max() < 0.2


def test_every_key_matters():
    base = Noise.keyed(7, torch.tensor([4]), 3)
    others = [
        Noise.keyed(8, torch.tensor([4]), 3).normal(1, SHAPE),
        Noise.keyed(7 + 2**40, torch.tensor([4]), 3).normal(1, SHAPE),
        Noise.keyed(7, torch.tensor([5]), 3).normal(1, SHAPE),
        Noise.keyed(7, torch.tensor([4]), 2).normal(1, SHAPE),
        base.normal(2, SHAPE),
        base.stream("attack").normal(1, SHAPE),
    ]
    for other in others:
        assert not torch.isclose(base.normal(1, SHAPE), other).any()


def test_rows_do_not_depend_on_their_batch():
    noise = Noise.keyed(1, torch.arange(10), torch.arange(10) % 3)
    whole = noise.normal(5, SHAPE)
    order = torch.tensor([7, 2, 2, 9])
    assert torch.equal(noise[order].normal(5, SHAPE), whole[order])
    steps = torch.arange(10)
    mixed = noise.normal(steps, SHAPE)
    assert torch.equal(mixed[5], noise.normal(5, SHAPE)[5])
    assert torch.equal(mixed[9], noise.normal(9, SHAPE)[9])


def test_float32_is_float64_rounded():
    noise = Noise.keyed(1, torch.arange(4))
    assert torch.equal(noise.normal(0, SHAPE), noise.normal(0, SHAPE, torch.float64).float())


def test_fresh_noise_follows_the_global_seed_and_keyed_noise_ignores_it():
    torch.manual_seed(3)
    first = Noise.fresh(2).normal(0, SHAPE)
    second = Noise.fresh(2).normal(0, SHAPE)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, Noise.fresh(2).normal(0, SHAPE))
    state = torch.get_rng_state()
    Noise.keyed(1, [0, 1]).normal(0, SHAPE)
    assert torch.equal(state, torch.get_rng_state())


def test_derived_seeds_are_stable_and_differ():
    assert derive_seed(0, "judge") == 4801448831039906259
    assert len({derive_seed(s, n) for s in range(10) for n in ("judge", "attack")}) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, torch.tensor([0.5])), "whole numbers"),
        ((0, torch.tensor([-1])), "sample_ids must lie"),
        ((0, torch.tensor([1]), 2**33), "draw must lie"),
        ((-1, torch.tensor([1])), "seed must be"),
        ((0.5, torch.tensor([1])), "seed must be"),
        ((0, torch.tensor([1]), 0.5), "draw must be whole numbers"),
        ((0, torch.tensor([True])), "sample_ids must be whole numbers"),
        ((0, torch.tensor([1, 2]), torch.tensor([1, 2, 3])), r"draw \(\) or \(N,\)"),
        ((0, torch.tensor(1)), "sample_ids must have shape"),
    ],
)
def test_bad_keys(arguments, message):
    with pytest.raises(ValueError, match=message):
        Noise.keyed(*arguments)
