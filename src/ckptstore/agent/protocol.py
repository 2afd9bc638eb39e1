"""The words between a trainer and its node agent.

A message is a 4-byte big-endian length and that many bytes of JSON, over a unix stream socket::

    {"id": 7, "op": "seal", ...}                request
    {"id": 7, "ok": {...}}                      its answer
    {"id": 7, "error": {"class": ...}}          or its error
    {"event": {...}}                            pushed by the agent

Descriptors travel with the length of the answer that lends them. The first request is ``hello``; it and ``leave`` keep
their form in every protocol, so that a newer trainer can ask an idle older agent to make room.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ckptstore import errors
from ckptstore.errors import CkptError, FormatError, StorageError
from ckptstore.format.manifest import Json, Summary, canonical, strong_digest
from ckptstore.format.stock import PieceSpec

PROTOCOL = 1
"""Raised with every change that an older peer would misunderstand."""

MAX_MESSAGE_BYTES = 256 << 20
MAX_FDS = 8

_LENGTH = struct.Struct(">I")

EventKind = Literal["sealed", "announced", "prepared", "local", "remote", "skipped", "failed", "left_out", "lost"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a save, or to the agent's connection. What ``data`` holds depends on the kind:

    - ``sealed``: all local ranks of the save are sealed.
    - ``announced``: a rank of this node said so to all of them: ``level``.
    - ``prepared``: this node's part is durable, of several: ``shards``, its shard manifests.
    - ``local``: the save is committed on this node: ``summary``.
    - ``remote``: it is committed in a remote: ``remote`` (its name), ``summary``, ``stored_bytes`` that it added there,
      ``sent_bytes`` over the wire; for people ``reused_bytes``, ``by_codec``, ``rests_on``, ``encode_seconds``.
    - ``skipped``: by policy it is never sent to a remote: ``remote`` (its name), ``reason``.
    - ``failed``: it won't reach ``level`` (for ``remote``: not soon, it stays queued): ``error`` (class name),
      ``message``, ``hint``, and the error's context, such as ``rank``, ``errno``, ``remote``. See :meth:`exception`.
    - ``left_out``: with ``back_pressure="skip"``, it was not taken; trainers know, and only metrics hear of it.
    - ``lost``: the connection to the agent is gone. No save_id.
    """

    kind: EventKind
    save_id: str = ""
    step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def exception(self) -> CkptError:
        """A failure as the error it was."""
        told = {"level", "error", "message", "hint"}
        context = {key: value for key, value in self.data.items() if key not in told}
        return error_from_wire({**self.data, "class": self.data.get("error"), "context": context})

    def to_wire(self) -> Json:
        return {"kind": self.kind, "save_id": self.save_id, "step": self.step, "data": dict(self.data)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Event:
        return cls(wire["kind"], wire["save_id"], wire["step"], wire["data"])

    @classmethod
    def failure(cls, error: CkptError, *, save_id: str, step: int | None, level: str, **more: Any) -> Event:
        """The event that tells of ``error``."""
        wire = error_to_wire(error)
        data = {**wire["context"], **more, "level": level, "error": wire["class"]}
        return cls("failed", save_id, step, {**data, "message": wire["message"], "hint": wire["hint"]})


@dataclass(frozen=True)
class SealRequest:
    """What a rank says with its seal: "my part of this save is in the generation, whole".

    Attributes:
        local_ranks: global ranks whose parts this agent gathers, this one among them; slot i is the i-th of them.
        layout_id: of the arena the bytes were copied into.
        summary, tree, aliases: rank 0's.
        per_rank: encoded tree of this rank's own values.
        spans: seconds this rank spent on the save, by stage, and under ``slow_path`` why binding took long, if so; kept
            for `ckptctl show --timing`.
    """

    save_id: str
    step: int
    rank: int
    world_size: int
    node: int
    num_nodes: int
    local_ranks: tuple[int, ...]
    layout_id: str
    summary: Summary | None = None
    tree: Json | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    per_rank: Json | None = None
    spans: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> Json:
        wire = {f.name: getattr(self, f.name) for f in fields(self)}
        wire["summary"] = None if self.summary is None else self.summary.model_dump(mode="json")
        wire["aliases"] = dict(self.aliases)
        wire["spans"] = dict(self.spans)
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> SealRequest:
        values = {f.name: wire[f.name] for f in fields(cls)}
        if values["summary"] is not None:
            values["summary"] = Summary.model_validate(values["summary"])
        values["local_ranks"] = tuple(values["local_ranks"])
        return cls(**values)


def pieces_to_wire(pieces: Sequence[PieceSpec]) -> list[list[Any]]:
    return [[p.fqn, p.dtype, list(p.global_shape), list(p.offsets), list(p.shape), p.requires_grad] for p in pieces]


def pieces_from_wire(wire: Sequence[Sequence[Any]]) -> tuple[PieceSpec, ...]:
    return tuple(
        PieceSpec(fqn, dtype, tuple(global_shape), tuple(offsets), tuple(shape), requires_grad)
        for fqn, dtype, global_shape, offsets, shape, requires_grad in wire
    )


def layout_id_of(pieces: Sequence[PieceSpec]) -> str:
    """Names a layout: equal pieces in equal order have the same."""
    return strong_digest(canonical(pieces_to_wire(pieces)))[:32]


def error_to_wire(error: BaseException) -> Json:
    """Class name, message, hint and plain context of an error; a foreign one becomes a StorageError."""
    if not isinstance(error, CkptError):
        return {
            "class": "StorageError",
            "message": f"unexpected {type(error).__name__} in the node agent: {error}",
            "hint": "`ckptctl agent logs` has the details",
            "context": {},
        }
    context = {k: v for k, v in error.context.items() if v is None or isinstance(v, (str, int, float, bool))}
    return {"class": type(error).__name__, "message": error.message, "hint": error.hint, "context": context}


def error_from_wire(wire: Mapping[str, Any]) -> CkptError:
    """Inverse of :func:`error_to_wire`; a class this version doesn't know becomes a StorageError."""
    cls = getattr(errors, str(wire.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, CkptError)):
        cls = StorageError
    return cls(str(wire.get("message", "")), hint=wire.get("hint"), **dict(wire.get("context") or {}))


class Channel:
    """One end of the socket. One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket, *, accept_fds: bool) -> None:
        self._sock = sock
        self._accept_fds = accept_fds
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Json, fds: Sequence[int] = ()) -> None:
        """Send one message, and lend descriptors with it. Blocks while the peer doesn't read.

        Raises:
            FormatError: not JSON, or larger than a message may be; nothing was sent.
            OSError: the connection is gone.
        """
        try:
            body = json.dumps(message, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"a message that is not JSON: {error}") from None
        if len(body) > MAX_MESSAGE_BYTES:
            raise FormatError(f"{len(body)} bytes are too many for a message to the node agent")
        with self._send_lock:
            if fds:
                socket.send_fds(self._sock, [_LENGTH.pack(len(body))], list(fds))
                self._sock.sendall(body)
            else:
                self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> tuple[Json, list[int]] | None:
        """The next message and the descriptors lent with it, which are the caller's to close; None at the end.

        Raises:
            FormatError: not a message of ours.
            OSError: the connection is gone.
        """
        head, fds = self._receive_length()
        try:
            if head is None:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > MAX_MESSAGE_BYTES:
                raise FormatError(f"the peer announced a message of {length} bytes")
            body = bytearray(length)
            view = memoryview(body)
            while view:
                got = self._sock.recv_into(view)
                if not got:
                    raise ConnectionResetError("the connection was cut within a message")
                view = view[got:]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"a message of the peer is not JSON: {error}") from None
            if not isinstance(message, dict):
                raise FormatError("a message of the peer is not an object")
        except BaseException:
            close_fds(fds)
            raise
        return message, fds

    def _receive_length(self) -> tuple[bytes | None, list[int]]:
        head = b""
        fds: list[int] = []
        while len(head) < _LENGTH.size:
            if self._accept_fds:
                part, lent = _receive_with_fds(self._sock, _LENGTH.size - len(head))
                fds += lent
            else:
                part = self._sock.recv(_LENGTH.size - len(head))
            if not part:
                if head:
                    close_fds(fds)
                    raise ConnectionResetError("the connection was cut within a message")
                return None, fds
            head += part
        return head, fds

    def shutdown(self) -> None:
        """End the connection for both sides; a blocked :meth:`receive` returns. Idempotent."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back. Only the thread that receives, or nobody, may be using it."""
        self._sock.close()


def _receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """At most ``size`` bytes and the descriptors sent with them, none of which a fork and exec elsewhere inherits.

    ``socket.recv_fds`` takes flags and ignores them.
    """
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    data, ancillary, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(MAX_FDS * array("i").itemsize), flags)
    fds = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def is_same_tree(one: Any, other: Any) -> bool:
    """Whether two encoded state trees are the same to the last type and order, which ``==`` does not tell.

    Parts that are one object in both, such as long runs of names, are not looked at.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(a == b and is_same_tree(x, y) for (a, x), (b, y) in pairs)
    if type(one) is list:
        return len(one) == len(other) and all(map(is_same_tree, one, other))
    return repr(one) == repr(other)
