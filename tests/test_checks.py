"""What configs from outside may hold where a number is meant."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TinyClassifier, smooth_model

from purify import (
    Constant,
    ContinuousVP,
    FixedDt,
    Purifier,
    ScoreNorm,
    SSNILinear,
    SSNISigmoid,
    zoo,
)
from purify.attacks import PGD, LowFrequencyPGD, LowLevelPGD, NormPGD, StepsPGD
from purify.certify import DSSN, SSN, Anytime, Cascade, Draws, Smooth
from purify.checks import check_unique, check_writable, is_number
from purify.diffusion.reverse import DDIM

CALIBRATION = zoo.calibration("digits")
BUILD = {
    "t_star": Constant,
    "base level": lambda v: SSNILinear(v, CALIBRATION),
    "bias": lambda v: SSNILinear(0.2, CALIBRATION, v),
    "tau": lambda v: SSNISigmoid(0.2, CALIBRATION, tau=v),
    "t_max of the norm": lambda v: ScoreNorm(t_max=v),
    "dt": FixedDt,
    "eta": DDIM,
    "t_end": lambda v: Purifier(smooth_model(), t_end=v),
    "beta_max": lambda v: ContinuousVP(0.1, v),
    "eps": lambda v: PGD("Linf", v),
    "step_size": lambda v: PGD("Linf", 0.1, step_size=v) if v is not None else PGD("Linf", v),
    "norm_weight": lambda v: NormPGD("Linf", 0.1, norm_weight=v),
    "share": lambda v: LowLevelPGD("Linf", 0.1, share=v),
    "step_weight": lambda v: StepsPGD("Linf", 0.1, step_weight=v),
    "cutoff": lambda v: LowFrequencyPGD("Linf", 0.1, cutoff=v),
    "alpha": lambda v: Draws(alpha=v),
    "radii": lambda v: Anytime((v,)),
    "sigma": lambda v: Smooth(TinyClassifier(), v),
    "p0": lambda v: Cascade((Smooth(TinyClassifier(), 0.5),), v),
    "lam of SSN": lambda v: SSN(TinyClassifier(), v),
    "lam of DSSN": lambda v: DSSN(TinyClassifier(), v),
}


@pytest.mark.parametrize("value", ["a", None, True, float("nan"), float("inf"), [0.1]])
@pytest.mark.parametrize("what", BUILD)
def test_what_is_no_number_is_refused(what, value):
    with pytest.raises(ValueError, match=r"must|needs|at least"):
        BUILD[what](value)


def test_numbers_of_numpy_are_numbers():
    assert is_number(np.float32(0.2))
    assert Constant(np.float32(0.25)).highest == 0.25


def test_repeated_names():
    check_unique(["a", "b"], "things", "rename one")
    with pytest.raises(ValueError, match="Two things are called 'b'; rename one"):
        check_unique(["a", "b", "b"], "things", "rename one")


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    new, old = tmp_path / "a" / "b" / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    check_writable(new)
    check_writable(old)
    assert new.parent.is_dir()
    assert not new.exists()
    assert old.read_text() == "kept"


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (Path("/proc/x.json"), "No such file"),
        (Path("/proc/x/y.json"), "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "x.json", "File exists|Not a directory"),
    ):
        with pytest.raises(ValueError, match=rf"^{path} cannot be written \(({reason}).*; choose another --out\.$"):
            check_writable(path)
