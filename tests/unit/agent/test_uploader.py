"""The upload queue of one remote, in this process: what is pending, what is told, what is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptstore.agent import uploader
from ckptstore.agent.protocol import Event
from ckptstore.agent.uploader import Uploader
from ckptstore.blob import open_blob_store
from ckptstore.clock import SYSTEM_CLOCK, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError, CredentialsError, TransientError
from ckptstore.format.manifest import RootManifest
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

        def begin(url: str) -> tuple[Uploader, list[Event]]:
            events: list[Event] = []
            roots: list[RootManifest] = []
            made = Uploader(
                tier, "default", "r", url, {"TOKEN": "s3cr3t"}, StoreConfig(), events.append, roots.append, SYSTEM_CLOCK
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
        pause = uploader._back_off(failures, TransientError("x"))
        assert 0.5 <= pause <= uploader.MAX_PAUSE_SECONDS
        assert pause <= 2 ** (failures - 1)
    assert uploader._back_off(failures, TransientError("x", retry_after_s=77.0)) >= 77.0


def test_work_goes_on_after_a_transient_failure(tier: LocalTier, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore.repo import remote

    failures = [TransientError("away", reason="unreachable") for _ in range(2)]
    genuine = remote.RemoteTier.saves

    def saves(self: RemoteTier) -> Any:
        if failures:
            raise failures.pop()
        return genuine(self)

    monkeypatch.setattr(remote.RemoteTier, "saves", saves)
    monkeypatch.setattr(uploader, "MAX_PAUSE_SECONDS", 0.05)
    url = f"mem://{new_nonce()}"
    save(tier, 1)
    made, events = start(url)
    until(made.is_settled)
    assert [e.kind for e in events] == ["remote"], "an outage is not a failure"
    assert made.describe()["error"] is None


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
