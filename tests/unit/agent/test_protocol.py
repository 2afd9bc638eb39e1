"""Messages, events, seals and errors survive the wire; what isn't ours is refused."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore import errors
from ckptstore.agent import protocol
from ckptstore.agent.protocol import (
    Channel,
    Event,
    SealRequest,
    error_from_wire,
    error_to_wire,
    layout_id_of,
    pieces_from_wire,
    pieces_to_wire,
)
from ckptstore.errors import CkptError, FormatError, NoSpaceError, StorageError
from ckptstore.format.manifest import Summary
from ckptstore.format.stock import PieceSpec

Pair = tuple[Channel, Channel]

leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
json_values = st.recursive(leaves, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=10)
shapes = st.lists(st.integers(0, 1000), max_size=4).map(tuple)
specs = st.builds(PieceSpec, st.text(), st.sampled_from(["float32", "int8"]), shapes, shapes, shapes, st.booleans())


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    channels = Channel(left, accept_fds=False), Channel(right, accept_fds=True)
    yield channels
    for channel in channels:
        channel.close()


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"a": [1, "x"]}, {"a": [1, "x"]}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 0.0}, {"a": -0.0}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ({"a": None}, None, False),
    ],
)
def test_trees_are_the_same_only_to_the_last_type_and_order(one: Any, other: Any, is_same: bool) -> None:
    assert protocol.is_same_tree(one, other) is is_same
    assert protocol.is_same_tree(other, one) is is_same


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_message_arrives_as_it_was_sent(message: dict[str, object]) -> None:
    left, right = socket.socketpair()
    with left, right:
        Channel(left, accept_fds=False).send(message)
        assert Channel(right, accept_fds=True).receive() == (message, [])


def test_messages_larger_than_the_socket_buffer_arrive_whole(pair: Pair) -> None:
    message = {"x": "ü" * 3_000_000}
    sender = threading.Thread(target=pair[0].send, args=(message,))
    sender.start()
    assert pair[1].receive() == (message, [])
    sender.join()


def test_descriptors_arrive_with_their_message_and_are_not_inheritable(pair: Pair) -> None:
    fds = [os.memfd_create(name) for name in ("a", "b")]
    os.write(fds[1], b"hello")
    pair[0].send({"before": 1})
    pair[0].send({"lent": 2}, fds)
    pair[0].send({"after": 3})
    assert pair[1].receive() == ({"before": 1}, [])
    received = pair[1].receive()
    assert received is not None
    message, lent = received
    assert message == {"lent": 2}
    assert os.pread(lent[1], 5, 0) == b"hello"
    assert not any(os.get_inheritable(fd) for fd in lent)
    assert pair[1].receive() == ({"after": 3}, [])
    for fd in [*fds, *lent]:
        os.close(fd)


def test_the_end_of_the_connection_is_none_when_between_messages(pair: Pair) -> None:
    pair[0].send({"last": 1})
    pair[0].shutdown()
    assert pair[1].receive() == ({"last": 1}, [])
    assert pair[1].receive() is None


@pytest.mark.parametrize("cut", [b"\0\0", b"\0\0\0\5{}"])
def test_a_cut_within_a_message_is_an_error(cut: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(cut)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            Channel(right, accept_fds=True).receive()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", protocol.MAX_MESSAGE_BYTES + 1),
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 1) + b"{",
        struct.pack(">I", 200_000) + b"[" * 200_000,
    ],
)
def test_what_is_not_a_message_is_refused(data: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        with pytest.raises(FormatError):
            Channel(right, accept_fds=True).receive()


def test_a_message_too_large_is_refused_before_it_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(FormatError, match="too many"):
        pair[0].send({"x": "y" * 100})
    with pytest.raises(FormatError, match="not JSON"):
        pair[0].send({"x": float("nan")})
    pair[0].send({"small": 1})
    assert pair[1].receive() == ({"small": 1}, [])


@pytest.mark.parametrize("name", [n for n in dir(errors) if isinstance(getattr(errors, n), type)])
def test_every_error_keeps_its_class_and_context(name: str) -> None:
    cls = getattr(errors, name)
    if not issubclass(cls, CkptError):
        return
    error = cls("it failed", hint="do this", rank=3, errno="EIO", thing=object())
    back = error_from_wire(error_to_wire(error))
    assert (type(back), back.message, back.hint, back.context) == (
        cls,
        "it failed",
        "do this",
        {"rank": 3, "errno": "EIO"},
    )


def test_a_foreign_error_becomes_a_storage_error_without_internals() -> None:
    assert type(error_from_wire(error_to_wire(ZeroDivisionError("x")))) is StorageError
    assert type(error_from_wire({"class": "SystemExit", "message": "x"})) is StorageError


def test_an_event_keeps_its_failure() -> None:
    error = NoSpaceError("no space", errno="ENOSPC", rank=1)
    event = Event.from_wire(Event.failure(error, save_id="a-1", step=3, level="local", remote="s3").to_wire())
    assert (event.kind, event.save_id, event.step) == ("failed", "a-1", 3)
    assert event.data["level"] == "local"
    back = event.exception()
    assert type(back) is NoSpaceError
    assert back.context == {"errno": "ENOSPC", "rank": 1, "remote": "s3"}


def test_a_seal_survives_the_wire() -> None:
    summary = Summary(
        run="r", save_id="0123456789ab-1", timeline=1, step=3, created_at="2026-01-01T00:00:00.000Z", job="j",
        world_size=2, metrics={"loss": 0.5, "x": "nan"},
    )  # fmt: skip
    seal = SealRequest("0123456789ab-1", 3, 0, 2, 0, 1, (0, 1), "layout", summary, {"a": [1]}, {"b": "a"}, None)
    import json

    assert SealRequest.from_wire(json.loads(json.dumps(seal.to_wire()))) == seal


@given(st.lists(specs), st.lists(specs))
def test_layout_ids_are_equal_exactly_when_the_pieces_are(first: list[PieceSpec], second: list[PieceSpec]) -> None:
    import json

    assert list(pieces_from_wire(json.loads(json.dumps(pieces_to_wire(first))))) == first
    assert layout_id_of(first) == layout_id_of(list(first))
    assert (layout_id_of(first) == layout_id_of(second)) == (first == second)
