"""Purifiers and auxiliary networks from a file are asked what all others are, before any work."""

import re

import pytest
import torch

from purify import Evaluation, zoo
from purify.evaluate.attacking import prepare

PARTS = """
import torch
from torch import nn
from types import SimpleNamespace
from purify import Purifier, ScoreModel, agdm, zoo
from purify.diffusion.classes import Predicted

class Guide(nn.Module):
    def __init__(self, answer=lambda z: z, mix=0.0):
        super().__init__()
        self.network, self.answer, self.mix = zoo.classifier("digits-guide"), answer, mix
        self.eval()
    def forward(self, x):
        return self.answer(self.network(x + self.mix * x.roll(1, 0)))

def good(): return Guide()
def dressed(): return Guide(lambda z: SimpleNamespace(logits=z))
def pair(): return Guide(lambda z: (z, z))
def nan(): return Guide(lambda z: z * float("nan"))
def mixing(): return Guide(mix=0.5)
def numpy(): return Guide(lambda z: torch.from_numpy(z.numpy()))
def cut(): return Guide(lambda z: z.detach())

class Score(nn.Module):
    def __init__(self, network, what):
        super().__init__()
        self.network, self.what = network, what
    def forward(self, u, labels):
        if self.what == "mixing":
            u = u + 0.5 * u.roll(1, 0)
        if self.what == "cut":
            u = u.detach()
        eps = self.network(u, labels)
        return eps / (labels > 60).to(eps)[:, None, None, None] if self.what == "infinite" else eps

def _with(score_model, what):
    model = ScoreModel(Score(score_model.network, what), score_model.schedule, image_shape=(1, 8, 8))
    return Purifier(model, 0.1, "ddpm", 2)

def mixes(score_model, **options): return _with(score_model, "mixing")
def cuts(score_model, **options): return _with(score_model, "cut")
def infinite(score_model, **options): return _with(score_model, "infinite")
def own(score_model, **options): return _with(score_model, "own")
def nothing(score_model, **options): return None
def small(score_model, **options):
    return agdm(score_model, 0.1, 2, auxiliary=nn.Sequential(nn.Flatten(), nn.Linear(49, 3)).eval())
"""


def asked(tmp_path, purifier, **options):
    (tmp_path / "parts.py").write_text(PARTS)
    few = {"n_examples": 3, "attacks": "pgd-eot", "attack_steps": 1, "eot": 1, "judge_draws": 2, "steps": 2}
    return prepare(Evaluation(purifier=purifier, noise_level="constant", **few, **options))


AUXILIARY = {
    "pair": "The auxiliary network must return a tensor to be compared, it returned tuple",
    "nan": "The auxiliary network gives NaN or infinity for sample 0 in reverse step 1",
    "mixing": "agdm answers an image differently when others share its batch",
    "numpy": "The auxiliary network leaves autograd (numpy or ONNX inside), and guidance is a gradient of it",
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_auxiliary_networks_are_asked(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(AUXILIARY[name])):
        asked(tmp_path, "agdm", settings={"agdm.auxiliary": f"{tmp_path}/parts.py:{name}"})


@pytest.mark.filterwarnings("ignore:The guidance")
def test_good_ones_pass_and_one_without_gradient_is_remarked_on(tmp_path, recwarn):
    defences = [
        asked(tmp_path, "agdm", settings={"agdm.auxiliary": f"{tmp_path}/parts.py:{name}"}).defences[1]
        for name in ("good", "dressed")
    ]
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(d.model(images, sample_ids=[0, 1]) for d in defences))
    with pytest.warns(UserWarning, match="The guidance has no gradient"):
        asked(tmp_path, "agdm", settings={"agdm.auxiliary": f"{tmp_path}/parts.py:cut"})


PURIFIERS = {
    "mixes": "parts.py:mixes answers an image differently when others share its batch",
    "cuts": "The score network of parts.py:cuts leaves autograd",
    "infinite": "The score network gives NaN or infinity for sample 0 in reverse step 2 (t = 0.05), first in Score",
    "nothing": "parts.py:nothing returned NoneType; it must return a purify.Purifier",
    "small": "The auxiliary network cannot take images of shape (1, 8, 8)",
}


@pytest.mark.parametrize("name", PURIFIERS)
def test_purifiers_from_a_file_are_asked(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(PURIFIERS[name])):
        asked(tmp_path, f"{tmp_path}/parts.py:{name}")


def test_a_purifier_that_brings_its_own_network_is_recorded_with_that(tmp_path):
    config = asked(tmp_path, f"{tmp_path}/parts.py:own").config["defences"]["parts.py:own"]
    assert config["score_model"] != zoo.score_model("digits").fingerprint()
