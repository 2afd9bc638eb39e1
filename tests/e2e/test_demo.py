"""The story of `make demo`, as a person runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_held_when_the_demo_is_played() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptstore.demo"], capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("bit-equal to the uninterrupted run", "1 rank (resharded)", "3 ranks (resharded)", "everything held"):
        assert line in done.stdout
    assert "FAILED" not in done.stdout
