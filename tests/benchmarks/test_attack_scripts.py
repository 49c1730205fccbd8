"""Scripts that attack: speed, budgets, other libraries and released attacks, the leaderboard's runs, protocols."""

import json
from pathlib import Path

import pytest
import torch
from conftest import load_script

from purify.attacks.adaptive import phases
from purify.leaderboard.links import portable


def test_attack_speed(tmp_path, monkeypatch):
    """Both ask for the same gradients, however they are batched; ours also looks at one image and the last iterate."""
    script = load_script("attack_speed")
    seen = []
    forward = script.DefendedClassifier.forward

    def counted(self, x, **keys):
        seen.append((len(x), x.requires_grad, any(p.requires_grad for p in self.parameters())))
        return forward(self, x, **keys)

    monkeypatch.setattr(script.DefendedClassifier, "forward", counted)
    out = tmp_path / "t.json"
    arguments = ["--batches", "1,3", "--steps", "2", "--eot", "4", "--repeats", "1", "--reverse-steps", "2"]
    assert script.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    peers = (script.PEER, script.PEER_WEIGHTS)
    assert [(r["batch"], r["peer"]) for r in rows] == [(n, p) for n in (1, 3) for p in peers]
    x, y = (t[:3] for t in script.load_dataset("digits", "test"))
    works = script.build_works(script.parser().parse_args(arguments), x, y)
    calls = {}
    for name, work in works.items():
        seen.clear()
        work()
        calls[name] = list(seen)
    assert calls[script.OURS] == [(1, False, False), *[(12, True, False)] * 2, (12, False, False)]
    assert calls[script.PEER] == [(3, True, False)] * 8
    assert calls[script.PEER_WEIGHTS] == [(3, True, True)] * 8
    assert script.main(["--batches", "0"]) == 2


def test_attack_budgets_are_measured_once_and_resumed(tmp_path, capsys):
    script = load_script("attack_budget")
    options = ["--systems", "diffpure", "--images", "2", "--steps", "2", "--eot", "1", "--judge-draws", "10"]
    command = [*options, "--rows", "adaptive 1/2,pgd-eot 2", "--out", str(tmp_path)]
    assert script.main([*command, "--minutes", "0"]) == 0
    assert "goes on from here" in capsys.readouterr().out
    script.main(command)
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "attack_budget.json").read_text())["rows"]
    names = {row["attack"]: row for row in found}
    assert set(names) == {"adaptive 1/2", "pgd-eot 2 x 1"}  # the first is a whole name, and none of 1/25
    assert names["pgd-eot 2 x 1"]["calls"] == 2 * 33 + 11
    assert names["pgd-eot 2 x 1"]["minus pgd-eot"] is None
    assert (tmp_path / "attack_budget.png").exists()
    script.main(command)
    again = capsys.readouterr().out
    assert "s\n" in first.partition("###")[0]
    assert again.startswith("###")
    file = next(tmp_path.glob("rows/*/*"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"git": "0123456789abcdef"}))
    script.main(command)
    assert capsys.readouterr().out.startswith("The rows come from several versions of the code (0123456789abcdef, ")


def test_choices_of_the_adaptive_attack_can_be_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phases, "ROUNDS", phases.ROUNDS)  # set back afterwards
    script = load_script("attack_budget")
    options = ["--systems", "gns", "--images", "1", "--steps", "2", "--judge-draws", "1", "--calls", "800"]
    command = [*options, "--alone", "--rows", "800 calls", "--out", str(tmp_path), "--constants"]
    script.main([*command, "ROUNDS=8"])
    assert phases.ROUNDS == 8
    assert "adaptive 800 calls ROUNDS=8" in capsys.readouterr().out
    for wrong, message in {
        "--constants rounds=1": "rounds=1 sets none of ROUNDS, SHORT",
        "--constants ROUNDS=0": "ROUNDS must be a whole number above 0, got 0",
        "--constants HELD=nan": "HELD must be a number above 0, got nan",
        "--constants LONG=": "LONG must be a whole number above 0, got nothing",
        "--systems bogus": "Unknown system 'bogus'",
        "--threat-model L7": "Unknown threat model 'L7'",
        "--images 0": "--images must be a whole number of at least 1",
        "--calls 10,x": "--calls must be a whole number of at least 1, got 'x'",
        "--seed -1": "--seed must be a whole number of at least 0",
        "--minutes nan": "--minutes must be a number of at least 0",
        "--out /proc/nothing": "choose another --out",
        "--rows nosuch": "--rows nosuch names none of the rows: adaptive 1/25,",
    }.items():
        assert script.main([*options, "--out", str(tmp_path / "none"), *wrong.split()]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "none").iterdir())


