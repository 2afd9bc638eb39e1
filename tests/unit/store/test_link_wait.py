"""What a store that waits says while it waits, and when it gives up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytest

from ckptstore.agent.client import AgentClient
from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.config import StoreConfig
from ckptstore.errors import CredentialsError, SaveFailedError, SaveTimeoutError
from ckptstore.store import link as module
from ckptstore.store.handle import SaveHandle
from ckptstore.store.link import AgentLink
from ckptstore.types import CheckpointInfo


class Agent:
    """One that can't reach the bucket."""

    is_lost = False

    def status(self) -> dict[str, Any]:
        said = {"s3": {"error": {"message": "http://s3 can't be reached"}}, "oss": {"error": None}}
        return {"runs": {"r": {"remotes": said}}}


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentLink:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(module, "TELL_SECONDS", 0.0)
    made = AgentLink(tmp_path, run="r", rank=0, remotes={"s3": "s3://b/p"}, config=StoreConfig(), committed=dict)
    made._client = cast(AgentClient, Agent())
    return made


def follow(link: AgentLink, count: int) -> SaveHandle:
    info = CheckpointInfo(run="r", step=count, save_id=f"0123456789ab-{count}", created_at=SYSTEM_CLOCK.now())
    handle = SaveHandle(info, ("s3",), None)
    handle.reach("local")
    link.remember(handle)
    return handle


def test_a_long_wait_is_told_with_its_cause(link: AgentLink, caplog: pytest.LogCaptureFixture) -> None:
    follow(link, 7)
    with caplog.at_level(logging.INFO, "ckptstore"), pytest.raises(SaveTimeoutError) as late:
        link.wait("remote", 0.1)
    assert late.value.message == (
        "step 7 (save 0123456789ab-7) did not reach 'remote' within 0.1 s; s3: http://s3 can't be reached"
    )
    assert caplog.messages[0] == "waiting for step 7: remote; s3: http://s3 can't be reached"
    link.wait("local", 0.1)


def test_a_handle_tells_the_same_cause(link: AgentLink) -> None:
    handle = follow(link, 7)
    with pytest.raises(SaveTimeoutError) as late:
        handle.wait("remote", 0.1)
    with pytest.raises(SaveTimeoutError) as stores:
        link.wait("remote", 0.1)
    assert late.value.message == stores.value.message
    assert late.value.message.endswith("within 0.1 s; s3: http://s3 can't be reached")
    assert (late.value.context, late.value.hint) == (stores.value.context, stores.value.hint)
    with pytest.raises(SaveTimeoutError, match=r"within 0\.01 s \("):
        handle.wait("remote", 0.01)  # who waits in slices is not kept up by asking the agent
    link._client = None
    with pytest.raises(SaveTimeoutError, match=r"within 0\.1 s \("):
        handle.wait("remote", 0.1)


def test_a_failure_is_not_lost_while_another_save_is_late(link: AgentLink) -> None:
    follow(link, 1).fail(CredentialsError("no"), "remote", "s3")
    late = follow(link, 2)
    with pytest.raises(SaveTimeoutError):
        link.wait("remote", 0.05)
    late.reach("remote", "s3")
    with pytest.raises(SaveFailedError, match="step 1"):
        link.wait("remote", 0.05)
    link.wait("remote", 0.05)
