"""The upload queue of one remote, in this process: what is pending, what is told, what is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptstore.agent import trouble
from ckptstore.agent.line import RemoteLine
from ckptstore.agent.protocol import Event
from ckptstore.agent.uploader import Uploader
from ckptstore.blob import open_blob_store
from ckptstore.clock import SYSTEM_CLOCK, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError, CredentialsError, TransientError
from ckptstore.format.manifest import Parent, RootManifest
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.testing.checkpoints import write_checkpoint

Start = Callable[..., tuple[Uploader, list[Event]]]


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


@pytest.fixture
def start(tier: LocalTier) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(url: str, config: StoreConfig | None = None) -> tuple[Uploader, list[Event]]:
            events: list[Event] = []
            roots: list[RootManifest] = []
            settings = config or StoreConfig()
            made = Uploader(
                tier, "default", "r", url, {"TOKEN": "s3cr3t"}, settings, events.append, roots.append, SYSTEM_CLOCK
            )
            stack.callback(made.join, 10)
            stack.callback(made.stop)
            return made, events

        yield begin


def save(tier: LocalTier, step: int) -> Path:
    rng = np.random.default_rng(step)
    return write_checkpoint(tier, {"w": rng.normal(size=(64, 64)).astype("float32")}, step=step)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_on(url: str) -> list[int]:
    return [s.step for s in RemoteTier(open_blob_store(url), "default", "r").saves()]


def test_what_the_remote_lacks_is_sent_newest_first_and_nothing_else(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    save(tier, 8)
    first, _ = start(url)
    until(first.is_settled)
    for step in (9, 10, 100):
        save(tier, step)
    second, events = start(url)  # knows nothing of what the first one did
    until(second.is_settled)
    assert [(e.kind, e.step) for e in events] == [("remote", 100), ("remote", 10), ("remote", 9)]
    assert steps_on(url) == [8, 9, 10, 100]
    assert second.describe()["last_remote"]["step"] == 100


def test_a_new_save_is_noticed_when_told(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    tier.create()
    made, events = start(url)
    until(made.is_settled)
    save(tier, 1)
    made.notify()
    until(lambda: events)
    assert made.has_work() is False
    assert steps_on(url) == [1]


def test_nothing_is_asked_of_a_remote_when_there_is_nothing_to_send(tier: LocalTier, start: Start) -> None:
    made, events = start("nope://x")
    until(made.is_settled)
    assert not made.has_work()
    assert events == []


def test_a_refusal_is_told_once_per_save_and_is_no_reason_to_stay(
    tier: LocalTier, start: Start, tmp_path: Path
) -> None:
    save(tier, 1)
    made, events = start(f"file://{tmp_path}/missing/store")
    until(lambda: events)
    until(lambda: not made.has_work())
    save(tier, 2)
    made.notify()
    until(lambda: len(events) == 2)
    time.sleep(0.1)
    assert [(e.step, e.data["error"], e.data["level"], e.data["remote"]) for e in events] == [
        (1, "NoStoreError", "remote", "r"),
        (2, "NoStoreError", "remote", "r"),
    ]
    assert not made.is_settled()
    (tmp_path / "missing").mkdir()
    made.refresh({"TOKEN": "s3cr3t"}, StoreConfig())
    until(made.is_settled)
    assert [e.kind for e in events] == ["failed", "failed", "remote", "remote"]
    assert "s3cr3t" not in repr(made.describe())


def test_a_damaged_save_does_not_hold_up_the_others(tier: LocalTier, start: Start) -> None:
    save(tier, 1)
    bad = save(tier, 2)
    shard = bad / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    url = f"mem://{new_nonce()}"
    made, events = start(url)
    until(lambda: len(events) == 2)
    assert [(e.kind, e.step) for e in events] == [("failed", 2), ("remote", 1)]
    assert events[0].data["error"] == "IntegrityError"
    assert not made.is_settled()
    assert not made.has_work()
    assert steps_on(url) == [1]


@pytest.mark.parametrize("failures", range(1, 12))
def test_pauses_grow_to_a_bound_and_keep_to_what_the_server_asked(failures: int) -> None:
    for _ in range(50):
        pause = trouble.Trouble(failures=failures - 1).note(TransientError("x"), 0.0, has_news=False)
        assert 0.5 <= pause <= trouble.MAX_PAUSE_SECONDS
        assert pause <= 2 ** (failures - 1)
    asked = TransientError("x", retry_after_s=77.0)
    assert trouble.Trouble(failures=failures - 1).note(asked, 0.0, has_news=False) >= 77.0


def test_work_goes_on_after_a_transient_failure(tier: LocalTier, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore.repo import remote

    failures = [TransientError("away", reason="unreachable") for _ in range(2)]
    genuine = remote.RemoteTier.saves

    def saves(self: RemoteTier) -> Any:
        if failures:
            raise failures.pop()
        return genuine(self)

    monkeypatch.setattr(remote.RemoteTier, "saves", saves)
    monkeypatch.setattr(trouble, "MAX_PAUSE_SECONDS", 0.05)
    url = f"mem://{new_nonce()}"
    save(tier, 1)
    made, events = start(url)
    until(made.is_settled)
    assert [e.kind for e in events] == ["remote"], "an outage is not a failure"
    until(lambda: made.describe()["error"] is None)


def test_a_refusal_while_new_credentials_arrive_does_not_pause(
    tier: LocalTier, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptstore.repo import remote

    genuine = remote.RemoteTier.saves
    hold: dict[str, Any] = {"made": None, "count": 0}

    def saves(self: RemoteTier) -> Any:
        hold["count"] += 1
        if hold["count"] == 1:
            until(lambda: hold["made"] is not None)
            hold["made"].refresh({"TOKEN": "new"}, StoreConfig())
            raise CredentialsError("the old token")
        return genuine(self)

    monkeypatch.setattr(remote.RemoteTier, "saves", saves)
    save(tier, 1)
    hold["made"], events = start(f"mem://{new_nonce()}")
    until(hold["made"].is_settled)
    assert "remote" in [e.kind for e in events]


def test_a_bad_url_is_an_error_of_each_save(tier: LocalTier, start: Start) -> None:
    save(tier, 1)
    _, events = start("nope://x")
    until(lambda: events)
    assert isinstance(events[0].exception(), ConfigError)


def told(events: list[Event]) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in events]


NONCE = new_nonce()


def save_of(tier: LocalTier, step: int, rows: int = 64, **options: Any) -> Path:
    """A save of one job."""
    state = {"w": np.random.default_rng(step).normal(size=(rows, 64)).astype("float32")}
    return write_checkpoint(tier, state, step=step, save_id=f"{NONCE}-{step}", **options)


def test_old_saves_are_skipped_when_the_backlog_is_bounded(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    for step in range(1, 6):
        save_of(tier, step)
    tier.pin("default", f"{NONCE}-2")
    made, events = start(url, StoreConfig(upload_backlog=2))
    until(made.is_settled)
    assert told(events) == [("skipped", 1), ("skipped", 3), ("remote", 5), ("remote", 4), ("remote", 2)]
    assert made.describe()["skipped"] == 2
    assert steps_on(url) == [2, 4, 5]
    again, events = start(url, StoreConfig(upload_backlog=2))
    until(again.is_settled)
    assert told(events) == [("skipped", 1), ("skipped", 3)], "a new agent leaves out the same"
    made.refresh({}, StoreConfig())
    until(lambda: steps_on(url) == [1, 2, 3, 4, 5])


def test_superseded_saves_are_skipped_when_told(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    for step in (1, 2, 3):
        save_of(tier, step)
    parent = Parent(save_id=f"{NONCE}-1", timeline=1, step=1)
    write_checkpoint(tier, {"w": np.zeros(3, "float32")}, step=2, timeline=2, parent=parent)
    made, events = start(url, StoreConfig(upload_superseded=False))
    until(made.is_settled)
    assert sorted(told(events)) == [("remote", 1), ("remote", 2), ("skipped", 2), ("skipped", 3)]
    everything, events = start(f"mem://{new_nonce()}")
    until(everything.is_settled)
    assert {kind for kind, _ in told(events)} == {"remote"}


def test_rate_and_time_left_are_told_when_capped(tier: LocalTier, start: Start) -> None:
    save_of(tier, 1, rows=24_000)  # 6 MB
    began = time.monotonic()
    made, _ = start(f"mem://{new_nonce()}", StoreConfig(upload_bytes_per_s=2e6))
    until(lambda: (made.describe()["eta_seconds"] or 0) > 0.5)
    seen = made.describe()
    assert seen["cap_bytes_per_s"] == 2e6
    assert seen["queue"][0]["plain_total_bytes"] == 6_144_000
    until(made.is_settled)
    assert 1.0 < time.monotonic() - began < 20
    assert made.describe()["rate_bytes_per_s"] < 6e6
    assert made.describe()["eta_seconds"] == 0


def test_the_cap_of_the_hour_is_in_force_when_there_is_a_schedule(tier: LocalTier, start: Start) -> None:
    """And the next attachment's schedule takes over in the middle of an upload."""
    save_of(tier, 1, rows=120_000)  # 30 MB
    made, events = start(f"mem://{new_nonce()}", StoreConfig(upload_schedule=(("00:00", 1e6),)))
    until(lambda: [one["state"] for one in made.describe()["queue"]] == ["uploading"])
    assert made.describe()["cap_bytes_per_s"] == 1e6
    assert not events
    made.refresh({}, StoreConfig(upload_schedule=(("00:00", None),)))
    until(made.is_settled)
    assert made.describe()["cap_bytes_per_s"] is None
    assert told(events) == [("remote", 1)]


