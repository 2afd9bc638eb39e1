"""When `handle.remote` resolves, as word of several remotes comes in."""

from __future__ import annotations

import pytest

from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.errors import CredentialsError, NoSpaceError, SaveFailedError
from ckptstore.store.handle import SaveHandle
from ckptstore.types import CheckpointInfo

INFO = CheckpointInfo(run="r", step=1, save_id="0123456789ab-1", created_at=SYSTEM_CLOCK.now())


def handle(quorum: int | None, *names: str) -> SaveHandle:
    made = SaveHandle(INFO, names, quorum)
    made.reach("local")
    return made


def test_remote_resolves_when_the_quorum_holds_it_though_others_pass_it_over() -> None:
    one = handle(2, "a", "b", "c")
    one.pass_over("a")
    assert one.remotes["a"].result(0).skipped
    assert not one.done("remote")
    one.reach("remote", "b")
    one.reach("remote", "c")
    assert not one.remote.result(0).skipped
    assert one.remote.result(0).tiers == {"local": "complete", "b": "complete", "c": "complete"}


def test_remote_resolves_as_skipped_when_the_quorum_can_not_be_reached_any_more() -> None:
    one = handle(None, "a", "b")
    one.reach("remote", "a")
    one.pass_over("b")
    info = one.remote.result(0)
    assert info.skipped
    assert info.tiers == {"local": "complete", "a": "complete"}
    one.pass_over("b")
    one.pass_over("unknown")
    assert one.failure() is None


def test_remote_fails_when_one_refuses_and_all_are_needed() -> None:
    one = handle(None, "a", "b")
    one.fail(CredentialsError("no"), "remote", "a")
    with pytest.raises(SaveFailedError):
        one.remote.result(0)
    one.reach("remote", "b")
    assert one.remotes["b"].result(0).tiers["b"] == "complete"


def test_nothing_is_waited_for_when_writing_failed_before_all_was_known_to_be_staged() -> None:
    one = SaveHandle(INFO, ("a",), None)
    assert one.fail(NoSpaceError("full"), "local")
    assert all(one.done(level) for level in ("staged", "local", "remote"))
