"""The store as a whole under kill -9 and power cuts: what was acknowledged is there, what is there is whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from crash_jobs import problem_with, read_all, train

from ckptstore import CheckpointStore
from ckptstore.agent.client import AgentClient
from ckptstore.repo.local import LocalTier
from ckptstore.testing import power_cut
from ckptstore.testing.power_cut import PowerCutFileSystem

pytestmark = pytest.mark.crash

SCALE = int(os.environ.get("CKPTSTORE_TEST_SCALE", "1"))
ROUNDS = 200 * SCALE

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "ckptstore.store.session", "crash_jobs"])


class Trainer:
    """A child that trains, and the word it sends."""

    def __init__(
        self, root: Path, first_step: int, *, level: str, count: int = 1000, remote: str | None = None
    ) -> None:
        self.pipe: Connection
        self.pipe, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(
            target=train, args=(str(root), remote, first_step, count, level, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.acknowledged: list[int] = []

    def wait_for_first(self) -> None:
        assert self.pipe.poll(60), "the trainer says nothing"
        self.acknowledged.append(self.pipe.recv())

    def kill(self) -> None:
        """kill -9, then hear what it had still said."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        try:
            while self.pipe.poll(0):
                self.acknowledged.append(self.pipe.recv())
        except EOFError:
            pass


def settle(root: Path) -> None:
    """Wait until the agent has written what was sealed."""
    observer = AgentClient.observe(root)
    if observer is not None:
        observer.settle("default", timeout_s=30)
        observer.close()


def test_every_acknowledged_save_is_whole_when_the_trainer_is_killed_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "store"
    moments = random.Random(11)
    step, copies_cut = 1, 0
    for round_ in range(ROUNDS):
        trainer = Trainer(root, step, level="staged")
        trainer.wait_for_first()
        time.sleep(moments.uniform(0, 0.08))
        trainer.kill()
        settle(root)
        found = read_all(root)
        for at, state in found.items():
            assert (problem := problem_with(state, at)) is None, f"round {round_}, step {at}: {problem}"
        missing = set(trainer.acknowledged) - set(found)
        assert not missing, f"round {round_}: {sorted(missing)} were staged and are gone"
        last = max(found)
        copies_cut += last == max(trainer.acknowledged)
        step = last + 1
        tier = LocalTier(root)
        for save in tier.saves("default")[:-1]:
            tier.delete("default", save.save_id)
    assert copies_cut > ROUNDS // 4, "the kills hardly ever hit a save in progress"


def test_upload_finishes_when_all_trainers_are_killed_after_staged(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/bucket"
    trainer = Trainer(tmp_path / "store", 7, level="staged", remote=remote)
    trainer.wait_for_first()
    trainer.kill()
    deadline = time.monotonic() + 60
    store = CheckpointStore(None, remote=remote)
    while 7 not in [info.step for info in store.checkpoints()]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert problem_with(store.read(7), 7) is None
    store.close()


def test_upload_goes_on_when_the_agent_is_killed(tmp_path: Path) -> None:
    root, remote = tmp_path / "store", f"file://{tmp_path}/bucket"
    for round_ in range(5 * SCALE):
        with CheckpointStore(root, remote=remote) as store:
            state: dict[str, Any] = {"x": list(range(1000)), "w": torch.ones(9), "step": round_}
            handle = store.save(state, 2 * round_)
            handle.wait("local", 60)
            session = store._session
            assert session is not None
            os.kill(session.link.client.agent_pid, signal.SIGKILL)
            store.wait("remote", timeout_s=60)
            store.save(state, 2 * round_ + 1).wait("local", 30)  # into memory of the agent that has come meanwhile
    with CheckpointStore(None, remote=remote) as store:
        assert [info.step for info in store.checkpoints()] == list(range(10 * SCALE))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerCutFileSystem]:
    if (why := power_cut.why_not()) is not None:
        pytest.skip(f"power cut: {why}")
    with PowerCutFileSystem(tmp_path) as disk:
        yield disk


@pytest.mark.root
def test_local_acknowledgement_survives_the_power_cut(disk: PowerCutFileSystem) -> None:
    for round_ in range(3 * SCALE):
        root = disk.root / f"store-{round_}"
        trainer = Trainer(root, 1, level="local", count=2)
        trainer.wait_for_first()
        disk.cut()
        observer = AgentClient.observe(root)
        trainer.kill()
        if observer is not None:
            os.kill(observer.agent_pid, signal.SIGKILL)
            observer.close()
            psutil.wait_procs([psutil.Process(observer.agent_pid)], timeout=10)
        disk.boot()
        found = read_all(root)
        assert set(trainer.acknowledged) <= set(found)
        for at, state in found.items():
            assert problem_with(state, at) is None
