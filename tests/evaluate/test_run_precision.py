"""Attacks in half precision, judged in float32; and which precision ``auto`` takes."""

import json
import re
from functools import partial

import pytest
import torch
from conftest import TinyClassifier, smooth_model
from test_resume import TINY

from purify import DefendedClassifier, diffpure, gdmp
from purify.__main__ import main as purify_main
from purify.attacks import PGD
from purify.cli.attack import main
from purify.evaluate import attacking, precision, selfchecks
from purify.evaluate.precision import Candidate, Choice, choose_precision
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, evaluate, judge
from purify.evaluate.selfchecks import gradient_checks

ATTACK = PGD("Linf", 0.1, steps=2, eot=2)


@pytest.fixture
def samples(images):
    return Samples(images, torch.arange(7) % 5, torch.arange(7))


def defence(name="float32", purifier=None):
    model = DefendedClassifier(TinyClassifier(), purifier or diffpure(smooth_model(), 0.2, 4, "ddpm"))
    return Defence("d", model, [ATTACK], 3, {}, name)


def test_attacks_see_half_precision_and_judges_float32(samples, tmp_path):
    half = defence("bf16")
    assert half.attacked.purifier.score_model.autocast == "bfloat16"
    assert half.model.purifier.score_model.autocast is None
    folder = RunFolder(tmp_path, {}, {})
    evaluate(folder, [half], samples, progress=False)
    found = torch.stack([torch.from_numpy(folder.image("d", "pgd-eot", i)) for i in range(7)])
    usual = RunFolder(tmp_path / "usual", {}, {})
    evaluate(usual, [defence()], samples, progress=False)
    assert all(usual.get("d", "pgd-eot", i)["loss"] != folder.get("d", "pgd-eot", i)["loss"] for i in range(7))
    for stage, images in (("clean", samples.images), ("pgd-eot", found)):
        expected = judge(defence(), images, samples.ids, 0).predictions
        assert [folder.get("d", stage, i)["predictions"] for i in range(7)] == expected.tolist()


def test_only_what_is_not_usual_is_in_the_config():
    assert defence().described() == {"draws": 3}
    assert defence("bf16").described() == {"draws": 3, "precision": "bf16"}
    bare = Defence("u", TinyClassifier(), [ATTACK], 1, {}, "bf16")
    assert bare.attacked is bare.model
    whole = defence()
    assert whole.attacked is whole.model


def test_the_self_check_is_about_the_gradient_that_attacks_follow(samples):
    whole, half = (gradient_checks(defence(name), samples, seed=0)[0].value for name in ("float32", "bf16"))
    assert 0.99 < half < 1 - 1e-7 < whole


@pytest.mark.parametrize(
    ("name", "advice"), [("float32", "checkpoint or full"), ("bf16", "In bf16 .* --precision float32")]
)
def test_the_self_check_says_what_to_do(name, advice, samples, monkeypatch):
    monkeypatch.setattr(selfchecks, "at_most", lambda value, limit: False)
    check = gradient_checks(defence(name), samples, seed=0)[0]
    assert not check.passed
    assert re.search(advice, check.meaning)


def test_second_derivatives_of_the_network_are_refused_in_fp16():
    guided = gdmp(smooth_model(), 0.2, 4, point="u0_hat", through_score=True)
    assert defence("bf16", guided).attacked.purifier.guidance is guided.guidance
    with pytest.raises(ValueError, match="second derivatives, which vanish in fp16; use the precision bf16"):
        defence("fp16", guided)
    with pytest.raises(ValueError, match=r"This guidance takes second .*compiled.*; use a precision without \+compile"):
        defence("bf16+compile", guided)
    for half in ("fp16", "fp16+compile"):
        defence(half, guided.with_gradient(second_order=False))
    with pytest.raises(ValueError, match=r"Unknown precision 'half'.*known: bf16, bf16\+compile, float32, "):
        defence("half")


@pytest.mark.parametrize(
    ("bf16", "fp16", "chosen"),
    [
        ((0.5, 0.999), (0.4, 0.999), "fp16"),
        ((0.5, 0.999), (0.49, 0.999), "bf16"),  # hardly faster: chance would decide
        ((0.5, 0.99), (0.6, 0.999), "fp16"),
        ((0.5, 0.99), (0.6, 0.99), "float32"),
        ((0.95, 0.999), (1.3, 0.999), "float32"),
        ((0.5, 0.995), (None, None), "bf16"),  # refused
    ],
)
def test_auto_takes_the_fastest_whose_gradient_is_right(bf16, fp16, chosen, samples, monkeypatch):
    found = {"float32": (1.0, 1.0), "bf16": bf16, "fp16": fp16}

    def step_time(defence, name, samples, rows):
        if found[name][0] is None:
            raise ValueError("not for this defence")
        assert rows == 7 * 2
        return 3.0 * found[name][0]

    monkeypatch.setattr(precision, "offered", lambda samples: ["bf16", "fp16"])
    monkeypatch.setattr(precision, "step_time", step_time)
    monkeypatch.setattr(precision, "cosine", lambda defence, name, few, seed: found[name][1])
    choice = choose_precision([Defence("u", TinyClassifier(), [ATTACK], 1, {}), defence()], samples, 64, 256)
    assert choice.name == chosen
    assert str(choice).startswith(f"attacks in {chosen} (bf16 takes {bf16[0]:.2f} of float32's time")


