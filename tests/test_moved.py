"""Module names of version 0.1 work for one more version, and say where the modules are."""

import importlib
import sys

import pytest

import purify
from purify.compat import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_same_module(old, new):
    sys.modules.pop(f"purify.{old}", None)
    now = importlib.import_module(f"purify.{new}")
    spec = now.__spec__.name
    with pytest.warns(DeprecationWarning, match=f"purify.{old} is now purify.{new}"):
        found = importlib.import_module(f"purify.{old}")
    assert found is now
    assert now.__name__ == f"purify.{new}"
    assert now.__spec__.name == spec
    assert sys.modules[f"purify.{new}"] is now


def test_public_names_are_where_they_were():
    from purify.purification.levels import SSNILinear

    for name in purify.__all__:
        assert getattr(purify, name) is not None
    assert purify.SSNILinear is SSNILinear
