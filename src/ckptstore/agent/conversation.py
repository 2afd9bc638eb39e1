"""Questions and answers over one connection to an agent, and the events that come in between.

One thread receives, one delivers events, and any thread may ask; nobody waits for ever. When the connection is lost
those who wait are told, ``on_event`` hears it once, and the conversation stays over. In a forked child it is over from
the start.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable

from ckptstore._version import __version__
from ckptstore.agent.protocol import PROTOCOL, Channel, Event, close_fds, error_from_wire
from ckptstore.errors import CkptError, TransientError
from ckptstore.format.manifest import Json

EventCallback = Callable[[Event], None]
Answer = tuple[Json, list[int]]

log = logging.getLogger("ckptstore")

_live: weakref.WeakSet[Conversation] = weakref.WeakSet()


def greet(channel: Channel, *, make_room: bool) -> Json | None:
    """Greet; None if the agent was of another version and is leaving now.

    Raises:
        ConfigError: it is of another version, and stays.
        OSError: it went away.
    """
    channel.send({"id": 0, "op": "hello", "protocol": PROTOCOL, "version": __version__, "pid": os.getpid()})
    answer = _first_answer(channel)
    if "ok" in answer:
        hello: Json = answer["ok"]
        return hello
    error = error_from_wire(answer["error"])
    theirs = error.context.get("protocol")
    if make_room and isinstance(theirs, int) and theirs < PROTOCOL:
        channel.send({"id": 0, "op": "leave"})
        if "ok" in _first_answer(channel):
            return None
    raise error


def _first_answer(channel: Channel) -> Json:
    received = channel.receive()
    if received is None:
        raise ConnectionResetError("the agent has closed the connection")
    close_fds(received[1])
    return received[0]


class Conversation:
    """Over a channel whose agent has been greeted.

    Attributes:
        is_lost: whether the connection is gone.
        is_closing: whether we end it, so that its end is no news.
    """

    def __init__(self, channel: Channel, on_event: EventCallback) -> None:
        self.is_lost = False
        self.is_closing = False
        self._is_forked = False
        self._channel = channel
        self._on_event = on_event
        self._lock = threading.Lock()
        self._pending: dict[int, queue.SimpleQueue[Answer | None]] = {}
        self._next_id = 1
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._receive, name="ckptstore-agent-reader", daemon=True)
        self._deliverer = threading.Thread(target=self._deliver, name="ckptstore-agent-events", daemon=True)
        self._reader.start()
        self._deliverer.start()
        _live.add(self)

    def ask(self, request: Json, timeout_s: float) -> Answer:
        """The answer, and the descriptors that came with it.

        Raises:
            TransientError: the agent was lost, or has not answered in time.
            CkptError: whatever it answered.
        """
        if self._is_forked:
            raise TransientError("this connection belongs to the parent process")
        inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        with self._lock:
            if self.is_lost:
                raise _lost()
            number, self._next_id = self._next_id, self._next_id + 1
            self._pending[number] = inbox
        try:
            try:
                self._channel.send({"id": number, **request})
            except CkptError:
                raise
            except BaseException as error:  # interrupted, perhaps: a part of it may be on its way, and no more will be
                self.break_off()
                if isinstance(error, OSError):
                    raise _lost() from None
                raise
            try:
                received = inbox.get(timeout=timeout_s)
            except queue.Empty:
                raise TransientError(
                    f"the node agent did not answer {request['op']!r} within {timeout_s:.0f} s", reason="timeout"
                ) from None
        finally:
            with self._lock:
                self._pending.pop(number, None)
        if received is None:
            raise _lost()
        answer, fds = received
        if "error" in answer:
            raise error_from_wire(answer["error"])
        return answer["ok"], fds

    def join(self, timeout_s: float) -> None:
        """Wait for the other side to end it."""
        self._reader.join(timeout_s)

    def break_off(self) -> None:
        """Count the other side as lost, at once and for good."""
        self._channel.shutdown()

    def hang_up(self) -> None:
        """End it, whatever is under way. Idempotent."""
        self.is_closing = True
        self._channel.shutdown()
        if threading.current_thread() is not self._reader:
            self._reader.join(5.0)

    def _receive(self) -> None:
        try:
            while (received := self._channel.receive()) is not None:
                message, fds = received
                if "event" in message:
                    self._events.put(Event.from_wire(message["event"]))
                    continue
                with self._lock:
                    inbox = self._pending.get(message.get("id", 0))
                if inbox is None:
                    close_fds(fds)  # the caller gave up waiting
                else:
                    inbox.put((message, fds))
        except (OSError, CkptError):
            pass  # all the same to our callers: the connection is gone
        finally:
            with self._lock:
                self.is_lost = True
                waiting = list(self._pending.values())
            for inbox in waiting:
                inbox.put(None)
            if not self.is_closing:
                self._events.put(Event("lost"))
            self._events.put(None)
            self._channel.close()

    def _deliver(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._on_event(event)
            except Exception:
                log.exception("handling an event of the node agent")

    def _forget_in_child(self) -> None:
        self._is_forked = self.is_lost = self.is_closing = True
        self._lock = threading.Lock()
        self._channel.close()


def _lost() -> TransientError:
    return TransientError("the connection to the node agent is gone", hint="connect again; a new agent is started")


def _after_fork_in_child() -> None:
    for conversation in list(_live):
        conversation._forget_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
