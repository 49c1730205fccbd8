"""Work in parts that fit into memory: what does not is halved, and results stay the same."""

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from torch import nn

from purify import DefendedClassifier, FixedSteps, Purifier, diffpure
from purify.attacks import PGD
from purify.attacks.adaptive import Adaptive
from purify.certify import Draws, Smooth
from purify.evaluate.runner import Defence, judge
from purify.memory import Parts, free_bytes
from purify.purification import gradients
from purify.purification.cost import graph_bytes, held_bytes
from purify.purification.gradients import AUTO_LEFT, Checkpoint, Full

CPU_WORDS = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Small(nn.Module):
    """A classifier on a device that has room for so many images; ``seen``: batches that it was asked, -1 for none."""

    def __init__(self, room: int, words: str = "") -> None:
        super().__init__()
        self.network, self.room, self.words, self.seen = TinyClassifier(), room, words, []
        self.eval()

    def forward(self, x):
        if len(x) > self.room:
            self.seen.append(-1)
            raise RuntimeError(self.words) if self.words else torch.OutOfMemoryError("CUDA out of memory.")
        self.seen.append(len(x))
        return self.network(x)


def defended(room, words=""):
    return DefendedClassifier(Small(room, words), diffpure(smooth_model(), 0.2, 3, "ddpm"))


@pytest.mark.parametrize("words", ["", CPU_WORDS])
@pytest.mark.parametrize("attack", [PGD("Linf", 0.1, steps=2, eot=3), Adaptive("Linf", 0.1, calls=150)])
@pytest.mark.filterwarnings("ignore:.*images at once do not fit")
def test_attacks_and_judges_go_on_with_half_the_rows(attack, words, images):
    labels = torch.arange(7) % 5
    expected = attack(defended(10**6), images, labels)
    small = defended(4, words)
    found = attack(small, images, labels)
    assert -1 in small.classifier.seen
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    answers = [judge(Defence("d", m, [], 5, {}), images, torch.arange(7), 0) for m in (small, defended(10**6))]
    assert torch.equal(answers[0].predictions, answers[1].predictions)


@pytest.mark.filterwarnings("ignore:.*images at once do not fit")
def test_certificates_count_the_same(images):
    few = Draws(4, 40, alpha=0.3)
    found, expected = (Smooth(Small(room), 0.5).certify(images, few) for room in (9, 10**6))
    assert torch.equal(found.counts, expected.counts)


def test_what_was_learned_holds_for_all_that_follows():
    parts, asked = Parts(16), []

    def work(rows):
        asked.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("full")
        return rows.sum()

    with pytest.warns(UserWarning, match="images at once do not fit into memory; going on with") as said:
        found = list(parts.of(torch.arange(20), work))
    assert [str(w.message)[:2].strip() for w in said] == ["16", "8"]
    assert asked == [16, 8, 4, 4, 4, 4, 4]
    assert torch.equal(torch.cat([part for part, _ in found]), torch.arange(20))
    asked.clear()
    list(parts.of(torch.arange(9), work))
    assert asked == [4, 4, 1]


def test_other_errors_and_single_rows_are_raised():
    def fails(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def full(rows):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(RuntimeError, match="shapes"):
        list(Parts(4).of(torch.arange(8), fails))
    with pytest.warns(UserWarning, match="2 images at once"), pytest.raises(torch.OutOfMemoryError):
        list(Parts(2).of(torch.arange(8), full))


def gradient(engine, images):
    purifier = Purifier(smooth_model(), 0.2, "ddpm", FixedSteps(8), gradient=engine, clip=False)
    x = images.clone().requires_grad_()
    calls = []
    hook = purifier.score_model.network.register_forward_hook(lambda *_: calls.append(1))
    (g,) = torch.autograd.grad(purifier(x, sample_ids=range(7)).square().sum(), x)
    hook.remove()
    return g, len(calls), purifier


@pytest.mark.parametrize("kind", [Full, Checkpoint])
@pytest.mark.parametrize(("steps", "calls"), [(100, 8), (AUTO_LEFT + 5.5, 11), (AUTO_LEFT + 0.5, 17), (0, 17)])
def test_an_automatic_budget_fills_what_is_free(kind, steps, calls, images, monkeypatch):
    expected, _, purifier = gradient(Full(), images)
    step = graph_bytes(purifier, images)
    monkeypatch.setattr(gradients, "free_bytes", lambda device: round(2 * steps * step))  # half of it on a CPU
    found, took, purifier = gradient(kind(memory_budget="auto"), images)
    assert torch.equal(found, expected)
    assert took <= calls
    held = held_bytes(purifier, images[:1], 7)
    kept = min(8, int(max(steps - AUTO_LEFT, 0)))
    states = (8 - kept) * images.nbytes  # before the steps that are recomputed
    graphs = max(kept, min(kept, 1) + (kept < 8))  # the first is kept while those in the middle are built again
    assert held == pytest.approx(graphs * step + states, rel=0.02)


def test_free_memory_is_some():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
