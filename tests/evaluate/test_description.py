"""One description, three ways to give it: Python, YAML and the command line; and parts of one's own in it."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from conftest import smooth_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import lines
from test_resume import TINY

import purify
from purify.cli.attack import main, parser
from purify.cli.certify import parser as certify_parser
from purify.cli.parsing import described
from purify.evaluate.description import Certification, Evaluation
from purify.options import flags, options, plain
from purify.purification.levels import find_level

WORDS = st.text("abcdefghij-_./", min_size=1, max_size=12)
POSITIVE = st.integers(1, 10**6)
EVALUATIONS = st.builds(
    Evaluation,
    dataset=WORDS,
    model=st.none() | WORDS,
    purifier=st.lists(WORDS, min_size=1, max_size=3),
    settings=st.dictionaries(WORDS.filter(str.strip), st.integers() | st.booleans() | WORDS, max_size=3),
    t_star=st.none() | st.floats(0.01, 1),
    eps=st.none() | st.floats(0, 8) | st.lists(st.floats(0, 8), min_size=2, max_size=3),
    steps=st.none() | POSITIVE,
    norm_weights=st.lists(st.floats(0, 5), min_size=1, max_size=3),
    memory_budget=st.none() | POSITIVE,
    seed=st.integers(0, 2**31),
    out=st.none() | WORDS,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(EVALUATIONS)
def test_yaml_gives_the_same_description_back(tmp_path_factory, evaluation):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(evaluation.to_yaml())
    assert Evaluation.from_yaml(file) == evaluation
    assert described(Evaluation, parser().parse_args(["--config", str(file)])) == evaluation


@settings(max_examples=50, deadline=None, derandomize=True)
@given(EVALUATIONS)
def test_the_command_line_gives_the_same_description(evaluation):
    words = []
    for field in options(Evaluation):
        value = plain(evaluation).get(field.name)
        if field.name == "settings":
            words += [f"--set={k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in value.items()]
        elif value is not None:
            words.append(f"{flags(field)[0]}={','.join(map(str, value)) if isinstance(value, list) else value}")
    assert described(Evaluation, parser().parse_args(words)) == evaluation


@pytest.mark.parametrize(("cls", "of"), [(Evaluation, parser), (Certification, certify_parser)])
def test_every_field_is_an_option_with_an_explanation(cls, of):
    text = of().format_help()
    assert len(options(cls)) == len(dataclasses.fields(cls))
    for field in options(cls):
        assert flags(field)[0] in text
        assert len(field.metadata["help"]) > 3
    assert described(cls, of().parse_args([])) == cls()


def test_a_run_can_be_repeated_from_its_folder(tmp_path, capsys):
    few = [*TINY, "--n-examples", "3", "--attacks", "random-noise", "--noise-level", "constant"]
    assert main([*few, "--out", str(tmp_path / "one")]) == 0
    again = ["--config", str(tmp_path / "one" / "run.yaml"), "--out", str(tmp_path / "two")]
    assert main(again) == 0
    first, second = (json.loads((tmp_path / n / "manifest.json").read_text())["config"] for n in ("one", "two"))
    assert first == second
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    result = Evaluation.from_yaml(tmp_path / "one" / "run.yaml").replace(out=tmp_path / "three").run(progress=False)
    assert lines(tmp_path / "three") == lines(tmp_path / "one")
    assert (
        json.loads(result.file.read_text())["results"]
        == json.loads((tmp_path / "two/result.json").read_text())["results"]
    )
    assert result.verdict in capsys.readouterr().out


def test_what_is_on_the_command_line_goes_before_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("n_examples: 7\neps: 8/255\nsettings: {tau: 2}\npurifier: [gns, agdm]\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--eps", "0.5", "--set", "ssni-n.tau=3"]
    asked = described(Evaluation, parser().parse_args(words))
    assert (asked.n_examples, asked.eps, asked.purifier) == (7, 0.5, ("gns", "agdm"))
    assert asked.settings == {"tau": 2, "ssni-n.tau": 3}
    assert Evaluation.from_yaml(tmp_path / "run.yaml").eps == 8 / 255


def test_old_names_of_options_say_what_they_are_now(capsys):
    old = ["--preset", "paper", "--ssni-tau", "2", "--tau-unit", "norm", "--ssni-t-max", "0.4"]
    asked = described(Evaluation, parser().parse_args(old))
    assert (asked.budget, asked.settings) == ("paper", {"tau": 2, "tau_unit": "norm", "t_max": 0.4})
    said = capsys.readouterr().err
    assert "--preset is now called --budget" in said
    assert "--ssni-t-max 0.4 is now called --set t_max=0.4" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_exmples: 7", "unknown option 'n_exmples'"),
        ("- 7", "must hold NAME: VALUE lines"),
        ("eps: [", "cannot be read as YAML"),
        ("eps: big", "--eps takes a number, as 0.03 or 8/255, or several separated by commas, got 'big'"),
        ("n_examples: 1.5", "--n-examples takes a whole number, got 1.5"),
        ("steps: true", "--steps takes a whole number, got True"),
        ("purifier: []", "--purifier takes names separated by commas"),
        ("budget: hug", "Unknown --budget 'hug'"),
    ],
)
def test_a_wrong_file_gets_one_sentence(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        Evaluation.from_yaml(file)
    assert main(["--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if "YAML" not in message and "lines" not in message:  # the command's own words for these
        assert message.lower() in said.lower()


OWN = """
from dataclasses import dataclass
import torch
from purify.attacks import Attack, AttackResult
from purify.purification.levels import NoiseLevel

