"""A proxy that breaks connections as planned, between a store and its real server.

It passes bytes on exactly as they came (signatures stay valid), except where a rule says otherwise::

    with FaultProxy(server.endpoint) as proxy:
        proxy.add(Rule(Reply(503, "SlowDown"), method="PUT", path="/packs/", nth=[1, 2]))
        store = open_blob_store(proxy.rewrite(server.url("prefix")), environ=server.environ)

Plain HTTP/1.1 only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

_CHUNK_BYTES = 64 * 1024
_HEAD_BYTES = 256 * 1024


class Fault:
    """What goes wrong with one request."""


@dataclass(frozen=True)
class Reply(Fault):
    """Answer with this status and error code; the server never sees the request."""

    status: int
    code: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reset(Fault):
    """Reset the connection once ``after_bytes`` of the request's body have reached the server."""

    after_bytes: int = 0


@dataclass(frozen=True)
class LoseReply(Fault):
    """The server does it all and answers; the client sees a reset."""


@dataclass(frozen=True)
class CutReply(Fault):
    """The reply's body ends after ``after_bytes``: by a reset, or as if in good order."""

    after_bytes: int = 0
    reset: bool = False


@dataclass(frozen=True)
class FlipBit(Fault):
    """One bit of a body changes on the way."""

    in_request: bool = False
    at_byte: int = 0


@dataclass(frozen=True)
class Hang(Fault):
    """Take the request and answer nothing, until the client gives up or the proxy closes."""


@dataclass(frozen=True)
class EditReply(Fault):
    """Pass the reply's body through a function, and set its length anew: a server that lies in good order."""

    edit: Callable[[bytes], bytes] = field(repr=False)


@dataclass
class Rule:
    """Which requests a fault befalls.

    Attributes:
        method: Of these requests; None: of all.
        path: A regular expression to be found in path and query.
        nth: Of those that match, counted from 1; None: each.
        probability: Of those, this share, at random.
    """

    fault: Fault
    method: str | None = None
    path: str = ""
    nth: Collection[int] | None = None
    probability: float = 1.0
    num_matched: int = field(default=0, init=False)
    num_applied: int = field(default=0, init=False)


@dataclass(frozen=True)
class Seen:
    """One request that came in; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    fault: Fault | None


@dataclass(frozen=True)
class _Head:
    raw: bytes
    start: str
    headers: dict[str, str]

    @property
    def body_bytes(self) -> int | None:
        """None: chunked."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            return None
        return int(self.headers.get("content-length", "0"))


class _BrokenError(Exception):
    """The connection is over: by plan, or because a side has closed it."""


