"""The adaptive attack: where it stays, what it reaches, and on what it depends."""

import pytest
import torch
from climbed import IDS, MODELS, guided, varying
from conftest import Linear, TinyClassifier, TinyConvolutions, smooth_model

from purify import DefendedClassifier, calibrate, diffpure
from purify.attacks import PGD, Adaptive
from purify.attacks.adaptive import phases
from purify.attacks.norms import BALLS
from purify.diffusion.noise import derive_seed
from purify.evaluate import Defence
from purify.evaluate.runner import judge
from purify.presets import PURIFIERS
from purify.purification.calls import calls
from purify.purification.levels import LEVELS


def test_the_probe_tells_whose_level_falls(images, labels, monkeypatch):
    """By the level of its last iterate, image by image; only those go on towards smaller t*."""
    model, attack = DefendedClassifier(TinyClassifier(), varying()), Adaptive("Linf", 0.1, calls=1000)
    probe = attack.plan(model).probe
    target = probe.climb.target(probe.model, images, labels, IDS, derive_seed(0, "probe"))
    *_, last = probe.climb.path(target, images)
    asked = {"sample_ids": IDS, "draw": torch.zeros_like(IDS), "seed": derive_seed(0, "asked")}
    share = probe.model.details(last, **asked).t_star[:, 0] / probe.model.purifier.level.highest
    middle = share.sort().values[2:4].mean().item()
    monkeypatch.setattr(phases, "FALLEN", middle)
    found = attack.run(model, images, labels, IDS, 0)
    for fallen in (False, True):
        mine = (share < middle) == fallen
        assert mine.any()
        monkeypatch.setattr(phases, "FALLEN", 2.0 if fallen else 0.0)
        alone = attack.run(model, images[mine], labels[mine], IDS[mine], 0)
        assert torch.equal(found.images[mine], alone.images)


def test_draws_of_gradients_selection_and_judges_are_apart(images, labels):
    """By the keys that the model sees: no (seed, draw) of one kind is one of another's, and none is chosen twice."""
    model, seen = DefendedClassifier(TinyClassifier(), guided()), []

    def spy(module, arguments, options):
        draws = options["draw"].tolist()
        seen.append((torch.is_grad_enabled() and arguments[0].requires_grad, options["seed"], set(draws)))

    model.register_forward_pre_hook(spy, with_kwargs=True)
    seed = derive_seed(derive_seed(0, "attack"), "adaptive")
    Adaptive("Linf", 0.1, calls=3000).run(model, images, labels, IDS, seed)
    gradients = {(s, d) for g, s, draws in seen if g for d in draws}
    chosen = {(s, d) for g, s, draws in seen if not g for d in draws}
    seen.clear()
    judge(Defence("d", model, [], 5, {}), images, IDS, 0)
    assert gradients
    assert chosen
    assert not gradients & chosen
    judges = derive_seed(0, "judge")
    assert judges not in {s for s, _ in gradients | chosen}
    first, last = Adaptive("Linf", 0.1, calls=3000).stages(model)
    assert last.race.first == first.race.draws  # the second race's draws begin after the first's


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("plain", "L2", 0.5),
        ("level", "Linf", 0.1),
        ("mse", "L1", 1.5),
        ("network", "Linf", 0.1),
        ("packed", "L2", 0.5),
        ("network", "L2", 0.5),
    ],
)
def test_images_stay_in_the_ball(name, norm, eps, images, labels):
    model = DefendedClassifier(TinyClassifier(), MODELS[name]())
    found = Adaptive(norm, eps, calls=400)(model, images, labels).images
    assert (BALLS[norm].distance(found - images) <= eps + 1e-5).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found != images).flatten(1).any(1).all()


@pytest.mark.parametrize(("name", "gradients"), [("plain", 170), ("network", 170), ("network", 1), ("level", 170)])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.2), ("L2", 0.5)])
def test_an_image_does_not_depend_on_its_batch(norm, eps, name, gradients, images, labels, monkeypatch):
    """In several tries, too."""
    monkeypatch.setattr(phases, "TRY", gradients)
    model, attack = DefendedClassifier(TinyClassifier(), MODELS[name]()), Adaptive(norm, eps, calls=500)
    whole = attack(model, images, labels, sample_ids=IDS)
    again = attack(model, images, labels, sample_ids=IDS)
    assert torch.equal(whole.images, again.images)
    rows = torch.tensor([4, 1])
    part = attack(model, images[rows], labels[rows], sample_ids=rows)
    torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-4)
    small = Adaptive(norm, eps, calls=500, max_rows=3)(model, images, labels, sample_ids=IDS)
    torch.testing.assert_close(small.images, whole.images, rtol=0, atol=1e-4)


def test_at_equal_calls_it_leaves_no_more_than_pgd(images):
    """On a purifier with much noise and few calls; labels are what the purified images mostly are."""
    model = DefendedClassifier(TinyClassifier(), diffpure(smooth_model(), 0.6, 10, "ddpm"))
    images = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(24)
    labels = judge(Defence("d", model, [], 20, {}), images, ids, 3).predictions.mode(1).values
    pgd = PGD("Linf", 0.1, steps=12, eot=4)
    budget = pgd.gradients * calls(model).gradient + pgd.forwards * calls(model).forward
    left = {}
    for attack in (pgd, Adaptive("Linf", 0.1, calls=budget)):
        found = attack(model, images, labels, sample_ids=ids).images
        judged = judge(Defence("d", model, [], 60, {}), found, ids, 0).predictions
        left[attack.name] = (judged == labels[:, None]).double().mean().item()
    assert left["adaptive"] <= left["pgd-eot"] + 0.01


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_it_reaches_the_optimum_of_a_linear_model(norm, images):
    model, eps, target = Linear(), {"Linf": 0.1, "L2": 0.2}[norm], torch.ones(7, dtype=torch.long)
    attack = Adaptive(norm, eps, calls=400)
    found = attack(model, images, target)
    w = model.w.reshape(1, 4, 4)
    delta = -eps * (w.sign() if norm == "Linf" else w / w.norm())
    torch.testing.assert_close(found.loss, -2 * ((images + delta).flatten(1) @ model.w), atol=1e-3, rtol=1e-3)
    assert (found.calls <= 400).all()
    asked = []
    model.register_forward_hook(lambda m, i, o: asked.append(len(i[0]) * (3 if o.requires_grad else 1)))
    attack.run(model, images, target, IDS, 0)
    assert sum(asked) == found.calls.sum()


def test_it_applies_to_every_purifier_and_level_of_the_registry(images, labels):
    score_model = smooth_model()
    found = calibrate(score_model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    for name, preset in PURIFIERS.items():
        for level in ("constant", "ssni-l") if name in ("diffpure", "agdm") else ("constant",):
            rule = 0.3 if level == "constant" else LEVELS[level](0.3, found)
            options = {"auxiliary": TinyConvolutions()} if name in ("agdm", "heterogeneous") else {}
            options |= {"scale": 1.0} if name == "gdmp" else {}
            model = DefendedClassifier(TinyClassifier(), preset(score_model, rule, 3, "ddpm", **options))
            result = Adaptive("Linf", 0.1, calls=700)(model, images[:2], labels[:2])
            assert result.images.shape == images[:2].shape
            assert (result.calls > 0).all()
