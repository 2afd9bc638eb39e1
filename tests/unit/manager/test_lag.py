"""When the manager says that a remote falls behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ckptstore import CheckpointManager


def test_a_remote_falls_behind_when_saves_wait_not_when_they_come_quickly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("trainer")
    manager = CheckpointManager(tmp_path / "ckpt", remote=f"file://{tmp_path}/bucket", monitor="loss", logger=logger)
    manager.track(values=[0])
    ages = [(2, 0.1), (2, 9.0), (3, 12.0), (4, 20.0), (0, 0.0), (2, 11.0)]
    told = []
    with caplog.at_level(logging.WARNING, "trainer"):
        for step, lag in enumerate(ages):
            monkeypatch.setattr(manager._saver._safety, "lag", lambda name, lag=lag: lag)
            caplog.clear()
            manager.save_checkpoint(global_step=step)
            told.append([message for message in caplog.messages if "behind" in message])
    manager.close()
    assert told == [
        [],
        [],
        ["file is 3 saves behind; the oldest waits for 12 s"],
        [],
        [],
        ["file is 2 saves behind; the oldest waits for 11 s"],
    ]
