"""The embedded networks: they load, are small, and measure what their cards say."""

import json
from dataclasses import asdict

import pytest
import torch
from test_data import needs_fashion

from purify import zoo
from purify.data import DATASETS, load_dataset
from purify.train.measure import measure_classifier, measure_score
from purify.train.recipes import RECIPES

LIMITS = {"digits": 200_000, "fashion_mnist": 600_000}


def data(dataset):
    return pytest.param(dataset, marks=needs_fashion if dataset == "fashion_mnist" else ())


def test_every_recipe_is_shipped_and_every_entry_has_a_recipe_and_a_card():
    assert set(zoo.names()) == set(RECIPES)
    for name in zoo.names():
        entry = zoo.describe(name)
        assert entry["architecture"] == RECIPES[name].architecture
        assert entry["hyper"] == vars(RECIPES[name].hyper)
        loss = {"kind": type(RECIPES[name].loss).__name__, **asdict(RECIPES[name].loss)}
        assert entry["loss"] == json.loads(json.dumps(loss))  # tuples are lists there
        card = (zoo.WEIGHTS / f"{name}.md").read_text()
        assert f"python -m purify.train {name}" in card
        assert all(f"{v:.4f}" in card for v in entry["measured"].values())


@pytest.mark.parametrize("dataset", [data("digits"), data("fashion_mnist")])
def test_score_models_measure_what_their_cards_say(dataset):
    model = zoo.score_model(dataset)
    assert sum(p.numel() for p in model.parameters()) <= LIMITS[dataset]
    assert not any(p.requires_grad for p in model.parameters())
    images = load_dataset(dataset, "test")[0]
    card = zoo.describe(dataset)["measured"]
    if dataset == "digits":
        assert measure_score(model, images) == pytest.approx(card, rel=1e-3)
    assert card["eps_loss_uniform_t"] < 0.1
    assert model.eps(2 * images[:2] - 1, torch.tensor([0.1, 0.2])).shape == images[:2].shape


def test_the_flow_network_measures_what_its_card_says_and_is_read_as_declared():
    model, images = zoo.score_model("digits-flow"), load_dataset("digits", "test")[0]
    assert model.prediction == "velocity"
    assert measure_score(model, images) == pytest.approx(zoo.describe("digits-flow")["measured"], rel=1e-3)
    assert model.check(images).passed


@pytest.mark.parametrize("dataset", [data("digits"), data("fashion_mnist")])
@pytest.mark.parametrize("kind", ["standard", "at"])
def test_classifiers_measure_what_their_cards_say(dataset, kind):
    model = zoo.classifier(f"{dataset}-{kind}")
    images, labels = load_dataset(dataset, "test")
    card = zoo.describe(f"{dataset}-{kind}")["measured"]
    if dataset == "digits":
        eps = DATASETS[dataset].eps["Linf"]
        assert measure_classifier(model, images, labels, eps) == pytest.approx(card, abs=0.005)
    else:
        images, labels = images[:1000], labels[:1000]
        right = (model(images).argmax(1) == labels).float().mean().item()
        assert right == pytest.approx(card["clean_accuracy"], abs=0.03)


def test_undefended_classifiers_fall():
    for dataset in LIMITS:
        measured = zoo.describe(f"{dataset}-standard")["measured"]
        eps = DATASETS[dataset].eps["Linf"]
        assert measured[f"robust_accuracy_eps{eps:g}"] <= 0.06
        assert zoo.describe(f"{dataset}-at")["measured"][f"robust_accuracy_eps{eps:g}"] > 0.3


def test_models_load_by_path_and_errors_are_clear(tmp_path):
    source = zoo.WEIGHTS / "digits-at"
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"mine{suffix}").write_bytes(source.with_suffix(suffix).read_bytes())
    path = tmp_path / "mine.safetensors"
    assert zoo.classifier(path)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    with pytest.raises(ValueError, match="is a classifier model, not a score"):
        zoo.score_model(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        zoo.classifier(path)
    path.write_bytes((zoo.WEIGHTS / "digits.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not fit this network: missing features\.0\.weight.*and \d+ more"):
        zoo.classifier(path)
    path.write_bytes(whole)
    entry = json.loads(path.with_suffix(".json").read_text())
    entry["architecture"]["widths"] = [32, 32]
    path.with_suffix(".json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"has shape \(64, 32, 3, 3\) instead of \(32, 32, 3, 3\)"):
        zoo.classifier(path)
    for text, message in {
        "{": "cannot be read as a purify model description",
        "[1]": "cannot be read as a purify model description",
        '{"kind": "classifier"}': "lacks architecture",
        '{"kind": "classifier", "architecture": {"kind": "small-cnn", "depth": 3}}': "no network of purify's",
    }.items():
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=message):
            zoo.classifier(path)
    with pytest.raises(ValueError, match="Unknown zoo model 'nothing'; known: digits"):
        zoo.classifier("nothing")