def test_what_can_be_finished_goes_first_when_time_is_short(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    save_of(tier, 1, rows=16_000)  # 4 MB: teaches the pace
    made, events = start(url, StoreConfig(upload_bytes_per_s=2e6))
    until(made.is_settled)
    made.hurry(time.monotonic() + 8)
    save_of(tier, 2)
    save_of(tier, 3, rows=120_000)  # 30 MB: never in 8 s
    made.notify()
    until(lambda: len(events) == 2)
    assert told(events) == [("remote", 1), ("remote", 2)]
    assert made.describe()["queue"][0]["step"] == 3, "the newest is worked on with what time is left"


def test_a_save_that_can_not_be_finished_gives_way_when_time_becomes_short(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    save_of(tier, 1)
    save_of(tier, 2, rows=120_000)
    made, events = start(url, StoreConfig(upload_bytes_per_s=3e6))
    until(lambda: (made.describe()["eta_seconds"] or 0) > 2)
    assert events == []
    made.hurry(time.monotonic() + 4)
    until(lambda: events)
    assert told(events) == [("remote", 1)]


def test_what_the_remotes_retention_has_dropped_is_not_sent_again(tier: LocalTier, start: Start) -> None:
    url = f"mem://{new_nonce()}"
    for step in (1, 2, 3, 4):
        save_of(tier, step)
    first, _ = start(url)
    until(first.is_settled)
    remote = RemoteTier(open_blob_store(url), "default", "r")
    for old in remote.saves()[:2]:
        remote.delete(old)
    save_of(tier, 5)
    again, events = start(url)  # a stricter retention that nobody has told us of: the remote should have them
    until(again.is_settled)
    assert steps_on(url) == [1, 2, 3, 4, 5]
    for old in remote.saves()[:3]:
        remote.delete(old)
    rules = {"keep_last": 2, "keep_best": 0, "keep_every_steps": 0, "monitor": None, "mode": "min"}
    journal.append(tier, "default", "rules", [{"time": "2026-01-01T00:00:00Z", "local": rules, "remote": rules}])
    save_of(tier, 6)
    tier.pin("default", next(s.save_id for s in tier.saves("default") if s.step == 2))
    third, events = start(url)
    until(third.is_settled)
    assert sorted((e.kind, e.step) for e in events) == [("remote", 2), ("remote", 6), ("skipped", 1), ("skipped", 3)]
    assert steps_on(url) == [2, 4, 5, 6], "what is pinned, and whatever is newer than the remote's newest, is sent"
    third.refresh({}, StoreConfig())
    until(third.is_settled)
    assert steps_on(url) == [2, 4, 5, 6]


def test_a_remote_that_is_away_for_too_long_is_no_reason_to_stay(
    tier: LocalTier, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: RemoteLine, config: StoreConfig) -> None:
        raise TransientError("nobody answers")

    monkeypatch.setattr(RemoteLine, "remote", away)
    save(tier, 1)
    patient, _ = start("mem://x", StoreConfig(upload_give_up_seconds=3600))
    until(lambda: patient.describe()["error"])
    assert patient.has_work()
    brief, _ = start("mem://x", StoreConfig(upload_give_up_seconds=0.01))
    until(lambda: brief.describe()["error"])
    until(lambda: not brief.has_work())
    assert brief.pending() == 1
    assert not brief.is_settled()
