"""Trainers die, the agent lives: what it still has in memory is read from there, and verified like anything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ckptstore import CheckpointStore, StoreConfig

CONFIG = StoreConfig(agent_idle_exit_seconds=20)
SIZE = 1 << 20

TRAINER = """
import os, signal, sys, torch
from ckptstore import CheckpointStore, StoreConfig
remote = sys.argv[3] if len(sys.argv) > 3 else None
store = CheckpointStore(sys.argv[1], remote, config=StoreConfig(agent_idle_exit_seconds=20))
for step in range(1, int(sys.argv[2]) + 1):
    store.save({"w": torch.full((1 << 20,), float(step)), "n": step}, step).wait("remote" if remote else "local")
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_after(root: Path, saves: int, *remote: str) -> None:
    """A trainer that saved and was killed."""
    command = [sys.executable, "-c", TRAINER, str(root), str(saves), *remote]
    done = subprocess.run(command, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def load(root: Path, step: Any = "latest") -> tuple[dict[str, Any], dict[str, int]]:
    state = {"w": torch.zeros(SIZE), "n": 0}
    with CheckpointStore(root, config=CONFIG) as store:
        info = store.load(state, step)
    assert info is not None
    assert info.report is not None
    return state, dict(info.report.bytes_by_source)


def test_a_restarted_trainer_reads_from_the_agents_memory(tmp_path: Path) -> None:
    killed_after(tmp_path, 3)
    state, sources = load(tmp_path)
    assert state["n"] == 3
    assert torch.equal(state["w"], torch.full((SIZE,), 3.0))
    assert sources == {"arena": SIZE * 4}
    assert load(tmp_path, 1)[1] == {"local": SIZE * 4}, "its memory was needed again"


def test_memory_serves_when_the_file_is_damaged_or_gone(tmp_path: Path) -> None:
    killed_after(tmp_path, 1)
    file = next(tmp_path.rglob("__0_0.distcp"))
    os.truncate(file, 4096)
    state, sources = load(tmp_path)
    assert torch.equal(state["w"], torch.ones(SIZE))
    assert sources == {"arena": SIZE * 4}
    file.unlink()
    assert torch.equal(load(tmp_path)[0]["w"], torch.ones(SIZE))


def test_a_file_that_is_gone_is_brought_back_from_the_remote_although_memory_served(tmp_path: Path) -> None:
    root, remote = tmp_path / "store", f"file://{tmp_path}/bucket"
    killed_after(root, 1, remote)
    (lost,) = root.rglob("__0_0.distcp")
    before = lost.read_bytes()
    lost.unlink()
    with CheckpointStore(root, remote, config=CONFIG) as store:
        state = {"w": torch.zeros(SIZE), "n": 0}
        info = store.load(state)
        assert info is not None
        assert info.report is not None
        assert dict(info.report.bytes_by_source) == {"arena": SIZE * 4}
        store.save(state, 2, wait="local")
        deadline = time.monotonic() + 60
        while not lost.exists() or lost.read_bytes() != before:
            assert time.monotonic() < deadline, "the agent did not bring the file back"
            time.sleep(0.05)


def test_memory_that_is_written_over_is_not_believed(tmp_path: Path) -> None:
    killed_after(tmp_path, 1)
    with CheckpointStore(tmp_path, config=CONFIG) as store:
        from ckptstore.agent.client import AgentClient

        info = store.latest()
        assert info is not None
        lent: dict[str, Any] = {}
        borrow = AgentClient.borrow

        def keep(self: AgentClient, run: str, save_id: str) -> Any:
            lent["images"] = borrow(self, run, save_id)
            # The next trainer saves into the same memory while this one is about to read it.
            with CheckpointStore(tmp_path, config=CONFIG) as other:
                for step in (2, 3):
                    other.save({"w": torch.full((SIZE,), float(step)), "n": step}, step, wait="local")
            return lent["images"]

        AgentClient.borrow = keep  # type: ignore[method-assign]
        try:
            state = {"w": torch.zeros(SIZE), "n": 0}
            loaded = store.load(state, info.save_id)
        finally:
            AgentClient.borrow = borrow  # type: ignore[method-assign]
    assert lent["images"].keys() == {0}
    assert torch.equal(state["w"], torch.ones(SIZE))
    assert loaded is not None
    assert loaded.report is not None
    assert dict(loaded.report.bytes_by_source) == {"local": SIZE * 4}


def test_the_disk_is_read_when_the_trainer_ended_in_good_order(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=CONFIG) as store:
        store.save({"w": torch.ones(SIZE), "n": 1}, 1, wait="local")
        state = {"w": torch.zeros(SIZE), "n": 0}
        info = store.load(state)
        assert info is not None
        assert info.report is not None
        assert set(info.report.bytes_by_source) == {"local"}, "its own memory may be written to at any moment"
    assert set(load(tmp_path)[1]) == {"local"}
