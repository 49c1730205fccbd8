"""Accuracy against eps: the runs at each eps by themselves, resumed, sharded, and curves that are not monotone."""

import json
import shutil
from importlib import import_module

import pytest
from kills import lines

from purify.attacks import PGD
from purify.cli.attack import main
from purify.cli.merge import main as merge_command
from purify.evaluate.description import Evaluation
from purify.evaluate.records import curve_folders

TINY = {
    "n_examples": 8, "attack_steps": 1, "eot": 1, "judge_draws": 2, "batch_size": 2, "steps": 2, "threads": 1,
    "noise_level": "constant", "attacks": "random-noise,pgd-eot",
}  # fmt: skip
WORDS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
EPS = (0.3, 0, 0.1)


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Self-checks are not what is tested here, and take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("purify.evaluate.finish"), "self_checks", lambda *args: [])
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A curve: its folder, and what it came to."""
    path = tmp_path_factory.mktemp("drawn") / "curve"
    return path, Evaluation(**TINY, eps=EPS, out=path).curve(progress=False)


def test_every_eps_is_the_run_at_that_eps(drawn, tmp_path):
    path, found = drawn
    assert [p.name for p in curve_folders(path)] == ["eps-0.1", "eps-0.3"]
    for eps in (0.1, 0.3):
        alone = Evaluation(**TINY, eps=eps, out=tmp_path / f"{eps}").run(progress=False)
        assert lines(path / f"eps-{eps}") == lines(tmp_path / f"{eps}")
        assert found.runs[eps].results == alone.results
        for name, points in found.points.items():
            assert [p.eps for p in points] == [0, 0.1, 0.3]
            point = next(p for p in points if p.eps == eps)
            assert point.accuracy == alone.results[name]["worst case"]["mean"]
            assert points[0].accuracy == alone.results[name]["clean"]["mean"]
    assert set(found.points) == {"undefended", "diffpure", "adversarial training"}
    stored = json.loads((path / "result.json").read_text())
    assert stored["curve"]["diffpure"][2]["accuracy"]["value"] == found.points["diffpure"][2].accuracy.value
    assert stored["runs"] == {"0.1": "eps-0.1", "0.3": "eps-0.3"}
    assert found.picture.stat().st_size > 1000


def test_a_curve_resumes_takes_more_points_and_repeats_from_its_yaml(drawn, tmp_path, capsys):
    path, found = drawn
    again = tmp_path / "curve"
    shutil.copytree(path, again)
    records = again / "eps-0.3" / "records.jsonl"
    whole = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(whole[:9]) + whole[9][:20])  # as a kill leaves it
    (again / "result.json").unlink()
    command = ["--config", str(path / "run.yaml"), "--out", str(again)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert lines(again / "eps-0.3") == lines(path / "eps-0.3")
    assert json.loads((again / "result.json").read_text()) == json.loads((path / "result.json").read_text())
    assert "eps 0: clean images" in said
    assert str(found.points["diffpure"][1].accuracy).strip() in said
    assert "This is a REDUCED budget" in said
    assert all((again / eps / "samples-diffpure.png").stat().st_size > 1000 for eps in ("eps-0.1", "eps-0.3"))
    assert main([*command, "--eps", "0.1,0.2,0.3"]) == 0
    curve = json.loads((again / "result.json").read_text())["curve"]["undefended"]
    assert [p["eps"] for p in curve] == [0, 0.1, 0.2, 0.3]
    assert curve[3]["accuracy"]["value"] == found.points["undefended"][2].accuracy.value


def test_shards_of_a_curve_are_merged(drawn, tmp_path, capsys):
    path, out = drawn[0], tmp_path / "curve"
    command = [*WORDS, "--eps", ",".join(map(str, EPS)), "--out", str(out)]
    for shard in ("1/2", "2/2"):
        assert main([*command, "--shard", shard]) == 0
        assert f"Shard {shard} is finished at every eps" in capsys.readouterr().out
    assert merge_command([str(out)]) == 0
    said = capsys.readouterr().out
    assert "It lacks" not in said
    assert said.splitlines()[-1] == f"The curve of eps 0.1, 0.3: purify attack --config {out / 'run.yaml'}"
    for _ in range(2):  # there is no folder yet, and there is one
        assert main(["--config", str(out / "run.yaml"), "--check"]) == 0
        assert main(["--config", str(out / "run.yaml")]) == 0
    for eps in ("eps-0.1", "eps-0.3"):
        assert lines(out / eps) == lines(path / eps)
    assert json.loads((out / "result.json").read_text())["curve"] == json.loads(
        (path / "result.json").read_text()
    )["curve"]  # fmt: skip
    assert (out / "curve.png").is_file()


def test_one_radius_of_a_curve_ends_as_a_curve(tmp_path, capsys):
    """A shard is merged before it has begun the second radius."""
    out = tmp_path / "curve"
    assert main([*WORDS, "--eps", "0,0.1", "--shard", "1/1", "--out", str(out)]) == 0
    assert merge_command([str(out)]) == 0
    asked = Evaluation.from_yaml(out / "run.yaml")
    assert (asked.eps, asked.out, asked.shard) == ((0, 0.1), out, None)


WEAK = """
from dataclasses import dataclass
from purify.attacks import PGD, AttackResult

