"""One run's saves: who is told what, and when nothing may be committed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ckptstore.agent import disk
from ckptstore.agent.arena import State
from ckptstore.agent.jobs import RunJobs
from ckptstore.agent.protocol import Event, SealRequest, layout_id_of
from ckptstore.agent.runtime import RuntimeDir
from ckptstore.agent.slots import Attachment
from ckptstore.clock import ManualClock
from ckptstore.config import StoreConfig
from ckptstore.errors import CheckpointNotFoundError, ConfigError, LockedError, SaveFailedError
from ckptstore.format.manifest import Summary
from ckptstore.format.stock import PieceSpec
from ckptstore.repo.local import LocalTier

PIECES = [PieceSpec("w", "float32", (1000,), (0,), (1000,), True)]
SAVE = "0123456789ab-1"


class Rank:
    """What a connection is to the run's jobs."""

    def __init__(self, jobs: RunJobs, slot: int, *, world_size: int = 2, local_ranks: tuple[int, ...] = (0, 1)) -> None:
        self.jobs, self.rank, self.world_size, self.local_ranks = jobs, local_ranks[slot % 2], world_size, local_ranks
        self.events: list[Event] = []
        self.attachment: Attachment = jobs.attach(
            slot, self._on_event, lambda: True, rank=None, config=jobs.config, remotes={}, environ={}
        )
        self.attachment.slot.configure(self.attachment, PIECES, 2, 1)
        self._arrived = threading.Condition()

    def _on_event(self, event: Event) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def reserve(self, save_id: str | None = None) -> int:
        index = self.attachment.slot.reserve(self.attachment, 1, save_id)
        assert index is not None
        return index

    def request(self, save_id: str = SAVE, **changes: Any) -> SealRequest:
        summary = Summary(
            run=self.jobs.run, save_id=save_id, timeline=1, step=5, created_at="2026-01-01T00:00:00.000Z", job="j",
            world_size=self.world_size,
        )  # fmt: skip
        request = SealRequest(
            save_id, 5, self.rank, self.world_size, 0, 1 if len(self.local_ranks) == self.world_size else 2,
            self.local_ranks, layout_id_of(PIECES), summary if self.rank == 0 else None,
        )  # fmt: skip
        return replace(request, **changes)

    def seal(self, save_id: str = SAVE, **changes: Any) -> None:
        self.jobs.seal(self.attachment, self.reserve(), self.request(save_id, **changes))

    def lose(self) -> None:
        self.jobs.detach(self.attachment, is_gone=True, was_closed=False)

    def wait(self, kind: str, save_id: str = "") -> Event:
        def found() -> Event | None:
            return next((e for e in self.events if e.kind == kind and e.save_id.endswith(save_id)), None)

        with self._arrived:
            assert self._arrived.wait_for(found, 30), [e.kind for e in self.events]
            event = found()
            assert event is not None
            return event

    def states(self) -> list[State]:
        return [g.state for g in self.attachment.slot.generations]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def jobs(tmp_path: Path, clock: ManualClock) -> RunJobs:
    tier = LocalTier(tmp_path / "root")
    tier.create()
    tier.make_run("run")
    runtime = RuntimeDir(tmp_path / "runtime")
    runtime.path.mkdir(mode=0o700)
    return RunJobs(threading.Condition(threading.RLock()), tier, runtime, "run", StoreConfig(deadline_s=10), clock)


@pytest.fixture
def ranks(jobs: RunJobs) -> list[Rank]:
    return [Rank(jobs, 0), Rank(jobs, 1)]


