"""What one node's leader tells the others, and what it makes of what they tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ckptstore.errors import StorageError, TransientError
from ckptstore.store import relay as module
from ckptstore.store.relay import NodeRelay

SAVE = "0123456789ab-1"
WAIT_S = 60


class Board:
    """The job's store."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.is_gone = False
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self.words[key] = value

    def get(self, key: str) -> bytes:
        return self.words[key].encode()

    def check(self, keys: list[str]) -> bool:
        if self.is_gone:
            raise RuntimeError("connection reset")
        return all(key in self.words for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self._lock:
            return self.words.setdefault(key, desired).encode() if not expected else b""


class Node:
    """One with its leader, whose agent can be made to fail."""

    def __init__(self, board: Board, number: int, deadline_s: float) -> None:
        self.trouble: Exception | None = None
        self.said: list[tuple[str, ...]] = []
        self.ended: list[str | None] = []
        self.is_over = threading.Event()
        self.relay = NodeRelay(
            board, self._agent, self._end, job="job", node=number, num_nodes=2, deadline_s=deadline_s
        )  # fmt: skip
        self.relay._root = lambda save_id: b"root"
        self.relay.watch(SAVE)

    def _agent(self) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return self

    def _end(self, save_id: str, failure: str | None) -> None:
        self.ended.append(failure)
        self.is_over.set()

    def announce(self, save_id: str, level: str, failure: str | None = None) -> None:
        self.said.append((level,) if failure is None else (level, failure))

    def complete(self, save_id: str, root: bytes) -> None:
        self.said.append(("complete", root.decode()))
        self.relay.local(save_id)

    def discard(self, save_id: str, reason: str) -> bool:
        self.said.append(("discard", reason))
        return True

    def result(self) -> str | None:
        assert self.is_over.wait(WAIT_S)
        return self.ended[-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def nodes(board: Board) -> Iterator[Callable[[float], list[Node]]]:
    made: list[Node] = []

    def make(deadline_s: float) -> list[Node]:
        made.extend(Node(board, number, deadline_s) for number in range(2))
        return made

    yield make
    for node in made:
        node.relay.close()


def prepare(node: Node) -> None:
    node.relay.sealed(SAVE)
    node.relay.prepared(SAVE, [])


def test_a_save_is_local_when_every_node_has_marked_it(nodes: Callable[[float], list[Node]]) -> None:
    both = nodes(WAIT_S)
    for node in both:
        prepare(node)
    assert [node.result() for node in both] == [None, None]
    for node in both:
        assert [said for said in node.said if said != ("staged",)] == [("complete", "root"), ("local",)]


def test_a_save_that_all_have_prepared_is_finished_by_the_next_agent(nodes: Callable[[float], list[Node]]) -> None:
    first, second = nodes(WAIT_S)
    second.trouble = TransientError("the agent was killed")
    prepare(first)
    prepare(second)
    while ("complete", "root") not in first.said:
        pass
    second.relay.failed(SAVE, "too late to be dropped")
    second.trouble = None
    assert [first.result(), second.result()] == [None, None]
    assert not [said for node in (first, second) for said in node.said if said[0] == "discard"]


@pytest.mark.parametrize("trouble", [TransientError("no agent"), StorageError("disk full")])
def test_nobody_waits_for_ever_for_a_node_that_can_not_mark_it(
    nodes: Callable[[float], list[Node]], trouble: Exception
) -> None:
    first, second = nodes(0.2)
    second.trouble = trouble
    prepare(first)
    prepare(second)
    assert first.result() == "node 1 did not mark it complete; the next start does"
    assert first.said[-1] == ("local", "node 1 did not mark it complete; the next start does")
    assert second.result() == f"this node's agent could not finish it: {trouble}"
    assert not [said for node in (first, second) for said in node.said if said[0] == "discard"]


def test_a_save_is_dropped_on_all_nodes_when_one_has_failed(nodes: Callable[[float], list[Node]]) -> None:
    both = nodes(WAIT_S)
    prepare(both[0])
    both[1].relay.failed(SAVE, "rank 1: no space")
    assert [node.result() for node in both] == ["rank 1: no space"] * 2
    both[1].relay.close()
    both[0].relay.close()
    assert [node.said[-1] for node in both] == [("discard", "rank 1: no space")] * 2


def test_a_node_that_has_not_sealed_in_time_is_named(nodes: Callable[[float], list[Node]]) -> None:
    first, second = nodes(0.2)
    first.relay.sealed(SAVE)
    assert first.result() == second.result() == "node 1 has not sealed its part within 0 s"


def test_a_save_fails_when_the_jobs_store_is_gone_before_it_is_marked(
    nodes: Callable[[float], list[Node]], board: Board
) -> None:
    first, _ = nodes(WAIT_S)
    board.is_gone = True
    assert "the job's store is gone" in str(first.result())