def test_library_attacks(tmp_path, capsys):
    """The whole script on a tiny budget; it resumes."""
    script = load_script("library_attacks")
    arguments = ["--samples", "4", "--steps", "1", "--eot", "2", "--queries", "2", "--judge-draws", "3"]
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0
    first = (tmp_path / "result.json").read_text()
    rows = {r["name"]: r for r in json.loads(first)["rows"]}
    peers = ["torchattacks-2-0.075", "torchattacks-2-0.75", "autoattack-rand", "square"]
    if script.INTEROP:
        peers += ["foolbox-2-0.075", "foolbox-1-0.075", "foolbox-1-0.01", "art-1-0.075"]
    assert list(rows) == ["clean", "pgd-eot", "apgd-margin-eot", "adaptive", "our worst case", *peers]
    worst = rows["our worst case"]["accuracy"]["value"]
    for name in peers:
        gap = rows[name]["difference"]
        assert gap["value"] == pytest.approx(worst - rows[name]["accuracy"]["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
        other = rows["adaptive"]["accuracy"]["value"] - rows[name]["accuracy"]["value"]
        assert rows[name]["adaptive"]["value"] == pytest.approx(other)
    assert script.main([*arguments, "--out", str(tmp_path)]) == 0  # everything is on disk
    assert (tmp_path / "result.json").read_text() == first
    assert "at most square" in capsys.readouterr().out
    assert script.main(["--samples", "0"]) == 2


def test_torchattacks_is_run_as_it_is():
    """The images are those of torchattacks.EOTPGD under the same seed of torch's generator, which is left as it was."""
    import torchattacks

    from purify.diffusion.noise import derive_seed

    script = load_script("library_attacks")
    attack = script.TorchattacksPGD("Linf", 0.3, steps=3, eot=2, size=0.1)
    model = script.build_model(0.18)
    images, labels = (t[:5] for t in script.load_dataset("digits", "test"))
    before = torch.get_rng_state()
    found = attack(model, images, labels, sample_ids=torch.arange(10, 15), seed=3).images
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.manual_seed(derive_seed(derive_seed(3, attack.name), *range(10, 15)))
    assert torch.equal(found, torchattacks.EOTPGD(model, 0.3, 0.1, 3, 2)(images, labels))


def test_released_attacks_are_of_other_models_and_judged_behind_the_defence(tmp_path, capsys):
    """Every registered one weakens the model that it attacks, and never the one that judges."""
    script, out = load_script("released_attacks"), tmp_path / "r.json"
    for name, (_, weaken) in script.RELEASED.items():
        defence = script.build_purifier(name, None, "digits")
        assert weaken(defence).config() != defence.config()
    few = ["--images", "2", "--steps", "1", "--eot", "1", "--draws", "1", "--purifiers", "diffap"]
    assert script.main([*few, "--out", str(out)]) == 0
    assert set(json.loads(out.read_text())["diffap"]) == {"clean", "released (no guidance)", "exact"}
    assert "diffap; clean" in capsys.readouterr().out
    assert script.main(["--purifiers", "gdmp"]) == 2
    assert "Unknown purifier 'gdmp'; known: diffap" in capsys.readouterr().err


def test_leaderboard_runs_are_commands_that_can_be_given(tmp_path):
    """Every run's options make an evaluation; each has a folder of its own, and what is kept is not run again."""
    from purify.cli.attack import parser
    from purify.cli.parsing import described
    from purify.evaluate.description import Evaluation

    script = load_script("leaderboard_runs")
    runs = list(script.runs(["digits", "fashion_mnist"], []))
    assert len({run.name for run in runs}) == len(runs) == 2 * len(script.SYSTEMS)
    assert set(script.MORE) <= {(run.dataset, run.purifier, run.level) for run in runs}
    for run in runs:
        asked = described(Evaluation, parser().parse_args(run.command(tmp_path)[4:]))
        assert (asked.dataset, asked.purifier) == (run.dataset, (run.purifier,))
        assert asked.n_examples == script.IMAGES[run.dataset]
        (tmp_path / run.name).mkdir()
    assert script.main(["--keep", str(tmp_path), "--out", str(tmp_path / "none")]) == 0
    assert not list((tmp_path / "none").iterdir())


def test_leaderboard_runs_say_in_a_sentence_what_is_wrong(tmp_path, capsys):
    script = load_script("leaderboard_runs")
    (tmp_path / "file").touch()
    for wrong, message in {
        "--dataset cifar10": "Unknown data set 'cifar10'",
        "--only nosuch": "--only nosuch names no run: digits-diffpure-256-adaptive",
        "--workers 0": "--workers must be a whole number of at least 1",
        "--minutes -1": "--minutes must be a number of at least 0",
        f"--keep {tmp_path / 'file'}": "choose another --keep",
    }.items():
        assert script.main(["--out", str(tmp_path / "none"), *wrong.split()]) == 2
        assert message in capsys.readouterr().err


def test_kept_runs_do_not_name_folders_of_a_machine(tmp_path):
    run, kept = tmp_path / "made" / "digits-a", tmp_path / "kept"
    (run / "adversarial").mkdir(parents=True)
    (run / "run.yaml").write_text(f"seed: 0\nout: {run}\n")
    (run / "manifest.json").write_text(json.dumps({"sessions": [{"command": f"--out {run} --seed 0"}]}))
    load_script("leaderboard_runs").keep(run, kept)
    assert (kept / "run.yaml").read_text() == "seed: 0\nout: digits-a\n"
    assert json.loads((kept / "manifest.json").read_text())["sessions"][0]["command"] == "--out digits-a --seed 0"
    published = Path(__file__).parents[2] / "docs" / "leaderboard" / "runs"
    for file in (*published.glob("*/run.yaml"), *published.glob("*/manifest.json")):
        assert portable(file.read_text()) == file.read_text(), file


def test_protocols_cost(capsys):
    """The run's gradients are those of its attack, and the protocols' of theirs."""
    tiny = ["--n-examples", "2", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2"]
    assert load_script("protocols_cost").main([*tiny, "--attacks", "pgd-eot", "--threads", "1"]) == 0
    run, protocols, total = capsys.readouterr().out.splitlines()[-3:]
    # undefended and adversarially trained 2, purified 2 x 2; known noise 2 runs of 2, answers of eight 1, if not broken
    own, more = float(run.split()[1]), float(protocols.split()[1])
    assert own == 2 + 2 + 4
    assert 0 < more <= 4 + 1
    assert total.startswith(f"with all protocols {1 + more / own:.2f} times the gradients")


def test_gradient_noise_of_known_noise(tmp_path, capsys):
    """Gradients made with a known signal, noise and correlation; then the script on a few real ones."""
    script = load_script("gradient_noise")
    draws, n, d, rho, noise = 4000, 2, 3, 0.8, 2.0
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, draws, n, d, generator=g, dtype=torch.float64)
    signal = torch.ones(d, dtype=torch.float64)
    found = script.measured(signal + noise * a, 5 * (rho * a + (1 - rho**2) ** 0.5 * b), 0.1)
    torch.testing.assert_close(found["correlation"], torch.full((n,), rho, dtype=torch.float64), rtol=0.03, atol=0)
    # The mean of m draws has the noise 4 d / m beside the signal d: a cosine of 0.9 at 4 / m = 1 / 0.81 - 1.
    torch.testing.assert_close(found["draws"], torch.full((n,), 4 * 0.81 / 0.19).double(), rtol=0.15, atol=0)
    expected = (0.6 + (0.64 * 0.1) ** 0.5) ** 2
    torch.testing.assert_close(found["multilevel"], torch.full((n,), expected).double(), rtol=0.05, atol=0)
    tiny = ["--systems", "diffpure", "--images", "2", "--draws", "4", "--attack-calls", "300"]
    assert script.main([*tiny, "--out", str(tmp_path / "g.json")]) == 0
    assert [row["place"] for row in json.loads((tmp_path / "g.json").read_text())["rows"]] == ["clean", "under attack"]
    assert script.main(["--systems", "nosuch"]) == 2
    assert "Unknown purifier 'nosuch'" in capsys.readouterr().err
