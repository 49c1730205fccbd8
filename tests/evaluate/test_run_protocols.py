"""Every protocol of a run against brute force on a toy: two pixels, five classes, a smooth random purifier."""

import json
import shutil
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from twopixels import two_pixels

from purify import DefendedClassifier
from purify.attacks import PGD, Adaptive, RandomNoise
from purify.attacks.base import num_classes
from purify.attacks.losses import margin_loss
from purify.cli.attack import main
from purify.diffusion.noise import derive_seed
from purify.evaluate import Defence, RunFolder, evaluate
from purify.evaluate.description import Evaluation
from purify.evaluate.protocols import Effort, KnownNoise
from purify.evaluate.protocols.averaged import WORDS, majority
from purify.evaluate.protocols.in_loop import InLoop
from purify.evaluate.protocols.measure import measure_protocols
from purify.evaluate.protocols.shown import draw, plain, table
from purify.leaderboard import read_run, write_leaderboard

N, EPS, DRAWS, SEED = 12, 0.04, 3, 5
ATTACK = PGD("Linf", EPS, steps=4, eot=2)
EFFORT = Effort(steps=10, averages=(1, 4), batch_size=4, max_rows=64)
NAMES = ("fresh", "deterministic", "in-loop", "averaged")


def toy():
    """A defence with its attacks, and images of which some are near a boundary."""
    classifier, model, samples = two_pixels(N)
    attacks = [RandomNoise("Linf", EPS), ATTACK]
    return [
        Defence("bare", classifier, [ATTACK.on_deterministic()], 1, {}),
        Defence("d", model, attacks, DRAWS, {}),
    ], samples