def test_a_save_is_sealed_once_every_local_rank_has(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[1].seal()
    assert ranks[0].events == []
    assert jobs.is_staging()
    ranks[0].seal()
    for rank in ranks:
        assert rank.wait("local").data["summary"]["save_id"] == SAVE
        assert [e.kind for e in rank.events] == ["sealed", "local"]
        assert rank.states() == [State.FREE, State.FREE]
    assert jobs.last_local is not None
    assert jobs.last_local.step == 5
    assert not jobs.is_staging()
    assert jobs.is_settled()


def test_nothing_more_is_written_for_a_save_once_its_ranks_have_heard_of_it(
    jobs: RunJobs, ranks: list[Rank], tmp_path: Path
) -> None:
    seen: dict[str, bool] = {}
    tell, note = ranks[0].attachment.send, tmp_path / "root" / "run" / "timings" / f"{SAVE}.json"

    def send(event: Event) -> None:
        seen[event.kind] = note.exists()
        tell(event)

    ranks[0].attachment.send = send
    for rank in ranks:
        rank.seal()
    ranks[0].wait("local")
    assert seen == {"sealed": False, "local": True}


def test_a_job_that_comes_back_takes_nothing_from_a_newer_one(jobs: RunJobs) -> None:
    def attach(begun: float, is_gone: bool = False) -> Attachment:
        return jobs.attach(
            0, lambda _: None, lambda: is_gone, rank=0, config=jobs.config, remotes={}, environ={}, begun=begun
        )  # fmt: skip

    newer = attach(2.0)
    with pytest.raises(LockedError, match="newer job"):
        attach(1.0)
    newer.slot.check_owner(newer)
    assert attach(2.0) is newer.slot.owner, "another connection of the same job"
    attach(3.0, is_gone=True)
    attach(2.0)


def test_a_save_fails_when_there_can_be_no_thread_to_write_it(
    jobs: RunJobs, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks[1].seal()
    with monkeypatch.context() as poor:
        poor.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(SaveFailedError, match="can't start new thread"):
            ranks[0].seal()
    assert ranks[1].wait("failed").save_id == SAVE
    assert not jobs.is_staging()
    for rank in ranks:
        rank.seal("0123456789ab-2")
    ranks[0].wait("local", "-2")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_drops_the_save_for_the_others(jobs: RunJobs, ranks: list[Rank], lost: int) -> None:
    ranks[0].seal()
    ranks[1].reserve()
    ranks[lost].lose()
    survivor = ranks[1 - lost]
    assert survivor.wait("failed").data["rank"] == lost
    assert not jobs.is_staging()
    assert ranks[0].states() == [State.FREE, State.FREE]
    if lost == 0:
        with pytest.raises(SaveFailedError, match="rank 0"):
            jobs.seal(survivor.attachment, 0, survivor.request())
        assert survivor.states() == [State.FREE, State.FREE]


def test_a_save_lives_on_when_a_rank_says_goodbye_after_its_seal(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[0].seal()
    jobs.detach(ranks[0].attachment, is_gone=True, was_closed=True)
    ranks[1].seal()
    ranks[1].wait("local")


def test_a_save_is_dropped_when_a_rank_says_goodbye_before_its_seal(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[0].seal()
    jobs.detach(ranks[1].attachment, is_gone=True, was_closed=True)
    assert "closed its store" in ranks[0].wait("failed").data["message"]


class Disk:
    """One that hangs for a run until it is let go on, and knows which blocks it was asked to write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
        self.asked: list[str] = []
        self.is_asked, self.goes_on = threading.Event(), threading.Event()
        genuine = disk.write_block

        def write_block(fd: int, block: memoryview, offset: int) -> int:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if path.parts[-3] == run:
                self.asked.append(path.parent.name.removeprefix(".staging-"))
                self.is_asked.set()
                assert self.goes_on.wait(30)
            return genuine(fd, block, offset)

        monkeypatch.setattr(disk, "write_block", write_block)


def test_a_runs_saves_are_written_in_turn(jobs: RunJobs, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Disk(monkeypatch, "run")
    for count in (1, 2):
        for rank in ranks:
            rank.seal(f"0123456789ab-{count}")
    assert busy.is_asked.wait(30)
    assert jobs.discard("0123456789ab-2", "not wanted")
    assert ranks[0].wait("failed", "-2").data["message"] == "not wanted", "it does not wait for its turn"
    for rank in ranks:
        rank.seal("0123456789ab-3")
    threading.Event().wait(0.1)  # nothing is hoped for meanwhile: were there no turns, the third would be asked for
    busy.goes_on.set()
    ranks[0].wait("local", "-3")
    assert busy.asked == sorted(busy.asked)
    assert set(busy.asked) == {"0123456789ab-1", "0123456789ab-3"}
    assert [e.save_id[-1] for e in ranks[0].events if e.kind == "local"] == ["1", "3"]


def test_a_save_does_not_wait_for_another_runs(
    jobs: RunJobs, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Disk(monkeypatch, "run")
    for rank in ranks:
        rank.seal()
    assert busy.is_asked.wait(30)
    jobs._tier.make_run("other")
    other = RunJobs(jobs._condition, jobs._tier, jobs._writing._directory, "other", jobs.config, jobs._clock)
    others = [Rank(other, 0), Rank(other, 1)]
    for rank in others:
        rank.seal("00000000000b-1")
    others[0].wait("local")
    assert jobs.is_staging()
    busy.goes_on.set()
    ranks[0].wait("local")


def test_every_rank_may_die_once_all_have_sealed(jobs: RunJobs, ranks: list[Rank]) -> None:
    watcher = Rank(jobs, 7)
    for rank in ranks:
        rank.seal()
    for rank in ranks:
        rank.lose()
    watcher.wait("local")
    assert "failed" not in [e.kind for e in watcher.events]


def test_a_seal_after_a_rank_was_lost_fails_at_once(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[1].reserve()
    ranks[1].lose()
    with pytest.raises(SaveFailedError, match="rank 1 was lost"):
        ranks[0].seal()
    assert ranks[0].states() == [State.FREE, State.FREE]


def test_a_seal_fails_when_its_save_was_being_copied_by_the_lost_rank_though_it_is_back(
    jobs: RunJobs, ranks: list[Rank]
) -> None:
    ranks[1].reserve(SAVE)
    ranks[1].lose()
    back = Rank(jobs, 1)
    with pytest.raises(SaveFailedError):
        ranks[0].seal()
    ranks[0].seal("0123456789ab-2")
    back.seal("0123456789ab-2")
    back.wait("local")


def test_ranks_that_do_not_come_in_time_are_named(jobs: RunJobs, ranks: list[Rank], clock: ManualClock) -> None:
    ranks[0].seal()
    clock.sleep(9.9)
    jobs.check_deadlines()
    assert jobs.is_staging()
    clock.sleep(0.2)
    jobs.check_deadlines()
    failed = ranks[0].wait("failed")
    assert (failed.data["rank"], failed.data["error"]) == (1, "SaveFailedError")
    assert "rank 1 did not seal within 10.0 s" in failed.data["message"]
    with pytest.raises(SaveFailedError):
        ranks[1].seal()


def test_memory_is_given_back_when_a_rank_does_not_come_back(
    jobs: RunJobs, ranks: list[Rank], clock: ManualClock
) -> None:
    ranks[1].lose()
    clock.sleep(59)
    jobs.check_deadlines()
    assert len(ranks[1].attachment.slot.generations) == 2
    clock.sleep(2)
    jobs.check_deadlines()
    assert ranks[1].attachment.slot.generations == []
    assert len(ranks[0].attachment.slot.generations) == 2
    back = Rank(jobs, 1)
    assert back.reserve() == 0


def test_slots_are_matched_to_ranks_by_order_when_nobody_said_who_it_is(jobs: RunJobs) -> None:
    """The second node of a job whose two nodes share a machine: slots 2 and 3, ranks 2 and 3."""
    first, second = (Rank(jobs, slot, world_size=4, local_ranks=(2, 3)) for slot in (2, 3))
    first.seal()
    second.lose()
    assert first.wait("failed").data["rank"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"save_id": "../evil-1"},
        {"save_id": "0123456789ab-x"},
        {"rank": 5},
        {"local_ranks": (0,)},
        {"local_ranks": (0, 0)},
        {"local_ranks": (0, 9)},
        {"summary": None},
        {"step": 6},
        {"layout_id": "other"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_seal_that_contradicts_itself_changes_nothing(
    jobs: RunJobs, ranks: list[Rank], changes: dict[str, Any]
) -> None:
    index = ranks[0].reserve()
    with pytest.raises(ConfigError):
        jobs.seal(ranks[0].attachment, index, replace(ranks[0].request(), **changes))
    assert ranks[0].states()[index] is State.FILLING
    assert not jobs.is_staging()
    jobs.seal(ranks[0].attachment, index, ranks[0].request())


def test_a_seal_that_contradicts_another_rank_is_refused(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[0].seal()
    with pytest.raises(ConfigError, match="contradicts"):
        ranks[1].seal(step=6)
    with pytest.raises(ConfigError, match="contradicts"):
        ranks[0].seal()
    jobs.seal(ranks[1].attachment, 0, ranks[1].request())
    ranks[1].wait("local")


def test_a_discarded_save_is_refused_to_those_who_seal_it_later(jobs: RunJobs, ranks: list[Rank]) -> None:
    assert jobs.discard(SAVE, "node 1 is out of memory")
    with pytest.raises(SaveFailedError, match="node 1 is out of memory"):
        ranks[0].seal()
    ranks[0].seal("0123456789ab-2")
    assert jobs.discard("0123456789ab-2", "rank 3 was lost")
    assert ranks[1].wait("failed").data["message"] == "rank 3 was lost"


def test_completing_what_is_not_here_is_an_error(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[0].seal()
    ranks[1].seal()
    ranks[0].wait("local")
    tier = jobs._tier
    [save] = tier.saves("run")
    root = tier.root_manifest("run", save).encode()
    jobs.complete(SAVE, root)  # again is fine
    with pytest.raises(CheckpointNotFoundError):
        jobs.complete("0123456789ab-9", root)


def test_a_rank_that_takes_over_a_slot_drops_what_the_old_one_was_copying(jobs: RunJobs, ranks: list[Rank]) -> None:
    ranks[0].seal()
    ranks[1].reserve()
    memory = ranks[1].attachment.slot.generations[0].memory
    ranks[1].attachment.is_gone = _never
    newer = Rank(jobs, 1)
    assert ranks[0].wait("failed").data["rank"] == 1
    assert newer.attachment.slot.generations[0].memory is not memory, "the old owner may still be writing there"


_never: Callable[[], bool] = lambda: False  # noqa: E731
