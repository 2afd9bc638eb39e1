"""What a rank makes of an agent that is lost, whenever the word of it comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ckptstore.agent.client import AgentClient
from ckptstore.agent.protocol import Event
from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.config import StoreConfig
from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import SaveFailedError, StorageError, TransientError
from ckptstore.store import link as module
from ckptstore.store.handle import SaveHandle
from ckptstore.store.link import AgentLink
from ckptstore.types import CheckpointInfo


class Agent:
    """A connection, and what comes over it."""

    agent_id = "one"

    def __init__(self, on_event: Any) -> None:
        self.hear = on_event
        self.is_lost = False


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[Agent]:
    """All that were connected to so far."""
    made: list[Agent] = []

    def connect(*_: object, on_event: Any, **__: object) -> Agent:
        made.append(Agent(on_event))
        return made[-1]

    monkeypatch.setattr(AgentClient, "connect", connect)
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.01)
    return made


def linked(root: Path, remotes: Mapping[str, str] | None = None, committed: Any = dict) -> AgentLink:
    link = AgentLink(root, run="r", rank=0, remotes=remotes or {}, config=StoreConfig(), committed=committed)
    link.reconnect()
    return link


def follow(link: AgentLink, step: int) -> SaveHandle:
    info = CheckpointInfo(run="r", step=step, save_id=f"0123456789ab-{step}", created_at=SYSTEM_CLOCK.now())
    handle = SaveHandle(info, link._remotes, None)
    link.remember(handle)
    return handle


def states(link: AgentLink, **by_step: str) -> Any:
    """The local tier holds these saves."""
    found = {f"0123456789ab-{step.removeprefix('s')}": state for step, state in by_step.items()}
    return mock.patch.object(link, "_local_states", return_value=found)


def test_late_word_of_a_lost_agent_harms_nothing_of_the_next(tmp_path: Path, agents: list[Agent]) -> None:
    link = linked(tmp_path)
    before = follow(link, 1)
    agents[0].is_lost = True
    link.reconnect()
    after = follow(link, 2)
    agents[0].hear(Event("lost"))
    assert isinstance(before.failure(), SaveFailedError)
    assert not after.done("staged")
    assert link.client is agents[1]


def test_an_agent_that_was_lost_while_it_was_connected_to_is_replaced(tmp_path: Path, agents: list[Agent]) -> None:
    link = linked(tmp_path)
    agents[0].is_lost = True
    link.reconnect()
    link.reconnect()
    assert len(agents) == 2


def test_ranks_are_told_together_when_an_agent_ends_before_they_have_met(tmp_path: Path, agents: list[Agent]) -> None:
    link = linked(tmp_path)
    agents[0].is_lost = True
    agents[0].hear(Event("lost"))
    with pytest.raises(TransientError, match="rank 0"):
        link.meet(Agreement.alone(), job="job")
    assert not link.has_met
    link.reconnect()
    link.meet(Agreement.alone(), job="job")
    assert link.has_met


def test_what_an_agent_could_not_tell_is_found_out_from_the_tiers(tmp_path: Path, agents: list[Agent]) -> None:
    there: dict[str, set[str]] = {"s3": set()}
    link = linked(tmp_path, {"s3": "s3://b/p"}, lambda: there)
    uploaded, waiting, gone, prepared = (follow(link, step) for step in (1, 2, 3, 4))
    for handle in (uploaded, waiting, gone):
        handle.reach("local")
    with states(link, s1="complete", s2="complete", s4="prepared"):
        agents[0].is_lost = True
        agents[0].hear(Event("lost"))
        link.reconnect()  # by the next save, say, and not by whoever waits
        there["s3"].add(uploaded.save_id)
        assert not prepared.done("local"), "the other nodes may be prepared as well"
        with pytest.raises(SaveFailedError):
            link._follow(gone, "remote", float("inf"))
        assert link._follow(uploaded, "remote", float("inf")).step == 1
        assert not waiting.done("remote")
    with states(link, s4="complete"):
        assert link._follow(prepared, "local", float("inf")).step == 4


def test_a_wait_ends_with_the_reason_when_there_can_be_no_other_agent(
    tmp_path: Path, agents: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = linked(tmp_path, {"s3": "s3://b/p"})
    waiting = follow(link, 1)
    waiting.reach("local")
    agents[0].is_lost = True
    agents[0].hear(Event("lost"))
    refuse = mock.Mock(side_effect=[TransientError("not yet"), StorageError("the root is read-only")])
    monkeypatch.setattr(AgentClient, "connect", refuse)
    with pytest.raises(SaveFailedError, match="the root is read-only"):
        link.wait("remote", None)
    assert refuse.call_count == 2