def opened(path, **changes):
    return RunFolder(path, {"seed": SEED, **changes}, {})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with all protocols: its folder, and what they came to."""
    path = tmp_path_factory.mktemp("run")
    defences, samples = toy()
    with opened(path) as folder:
        evaluate(folder, defences, samples, SEED, 4, progress=False)
        return path, measure_protocols(folder, defences, samples, NAMES, EFFORT, progress=False)


def records(path, stage, own=True):
    lines = (path / "protocols" / "records.jsonl" if own else path / "records.jsonl").read_text().splitlines()
    return {r["sample"]: r for r in map(json.loads, lines) if r["attack"] == stage and r["defence"] == "d"}


def line(found, protocol, start=""):
    return next(x for x in found["d"].lines if x.protocol == protocol and x.number.startswith(start))


def test_known_noise_breaks_what_a_grid_over_the_ball_breaks(measured):
    path, found = measured
    (_, defence), samples = toy()
    known = KnownNoise(defence.model, derive_seed(SEED, "judge"))
    steps = torch.linspace(-EPS, EPS, 61)
    grid = torch.cartesian_prod(steps, steps).reshape(-1, 1, 1, 2)
    broken = []
    for x, y, i in zip(samples.images, samples.labels, samples.ids, strict=True):
        points = (x + grid).clamp(0, 1)
        with torch.no_grad():
            logits = known(points, sample_ids=i.repeat(len(points)), draw=7, seed=9)  # neither changes anything
        broken.append(bool((margin_loss(logits, y.repeat(len(points))) > 0).any()))
    stored = records(path, "deterministic")
    assert [stored[i]["predictions"] != [int(y)] for i, y in enumerate(samples.labels)] == broken
    assert 0 < sum(broken) < N
    assert line(found, "deterministic").accuracy.value == pytest.approx(1 - np.mean(broken))
    first = [r["predictions"][0] == r["label"] for r in records(path, "clean", own=False).values()]
    assert line(found, "deterministic").clean.value == pytest.approx(np.mean(first))
    for i, record in stored.items():  # judged under the very noise that was attacked
        image = torch.from_numpy(np.load(path / "protocols" / "adversarial" / "d" / "deterministic" / f"{i}.npy"))[None]
        assert (image - samples.images[i]).abs().max() <= EPS + 1e-6
        assert known(image, sample_ids=[i]).argmax(1).tolist() == record["predictions"]


def test_in_loop_counts_every_answer_to_every_iterate(measured):
    path, found = measured
    (_, defence), samples = toy()
    wrong, asked = Counter(), Counter()

    def see(model, args, kwargs, logits):
        for i, right in zip(
            kwargs["sample_ids"].tolist(), (logits.argmax(1) == labels[kwargs["sample_ids"]]), strict=True
        ):
            asked[i] += 1
            wrong[i] += not right

    labels = samples.labels
    hook = defence.model.register_forward_hook(see, with_kwargs=True)
    ATTACK.run(
        defence.model, samples.images, labels, samples.ids, derive_seed(derive_seed(SEED, "attack"), ATTACK.name)
    )
    hook.remove()
    stored = records(path, "in-loop pgd-eot")
    assert [(stored[i]["submitted"], stored[i]["submitted_wrong"]) for i in range(N)] == [
        (asked[i], wrong[i]) for i in range(N)
    ]
    assert set(asked.values()) == {10}
    held = [wrong[i] == 0 for i in range(N)]
    assert 0 < sum(held) < N
    assert line(found, "in-loop").accuracy.value == pytest.approx(np.mean(held))
    # the control: every clean image, as often, one draw at a time, or until an answer is wrong
    judge, answers, survive = derive_seed(SEED, "judge"), records(path, "in-loop clean x 10"), []
    for i in range(N):
        alone = [
            defence.model(samples.images[i : i + 1], sample_ids=[i], draw=d, seed=judge).argmax(1) for d in range(10)
        ]
        alone, known = torch.cat(alone).tolist(), [p for p in answers[i]["predictions"] if p >= 0]
        assert len(answers[i]["predictions"]) == 10
        assert known == alone[: len(known)]
        assert len(known) == 10 or any(p != labels[i] for p in known)
        assert answers[i]["calls"] == 4 * (len(known) - DRAWS)
        survive.append(alone == [int(labels[i])] * 10)
    assert 0 < sum(survive) < N
    assert line(found, "in-loop").clean.value == pytest.approx(np.mean(survive))


def test_in_loop_with_an_attack_that_stops_early(tmp_path):
    """The adaptive attack asks some images less: so is the clean image compared."""
    (_, defence), samples = toy()
    defence = replace(defence, attacks=[Adaptive("Linf", 0.3, calls=2400)])
    with opened(tmp_path) as folder:
        evaluate(folder, [defence], samples, SEED, 4, progress=False)
        found = measure_protocols(folder, [defence], samples, ("in-loop",), EFFORT, progress=False)
    counts = records(tmp_path, "adaptive", own=False)
    asked = [counts[i]["submitted"] for i in range(N)]
    assert max(asked) == defence.attacks[0].answers(defence.model) > min(asked) > 0
    answers = records(tmp_path, f"in-loop clean x {max(asked)}")
    right = [set(answers[i]["predictions"][: asked[i]]) == {answers[i]["label"]} for i in range(N)]
    shown = line(found, "in-loop", f"right in all {min(asked)} to {max(asked)} answers to the iterates of adaptive")
    assert shown.clean.value == pytest.approx(np.mean(right))
    assert shown.accuracy.value == pytest.approx(np.mean([counts[i]["submitted_wrong"] == 0 for i in range(N)]))


def test_a_run_that_did_not_count_its_iterates_has_its_attack_run_again(measured, tmp_path):
    path, found = measured
    shutil.copytree(path, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "protocols")
    lines = map(json.loads, (path / "records.jsonl").read_text().splitlines())
    kept = [{k: v for k, v in r.items() if not k.startswith("submitted")} for r in lines]
    (tmp_path / "old" / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    defences, samples = toy()
    with opened(tmp_path / "old") as folder:
        again = measure_protocols(folder, defences, samples, ("in-loop",), EFFORT, progress=False)
    assert line(again, "in-loop").accuracy == line(found, "in-loop").accuracy
    assert line(again, "in-loop").calls > line(found, "in-loop").calls


def test_in_loop_counts_answers_of_the_precision_that_is_judged(measured, tmp_path):
    """An attack in half precision is asked about a model that nobody deploys."""
    (_, defence), samples = toy()
    defence = replace(defence, precision="bf16")
    with opened(tmp_path) as folder:
        evaluate(folder, [defence], samples, SEED, 4, progress=False)
        found = measure_protocols(folder, [defence], samples, ("in-loop",), EFFORT, progress=False)
    wrong = [[rows[i]["submitted_wrong"] for i in range(N)] for rows in (
        records(tmp_path, "in-loop pgd-eot"), records(measured[0], "in-loop pgd-eot"))]  # fmt: skip
    assert wrong[0] == wrong[1]
    assert line(found, "in-loop").accuracy == line(measured[1], "in-loop").accuracy
    assert InLoop().planned(defence, EFFORT) >= line(found, "in-loop").calls > line(measured[1], "in-loop").calls


@pytest.mark.parametrize(
    ("stage", "k"), [("averaged 1-4 clean", 4), ("averaged 1-4 pgd-eot", 4), ("averaged 4 softmax", 4)]
)
def test_averages_are_the_answers_of_a_model_that_averages(measured, stage, k):
    path, found = measured
    (_, defence), samples = toy()
    stored, judge = records(path, stage), derive_seed(SEED, "judge")
    for i in range(N):
        x = samples.images[i : i + 1]
        if "pgd" in stage:
            x = torch.from_numpy(np.load(path / "adversarial" / "d" / "pgd-eot" / f"{i}.npy"))[None]
        elif "clean" not in stage:
            x = torch.from_numpy(np.load(path / "protocols" / "adversarial" / "d" / stage / f"{i}.npy"))[None]
        singles = [int(defence.model(x, sample_ids=[i], draw=d, seed=judge).argmax(1)) for d in range(16)]
        assert stored[i]["predictions"] == singles
        for how in ("logits", "softmax"):
            model = DefendedClassifier(defence.model.classifier, defence.model.purifier, k, how)
            expected = [int(model(x, sample_ids=[i], draw=d, seed=judge).argmax(1)) for d in range(16 // k)]
            assert stored[i]["answers"][str(k)][how] == expected
        parts = [Counter(singles[j : j + k]) for j in range(0, 16, k)]
        votes = [min(c for c in part if part[c] == max(part.values())) for part in parts]
        assert stored[i]["answers"][str(k)]["majority"] == votes
    for how, words in WORDS.items():
        share = share_right(stored, k, how)
        of = line(found, "averaged", f"4 purifications, {words}")
        if stage == "averaged 4 softmax":
            share = min(share, share_right(records(path, "averaged 4 logits"), k, how))
            of = line(found, "averaged", f"4 purifications, {words}; own gradients")
        assert (of.clean if "clean" in stage else of.accuracy).value == pytest.approx(share)


def share_right(stored, k, how):
    return np.mean([np.mean([a == r["label"] for a in r["answers"][str(k)][how]]) for r in stored.values()])


def test_the_gradient_of_the_answer_is_the_stronger_attack(measured):
    _, found = measured
    for how in ("mean logits", "mean softmax", "majority"):
        cheap = line(found, "averaged", f"4 purifications, {how}").accuracy.value
        own = line(found, "averaged", f"4 purifications, {how}; own gradients").accuracy.value
        assert own <= cheap
    votes = majority(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]]))
    assert votes.tolist() == [[2, 1]]


def test_nobody_goes_on_from_what_is_wrong_under_known_noise(measured):
    path, _ = measured
    cheap, stored = records(path, "pgd-eot", own=False), records(path, "deterministic")
    right = [cheap[i]["predictions"][0] == cheap[i]["label"] for i in range(N)]
    assert 0 < sum(right) < N
    for i in range(N):
        assert (stored[i]["calls"] > 0) is right[i]
        if not right[i]:
            images = [(path, "pgd-eot"), (path / "protocols", "deterministic")]
            kept, found = (np.load(p / "adversarial" / "d" / stage / f"{i}.npy") for p, stage in images)
            assert np.array_equal(kept, found)


def test_stated_calls_are_those_of_the_networks(tmp_path, monkeypatch):
    """Forward rows of both networks by hooks; a gradient counts as three, as if it was recomputed."""
    defences, samples = toy()
    asked = Counter()

    def classes(model, *arguments, **options):
        """Every attack first asks one image for the number of classes: four calls for each purification."""
        asked["all"] += 4 * getattr(model, "purifications", 1)
        return num_classes(model, *arguments, **options)

    monkeypatch.setattr("purify.attacks.base.num_classes", classes)
    model, calls = defences[1].model, Counter()

    def see(module, args, output):
        calls["all"] += len(output) * (3 if torch.is_grad_enabled() and output.requires_grad else 1)

    model = model.with_gradient("full")  # which recomputes nothing, so that a pass is seen once
    defences = [replace(defences[1], model=model)]
    with opened(tmp_path) as folder:
        evaluate(folder, defences, samples, SEED, 4, progress=False)
        for network in (model.classifier, model.purifier.score_model.network):
            network.register_forward_hook(see)
        asked.clear()
        found = measure_protocols(folder, defences, samples, NAMES, EFFORT, progress=False)["d"]
    assert asked["all"] > 0
    assert calls["all"] - asked["all"] == pytest.approx(found.calls * N, abs=N)  # records have whole numbers


def test_protocols_resume_and_hold_one_configuration(measured, tmp_path):
    path, found = measured
    shutil.copytree(path, tmp_path / "cut")
    file = tmp_path / "cut" / "protocols" / "records.jsonl"
    lines = file.read_text().splitlines(True)
    file.write_text("".join(x for i, x in enumerate(lines) if i % 3))
    defences, samples = toy()
    with opened(tmp_path / "cut") as folder:
        again = measure_protocols(folder, defences, samples, NAMES, EFFORT, progress=False)
        assert again == found
        with pytest.raises(ValueError, match="holds another run, which differs in steps"):
            measure_protocols(folder, defences, samples, NAMES, replace(EFFORT, steps=3), progress=False)
        more = measure_protocols(folder, defences, samples, NAMES, replace(EFFORT, averages=(2,)), progress=False)
    assert [x for x in more["d"].lines if x.protocol != "averaged"] == [
        x for x in found["d"].lines if x.protocol != "averaged"
    ]
    stripped = [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]
    now = [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in file.read_text().splitlines()]
    assert all(record in now for record in stripped)
    lines = file.read_text().replace('"label": 0', '"label": 1').replace('"label": 2', '"label": 1')
    file.write_text(lines)
    with opened(tmp_path / "cut") as folder, pytest.raises(ValueError, match="changed by hand"):
        measure_protocols(folder, defences, samples, NAMES, EFFORT, progress=False)


def test_table_plain_data_and_curve(measured, tmp_path):
    _, found = measured
    rows = table(found)
    assert list(rows.index.unique("protocol")) == list(NAMES)
    assert set(rows.columns) == {"accuracy", "clean", "calls", "the attacker"}
    stored = json.loads(json.dumps(plain(found)))["d"]
    assert stored["lines"][0] == {
        **stored["lines"][0], "protocol": "fresh", "clean": vars(found["d"].lines[0].clean),
    }  # fmt: skip
    assert stored["calls"] > 0 < stored["run_calls"]
    assert {(p.k, p.who) for p in found["d"].points} == {
        (1, "clean"),
        (1, "cheap"),
        *((4, w) for w in ("clean", "cheap", "own")),
    }
    path = draw(tmp_path, "d", found["d"].points)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert draw(tmp_path, "d", []) is None


def test_the_command_adds_protocols_to_a_run_that_has_ended(tmp_path, capsys):
    tiny = [
        *("--n-examples", "4", "--attack-steps", "2", "--eot", "2", "--judge-draws", "2", "--steps", "2"),
        *(
            "--noise-level",
            "constant",
            "--attacks",
            "transfer,pgd-eot",
            "--threads",
            "1",
            "--out",
            str(tmp_path / "run"),
        ),
    ]
    assert main(tiny) == 0
    assert "What the number means" not in capsys.readouterr().out
    assert "protocols" not in json.loads((tmp_path / "run" / "result.json").read_text())
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert main([*tiny, "--protocol", "averaged,in-loop", "--averages", "2"]) == 0
    out = capsys.readouterr().out
    assert "Nothing was left to attack" in out
    assert "2 purifications, majority; own gradients, 1 steps" in out
    assert "averaged-diffpure.png" in out
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["protocols"]["diffpure"]["lines"]
    assert [x["protocol"] for x in stored] == [*["fresh"] * 3, *["averaged"] * 6, "in-loop"]
    assert {row.name: len(row.protocols) for row in read_run(tmp_path / "run")} == {
        "undefended": 0, "diffpure": 10, "adversarial training": 0,
    }  # fmt: skip
    again = Evaluation.from_yaml(tmp_path / "run" / "run.yaml").run(progress=False).protocols["diffpure"]
    assert json.loads(json.dumps([asdict(line) for line in again.lines])) == stored
    write_leaderboard(read_run(tmp_path / "run"), tmp_path / "board")
    markdown, page = ((tmp_path / "board" / name).read_text() for name in ("leaderboard.md", "index.html"))
    for text in (markdown, page):
        assert "What the number means" in text
        assert text.count("right in all 6 answers to the iterates of pgd-eot") == 1
    assert main([*tiny, "--protocol", "deterministic", "--dry-run"]) == 0
    assert "Protocols: about" in capsys.readouterr().out
