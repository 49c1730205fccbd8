"""What purifiers are set to on the embedded data sets."""

import json

import pytest

from purify import PURIFIERS, Purifier, wrap
from purify.settings import SETTINGS, setting


@pytest.mark.parametrize("purifier", PURIFIERS)
@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist"])
def test_every_purifier_has_settings_of_its_own_that_round_trip(purifier, dataset):
    """None runs as its paper says for CIFAR-10, and a preset by name is what its config says."""
    assert (purifier, dataset) in SETTINGS
    own, published = setting(purifier, dataset), setting(purifier, "cifar10")
    assert own.options() != published.options()
    assert own.source != published.source
    built = wrap(f"{dataset}-standard", dataset, purifier=purifier).purifier
    config = json.loads(json.dumps(built.config()))
    auxiliary = getattr(built.guidance, "auxiliary", None)
    assert Purifier.from_config(config, built.score_model, auxiliary).config() == built.config()
