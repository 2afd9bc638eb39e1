"""One peer of the agent: what it asks, what it is told, and when it is gone.

Each connection has a thread that receives and one that sends, so that a trainer that stopped reading delays nobody.
Requests that may wait run in threads of their own.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptstore._version import __version__
from ckptstore.agent import cpus
from ckptstore.agent.jobs import RunJobs
from ckptstore.agent.protocol import (
    MAX_FDS,
    PROTOCOL,
    Channel,
    Event,
    SealRequest,
    close_fds,
    error_from_wire,
    error_to_wire,
    layout_id_of,
    pieces_from_wire,
)
from ckptstore.agent.slots import Attachment
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, ConfigError, LockedError, SaveFailedError
from ckptstore.format.manifest import Json, check_run_name
from ckptstore.repo import names

if TYPE_CHECKING:
    from ckptstore.agent.server import AgentServer

log = logging.getLogger("ckptstore.agent")

MAX_SLOT = 65535

Answer = tuple[Json, list[int]]
Handler = Callable[[Json], Answer]


class Connection:
    """One peer: a trainer's rank once it has attached, else somebody who looks."""

    #: Requests that may wait for memory, disks or other ranks; each runs in a thread of its own.
    WAITING = frozenset({"layout", "reserve", "discard", "complete", "claim_timeline", "settle", "drain"})

    def __init__(self, server: AgentServer, sock: socket.socket, pid: int) -> None:
        self.attachment: Attachment | None = None
        self._server = server
        self._channel = Channel(sock, accept_fds=False)
        self._outbox: queue.SimpleQueue[tuple[Json, list[int]] | None] = queue.SimpleQueue()
        self._pid = pid
        self._pidfd = _pidfd(pid)
        self._jobs: RunJobs | None = None
        self._said_hello = False
        self._said_bye = False

    def start(self) -> None:
        threading.Thread(target=self._send_loop, name=f"send-{self._pid}", daemon=True).start()
        threading.Thread(target=self._receive_loop, name=f"peer-{self._pid}", daemon=True).start()

    def shutdown(self) -> None:
        self._channel.shutdown()

    def push(self, event: Event) -> None:
        """Queue an event. Never blocks."""
        self._outbox.put(({"event": event.to_wire()}, []))

    def _send_loop(self) -> None:
        while (item := self._outbox.get()) is not None:
            message, fds = item
            try:
                self._channel.send(message, fds)
            except CkptError as error:
                log.error("can't answer pid %d: %s", self._pid, error)
                self._channel.shutdown()
            except OSError:
                self._channel.shutdown()
            finally:
                close_fds(fds)

    def _receive_loop(self) -> None:
        try:
            while self._wait_for_peer():
                received = self._channel.receive()
                if received is None:
                    break
                self._take(received[0])
        except OSError:
            pass  # the connection is gone, which is what the end of this loop means anyway
        except CkptError as error:
            log.warning("pid %d: %s", self._pid, error)
        except Exception:
            log.exception("pid %d", self._pid)
        finally:
            self._end()

    def _wait_for_peer(self) -> bool:
        """Wait for a message; False if the process is dead although a child of it may hold the connection open."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if self._pidfd is not None:
            poll.register(self._pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        return self._channel.fileno() in ready

    def _end(self) -> None:
        self._channel.shutdown()
        if self.attachment is not None and self._jobs is not None:
            self._jobs.detach(
                self.attachment, is_gone=self._said_bye or self._is_dead(wait_s=1.0), was_closed=self._said_bye
            )
            self.attachment = None
        self._server.forget(self)
        self._outbox.put(None)
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._channel.close()

    def _is_dead(self, wait_s: float) -> bool:
        """Whether the peer's process has ended: only then is its memory surely not written any more."""
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(wait_s * 1000))

    # ------------------------------------------------------------------ requests

    def _take(self, request: Json) -> None:
        op = request.get("op")
        if op in self.WAITING:
            threading.Thread(target=self._answer, args=(request,), name=f"{op}-{self._pid}", daemon=True).start()
        else:
            self._answer(request)

    def _answer(self, request: Json) -> None:
        answer: Json = {"id": request.get("id")}
        fds: list[int] = []
        op = str(request.get("op"))
        try:
            handler: Handler | None = getattr(self, f"_op_{op}", None)
            if handler is None:
                raise ConfigError(f"the node agent knows no request {op!r}")
            if not self._said_hello and op not in ("hello", "leave"):
                raise ConfigError("the first request must be hello")
            answer["ok"], fds = handler(request)
        except CkptError as error:
            answer["error"] = error_to_wire(error)
        except (KeyError, TypeError, ValueError) as error:
            log.exception("request %s of pid %d", op, self._pid)
            answer["error"] = error_to_wire(ConfigError(f"malformed request {op!r}: {error!r}"))
        except Exception as error:
            log.exception("request %s of pid %d", op, self._pid)
            answer["error"] = error_to_wire(error)
        self._outbox.put((answer, fds))

    def _op_hello(self, request: Json) -> Answer:
        theirs = request["protocol"]
        if theirs != PROTOCOL:
            raise ConfigError(
                f"the node agent (pid {os.getpid()}, ckptstore {__version__}) speaks protocol {PROTOCOL}, not {theirs}",
                hint="wait until it has finished and left, or `ckptctl agent stop`",
                protocol=PROTOCOL,
            )
        self._said_hello = True
        server = self._server
        return {"protocol": PROTOCOL, "version": __version__, "agent_id": server.agent_id, "pid": os.getpid()}, []

    def _op_leave(self, _request: Json) -> Answer:
        """Asked by a trainer of another version: make room, if nobody needs this agent."""
        if self._server.is_needed():
            raise LockedError("the node agent has trainers or work", hint="`ckptctl agent stop` ends it when done")
        self._server.request_leave(0.0, when_done=True)
        return {}, []

    def _op_attach(self, request: Json) -> Answer:
        if self.attachment is not None:
            raise ConfigError("this connection has a slot already")
        server = self._server
        run, slot = check_run_name(request["run"]), int(request["slot"])
        if not 0 <= slot <= MAX_SLOT:
            raise ConfigError(f"slot {slot} is not one of 0..{MAX_SLOT}")
        config = StoreConfig(**request["config"])
        server.check_root()
        server.tier.make_run(run)
        server.leave_when_idle_for(config.agent_idle_exit_seconds)
        cpus.keep_to(config.agent_cpus)
        if config.metrics_port is not None:
            server.serve_metrics(config.metrics_port)
        server.tell(config, request["environ"])
        self._jobs = server.jobs_of(run, config)
        self.attachment = self._jobs.attach(
            slot,
            self.push,
            lambda: self._is_dead(wait_s=0.0),
            rank=request.get("rank"),
            config=config,
            remotes=dict(request["remotes"]),
            environ=dict(request["environ"]),
            begun=float(request.get("begun", 0.0)),
        )
        log.info("pid %d attached as slot %d of %s", self._pid, slot, run)
        return {}, []

    def _attached(self) -> tuple[RunJobs, Attachment]:
        if self._jobs is None or self.attachment is None:
            raise ConfigError("this connection has no slot")
        return self._jobs, self.attachment

    def _op_layout(self, request: Json) -> Answer:
        jobs, attachment = self._attached()
        pieces = pieces_from_wire(request["pieces"])
        layout, generations = attachment.slot.configure(
            attachment, pieces, jobs.config.generations, request["timeout_s"], pid=self._pid
        )
        answer = {
            "layout_id": layout_id_of(pieces),
            "starts": layout.starts,
            "image_bytes": layout.image_bytes,
            "capacity_bytes": [g.capacity_bytes for g in generations],
            "is_on_disk": any(g.is_on_disk for g in generations),
        }
        return answer, [os.dup(g.fd) for g in generations]

    def _op_reserve(self, request: Json) -> Answer:
        _, attachment = self._attached()
        index = attachment.slot.reserve(attachment, request["timeout_s"], request.get("save_id"))
        return {"generation": index}, []

    def _op_release(self, request: Json) -> Answer:
        _, attachment = self._attached()
        attachment.slot.release(attachment, request["generation"])
        return {}, []

    def _op_seal(self, request: Json) -> Answer:
        jobs, attachment = self._attached()
        seal = SealRequest.from_wire(request["seal"])
        if request.get("same_tree"):
            seal = replace(seal, tree=attachment.tree)
        attachment.tree = seal.tree
        if "begun" in request:  # the monotonic clock is the machine's
            taken = max(0.0, time.monotonic() - request["begun"])
            seal = replace(seal, spans={**seal.spans, "hand_over": taken})
        jobs.seal(attachment, request["generation"], seal)
        return {}, []

    def _op_discard(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        return {"discarded": jobs.discard(request["save_id"], str(request["reason"]))}, []

    def _op_missed(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        wire = request["error"]
        error = None if wire is None else error_from_wire(wire)
        jobs.missed(names.check_save_id(request["save_id"]), int(request["step"]), error)
        return {}, []

    def _op_mend(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        jobs.remotes.mend(request["save_id"])
        return {}, []

    def _op_announce(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        save_id, level, failure = request["save_id"], str(request["level"]), request.get("failure")
        if failure is None:
            jobs.emit(Event("announced", save_id, None, {"level": level}))
        else:
            jobs.emit(Event.failure(SaveFailedError(str(failure)), save_id=save_id, step=None, level=level))
        return {}, []

    def _op_complete(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        jobs.complete(request["save_id"], request["root"].encode())
        return {}, []

    def _op_claim_timeline(self, request: Json) -> Answer:
        jobs, _ = self._attached()
        record = request["record"]
        return {
            "number": jobs.claim_timeline(request["at_least"], record.encode() if isinstance(record, str) else record)
        }, []

    def _op_borrow(self, request: Json) -> Answer:
        """Lend the images of a save that dead trainers left in memory, to be read; a few at a time, by rank."""
        jobs = self._server.known_jobs(check_run_name(request["run"]))
        held = jobs.held(request["save_id"]) if jobs is not None else []
        wanted = [item for item in held if item[0] > request["after"]][:MAX_FDS]
        close_fds([fd for _, fd, _ in held if fd not in {item[1] for item in wanted}])
        return {"parts": [[rank, size] for rank, _, size in wanted]}, [fd for _, fd, _ in wanted]

    def _op_restored(self, request: Json) -> Answer:
        run, sources = check_run_name(request["run"]), request["bytes_by_source"]
        sizes = {str(source): int(size) for source, size in sources.items()}
        return {"is_counted": self._server.count_restored(run, sizes, int(request["repaired_files"]))}, []

    def _op_status(self, _request: Json) -> Answer:
        return self._server.status(), []

    def _op_settle(self, request: Json) -> Answer:
        return {"is_settled": self._server.wait_staged(request["run"], request["timeout_s"])}, []

    def _op_drain(self, request: Json) -> Answer:
        return {"is_settled": self._server.wait_settled(request["timeout_s"])}, []

    def _op_stop(self, request: Json) -> Answer:
        self._server.request_leave(request["timeout_s"], when_done=True)
        return {}, []

    def _op_bye(self, _request: Json) -> Answer:
        self._said_bye = True
        return {}, []


def peer_pid(sock: socket.socket) -> int | None:
    """The peer's pid, 0 if it lives in another pid namespace; None if it isn't us or root and must not speak to us."""
    if not hasattr(socket, "SO_PEERCRED"):
        return 0  # the folder's mode is the guard
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (os.getuid(), 0):
        log.warning("refused a connection of uid %d", uid)
        return None
    return int(pid)


def _pidfd(pid: int) -> int | None:
    if pid <= 0 or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