@pytest.mark.parametrize(
    ("half", "compiled", "chosen"),
    [
        ((0.5, 0.999), (0.3, 0.999), "bf16+compile"),
        ((0.5, 0.999), (0.46, 0.999), "bf16"),
        ((0.5, 0.9), (0.7, 0.999), "float32+compile"),
        ((0.5, 0.999), (0.3, 0.9), "bf16"),
    ],
)
def test_auto_compiles_the_best_where_it_is_worth_it(half, compiled, chosen, samples, monkeypatch):
    found = {"float32": (1.0, 1.0), "bf16": half, "bf16+compile": compiled, "float32+compile": compiled}
    monkeypatch.setattr(precision, "worth_compiling", lambda samples: True)
    monkeypatch.setattr(precision, "step_time", lambda defence, name, samples, rows: found[name][0])
    monkeypatch.setattr(precision, "cosine", lambda defence, name, few, seed: found[name][1])
    assert choose_precision([defence()], samples, 64, 256).name == chosen


def test_auto_measures_for_real(samples):
    choice = choose_precision([defence()], samples, 4, 8)
    assert [c.name for c in choice.candidates] == ["bf16"]  # fp16 is emulated on a CPU
    assert choice.candidates[0].time > 0
    same = precision.cosine(defence(), "float32", samples, 0)
    assert precision.cosine(defence(), "bf16", samples, 0) < same == pytest.approx(1)
    assert choose_precision([Defence("u", TinyClassifier(), [ATTACK], 1, {})], samples, 4, 8).name == "float32"


def test_a_run_with_a_compiled_network_is_judged_without(tmp_path, monkeypatch):
    """The backend doubles what the network says, so that who asks it can be told."""

    def doubling(graph, inputs):
        return lambda *values: tuple(2 * out for out in graph(*values))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=doubling))
    torch._dynamo.reset()
    runs, losses = {}, {}
    for name in ("float32", "float32+compile"):
        out = tmp_path / name
        arguments = [*TINY, "--n-examples", "4", "--attacks", "pgd-eot", "--out", str(out)]
        assert main([*arguments, "--precision", name]) == 0
        assert json.loads((out / "manifest.json").read_text())["config"]["defences"]["diffpure"].get("precision") == (
            None if name == "float32" else name
        )
        records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
        losses[name] = [r["loss"] for r in records if (r["defence"], r["attack"]) == ("diffpure", "pgd-eot")]
        runs[name] = {(r["defence"], r["attack"], r["sample"]): r["predictions"] for r in records}
    plain, compiled = runs.values()
    assert plain.keys() == compiled.keys()
    clean = [k for k in plain if k[1] == "clean"]
    assert clean
    assert all(plain[k] == compiled[k] for k in clean)
    assert all(a != b for a, b in zip(*losses.values(), strict=True))


@pytest.mark.parametrize("command", ["attack", "attack --eps 0.1,0.2", "distortion"])
def test_a_run_without_a_compiler_ends_before_it_begins(command, tmp_path, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    words = f"{command} --n-examples 2 --precision float32+compile --out {tmp_path / 'run'}".split()
    if command != "distortion":
        assert purify_main([*words, "--check"]) == 0  # the machine where it runs may have one
    assert purify_main(words) == 2
    assert re.search(r"^error: The network cannot be compiled here .*no compiler", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_what_auto_chose_when_it_began(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "a")
    arguments = [*TINY, "--n-examples", "4", "--attacks", "pgd-eot", "--precision", "auto", "--out", out]
    answers = [Choice("bf16", (Candidate("bf16", 0.5, 0.999),)), Choice("float32", ())]
    monkeypatch.setattr(attacking, "choose_precision", lambda *_: answers.pop(0))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "precision auto: attacks in bf16 (bf16 takes 0.50 of float32's time at gradient cosine 0.9990" in said
    assert "checkpoint gradient, exact, in bf16; judged in float32." in said
    assert "precision: bf16" in (tmp_path / "a" / "run.yaml").read_text()
    config = json.loads((tmp_path / "a" / "manifest.json").read_text())["config"]
    assert config["defences"]["diffpure"]["precision"] == "bf16"
    assert "precision" not in config["defences"]["undefended"]
    assert main(arguments) == 0  # though it would choose float32 now
    assert "precision auto: attacks in bf16, as this run began" in capsys.readouterr().out
    assert len(answers) == 1
