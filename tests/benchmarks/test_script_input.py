"""What every script under benchmarks/ refuses before any work."""

import pytest
from conftest import load_script

WORKS = {
    "attack_speed": "times",
    "certify_speed": "build_works",
    "engine_overhead": "measure",
    "gradient_fidelity": "measure",
    "guidance_overhead": "measure",
    "released_attacks": "measure",
    "scaling": "measure",
    "score_norms": "adversarial",
    "throughput": "measure",
}


@pytest.mark.parametrize("name", WORKS)
def test_results_that_cannot_be_written_are_noticed_before_any_work(name, capsys, monkeypatch):
    script = load_script(name)
    monkeypatch.setattr(script, WORKS[name], lambda *args, **kwargs: pytest.fail("it measured first"))
    assert script.main(["--out", "/proc/x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: /proc/x")
    assert "cannot be written (" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("throughput", ["--samples", "2", "--attacked", "5"], "--attacked 5 is more than the images, --samples 2"),
        ("throughput", ["--samples", "501"], "digits has 500 test images; --samples 501 is too many"),
        ("attack_speed", ["--batches", "a"], "--batches takes whole numbers separated by commas, got 'a'"),
        ("attack_speed", ["--batches", "4,0"], "every number in --batches must be a whole number of at least 1, got 0"),
    ],
)
def test_benchmarks_refuse_bad_input(name, arguments, message, capsys, tmp_path):
    assert load_script(name).main([*arguments, "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == f"error: {message}.\n"
