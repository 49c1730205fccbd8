"""Runs devices.py in processes of its own: a device that was registered with torch stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="an older torch"
)
@pytest.mark.parametrize("which", ["commands", "not commands"])
def test_nothing_is_left_on_the_cpu(which: str):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which]
    done = subprocess.run([*command, str(HERE / "devices.py")], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