@dataclass(frozen=True)
class Weak(PGD):
    name = "weak"

    def run(self, model, x, y, ids, seed):
        found = super().run(model, x, y, ids, seed)
        return found if self.eps < 0.2 else AttackResult(x, found.loss)
"""


def test_an_attack_that_is_weaker_at_larger_eps_gets_a_warning(tmp_path, capsys):
    (tmp_path / "own.py").write_text(WEAK)
    own = [*WORDS, "--attacks", f"{tmp_path / 'own.py'}:Weak", "--attack-steps", "5", "--worst-only", "majority"]
    assert main([*own, "--eps", "0.15,0.3", "--out", str(tmp_path / "curve")]) == 0
    said = capsys.readouterr().out
    assert "WARNING: undefended: eps 0.3 leaves more than eps 0.15 does" in said
    assert "the attack is weak; raise --attack-steps" in said
    assert "right by majority" in said
    stored = json.loads((tmp_path / "curve" / "result.json").read_text())
    rise = next(r for r in stored["rises"] if r["defence"] == "undefended")
    clean, small, large = (p["accuracy"]["value"] for p in stored["curve"]["undefended"])
    assert small < large == clean
    assert rise["points"]["value"] == pytest.approx(large - small)
    assert stored["criterion"] == "majority"


def test_protocols_and_recipes_of_a_curve(tmp_path, capsys):
    """Protocols stand below the run at each eps; a recipe's other options hold."""
    out = tmp_path / "curve"
    assert main([*WORDS, "--protocol", "deterministic", "--eps", "0.1,0.3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("one known noise per image") == 2
    assert "protocols" in json.loads((out / "eps-0.1" / "result.json").read_text())
    asked = Evaluation.from_recipe("lee-kim-cifar10-linf", eps="2/255,4/255,8/255")
    assert asked.several
    assert asked.radii == (2 / 255, 4 / 255, 8 / 255)
    assert asked.attacks == ("pgd-eot-lee-kim",)


def test_a_dry_run_counts_every_eps_and_writes_nothing(tmp_path, capsys):
    assert main([*WORDS, "--eps", "0.1,0.2,0.3", "--dry-run", "--out", str(tmp_path / "curve")]) == 0
    assert "That is for one eps; all 3 take about" in capsys.readouterr().out
    assert not (tmp_path / "curve").exists()


def test_several_eps_are_no_run_and_a_run_is_no_curve(drawn, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"call its .curve\(\)"):
        Evaluation(**TINY, eps=EPS).run(progress=False)
    with pytest.raises(ValueError, match="A shard has no results"):
        Evaluation(**TINY, eps=EPS, shard="1/2").curve(progress=False)
    with pytest.raises(ValueError, match="holds a run at one eps"):
        Evaluation(**TINY, eps=EPS, out=drawn[0] / "eps-0.1").curve(progress=False)
    with pytest.raises(ValueError, match="holds another run, which differs in"):
        Evaluation(**{**TINY, "seed": 4}, eps=EPS, out=drawn[0]).curve(progress=False)
    assert PGD("Linf", 0.1).eps == Evaluation(eps="0.1").eps == Evaluation(eps=[0.1]).radii[0]