class FaultProxy:
    """A context manager; runs in a thread of its own.

    Args:
        upstream: ``http://host:port`` of the real server.
        seed: For rules with a probability.

    Attributes:
        seen: The requests so far, in the order they came.
    """

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname
        self._upstream = (parts.hostname, parts.port or 80)
        self._random = random.Random(seed)  # noqa: S311 - a plan, no secret
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.seen: list[Seen] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._started = threading.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._port = 0

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self._port}"

    def rewrite(self, url: str) -> str:
        """A store URL with the server's address replaced by the proxy's."""
        host, port = self._upstream
        return url.replace(f"http://{host}:{port}", self.endpoint)

    def add(self, *rules: Rule) -> Rule:
        """Add rules; the first that applies counts. Returns the last one, whose counters tell how it went."""
        with self._lock:
            self._rules.extend(rules)
        return rules[-1]

    def clear(self) -> None:
        """Drop all rules and forget what was seen."""
        with self._lock:
            self._rules.clear()
            self.seen.clear()

    def count(self, method: str, path: str = "") -> int:
        """How many requests of this method came whose path holds this regular expression."""
        with self._lock:
            return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.seen)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_HEAD_BYTES, backlog=128)
        )
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._hang_up())
        self._loop.close()

    async def _hang_up(self) -> None:
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # lets closed transports say goodbye

    # -- one connection ----------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            up_reader, upstream = await asyncio.open_connection(*self._upstream, limit=_HEAD_BYTES)
            while True:
                await self._exchange(reader, writer, up_reader, upstream)
        except (_BrokenError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for side in (writer, upstream):
                if side is not None:
                    side.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        """Pass one request and its reply on, or do to them what the plan says."""
        head = await _read_head(reader)
        method, path, _ = head.start.split(" ", 2)
        fault = self._fault_of(method, path, head.headers)
        if isinstance(fault, Reset) and fault.after_bytes == 0:
            _reset(writer)
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if isinstance(fault, Reply):
            async for _ in _read_body(reader, head):
                pass
            await _answer(writer, method, fault)
            return
        flip = fault.at_byte if isinstance(fault, FlipBit) and fault.in_request else None
        up_writer.write(head.raw)
        passed = 0
        async for piece in _read_body(reader, head):
            if isinstance(fault, Reset) and passed + len(piece) >= fault.after_bytes:
                up_writer.write(piece[: fault.after_bytes - passed])
                await up_writer.drain()
                _reset(writer)
            up_writer.write(_flipped(piece, passed, flip))
            await up_writer.drain()
            passed += len(piece)
        if isinstance(fault, Reset):
            _reset(writer)
        if isinstance(fault, Hang):
            await reader.read(1)
            raise _BrokenError
        await self._return(method, fault, up_reader, writer)
        if "close" in head.headers.get("connection", "").lower():
            raise _BrokenError

    async def _return(
        self, method: str, fault: Fault | None, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        reply = await _read_head(up_reader)
        while reply.start.split(" ")[1] == "100":  # the proxy has said that already
            reply = await _read_head(up_reader)
        status = reply.start.split(" ")[1]
        has_body = method != "HEAD" and status not in ("204", "304")
        body = _read_body(up_reader, reply) if has_body else _nothing()
        if isinstance(fault, LoseReply):
            async for _ in body:
                pass
            _reset(writer)
        if isinstance(fault, EditReply):
            await _write_edited(writer, reply, fault.edit(b"".join([piece async for piece in body])))
            return
        writer.write(reply.raw)
        flip = fault.at_byte if isinstance(fault, FlipBit) and not fault.in_request else None
        passed = 0
        async for piece in body:
            if isinstance(fault, CutReply) and passed + len(piece) >= fault.after_bytes:
                writer.write(piece[: fault.after_bytes - passed])
                await writer.drain()
                if fault.reset:
                    _reset(writer)
                raise _BrokenError
            writer.write(_flipped(piece, passed, flip))
            await writer.drain()
            passed += len(piece)
        await writer.drain()
        if "close" in reply.headers.get("connection", "").lower() or isinstance(fault, CutReply):
            raise _BrokenError

    def _fault_of(self, method: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        with self._lock:
            fault = next((rule.fault for rule in self._rules if self._applies(rule, method, path)), None)
            self.seen.append(Seen(method, path, headers, fault))
            return fault

    def _applies(self, rule: Rule, method: str, path: str) -> bool:
        if rule.method not in (None, method) or re.search(rule.path, path) is None:
            return False
        rule.num_matched += 1
        if rule.nth is not None and rule.num_matched not in rule.nth:
            return False
        if rule.probability < 1 and self._random.random() >= rule.probability:
            return False
        rule.num_applied += 1
        return True


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    start, *lines = raw[:-4].decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return _Head(raw, start, headers)


async def _read_body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """The body's raw bytes, chunk framing included."""
    left = head.body_bytes
    while left is None:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2) if size else line + await reader.readuntil(b"\r\n")
        if size == 0:
            return
    while left:
        piece = await reader.read(min(left, _CHUNK_BYTES))
        if not piece:
            raise _BrokenError
        left -= len(piece)
        yield piece


async def _nothing() -> AsyncIterator[bytes]:
    for piece in list[bytes]():
        yield piece


def _flipped(piece: bytes, at: int, byte: int | None) -> bytes:
    if byte is None or not at <= byte < at + len(piece):
        return piece
    changed = bytearray(piece)
    changed[byte - at] ^= 1
    return bytes(changed)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a crashed peer or a stateful firewall would."""
    sock: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise _BrokenError


async def _answer(writer: asyncio.StreamWriter, method: str, fault: Reply) -> None:
    body = b""
    if method != "HEAD" and fault.code:
        body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>as planned</Message></Error>".encode()
    lines = [f"HTTP/1.1 {fault.status} Planned", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in fault.headers]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()


async def _write_edited(writer: asyncio.StreamWriter, reply: _Head, body: bytes) -> None:
    dropped = (b"content-length:", b"transfer-encoding:", b"etag:")
    lines = [line for line in reply.raw[:-4].split(b"\r\n") if not line.lower().startswith(dropped)]
    writer.write(b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body)
    await writer.drain()