@dataclass(frozen=True)
class Bright(NoiseLevel):
    t_star: float = 0.2
    share: float = 0.5
    calls = 0
    centre = 0.3
    scale = 0.1

    def statistic(self, model, u, noise, total):
        return (u.flatten(1).mean(1).double() + 1) / 2

    def level(self, statistic):
        return self.t_star * (self.share + (1 - self.share) * statistic)

@dataclass(frozen=True)
class Invert(Attack):
    share: float = 1.0
    name = "invert"

    def run(self, model, x, y, ids, seed):
        return AttackResult(x + (self.eps * (0.5 - x).sign()), torch.zeros(len(x)))

class Plain:
    pass
"""


def test_a_noise_level_and_an_attack_from_a_file(tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    run = [*TINY, "--n-examples", "3", "--noise-level", f"{file}:Bright", "--set", f"{file}:Bright.share=0.25"]
    assert main([*run, "--attacks", f"{file}:Invert,pgd-eot", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    name = "diffpure own.py:Bright"
    level = config["defences"][name]["purifier"]["level"]
    assert (level["kind"], level["share"]) == ("own.py:Bright", 0.25)
    assert [a["attack"] for a in config["attacks"][name]] == ["invert", "pgd-eot"]
    assert "invert" in capsys.readouterr().out
    defended = purify.wrap("digits-standard", "digits", t_star=find_level(f"{file}:Bright")(0.2, 0.25), steps=2)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(
        defended.purifier.purify(x, seed=0).t_star, 0.2 * (0.25 + 0.75 * x.mean((1, 2, 3))).double()
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--attacks", "is no attack; it must be a dataclass"),
        ("--noise-level", "is no noise level; it must be a dataclass"),
    ],
)
def test_a_class_that_is_no_part_is_refused(option, message, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    assert main([option, f"{tmp_path}/own.py:Plain", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_an_unregistered_part_still_has_no_config():
    @dataclasses.dataclass(frozen=True)
    class Half(find_level("constant")):
        pass

    purifier = purify.diffpure(smooth_model(), Half(0.5), 2)
    with pytest.raises(ValueError, match="Half is not registered"):
        purifier.config()


def test_run_yaml_is_plain_yaml():
    found = yaml.safe_load(Evaluation(calibration="a/b.json", memory_budget="1G").to_yaml())
    assert found["calibration"] == "a/b.json"
    assert found["memory_budget"] == 2**30


def test_the_quick_budget_as_it_is_has_fewer_attacks():
    """Whatever is said of steps, draws or restarts, or another budget or threat model, has those of before."""
    quick = Evaluation().attack_names
    assert quick == ("random-noise", "transfer", "adaptive")
    full = Evaluation(budget="standard").attack_names
    assert {"autoattack-rand", "pgd-eot", *quick} < set(full)
    for more in (
        {"attack_steps": 5},
        {"eot": 2},
        {"restarts": 2},
        {"budget": "paper"},
        {"threat_model": "L2", "eot": 2},
    ):
        assert Evaluation(**more).attack_names == full
    assert Evaluation(threat_model="L2").attack_names == quick
    assert Evaluation().replace(budget="standard").attack_names == full
    assert "attacks" not in Evaluation().to_yaml()
    assert Evaluation(attacks="pgd-eot").replace(budget="standard").attack_names == ("pgd-eot",)
