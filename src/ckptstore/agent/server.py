"""The agent's life: it listens, answers, watches over deadlines and its root, drains, and leaves.

One thread receives for each connection and one sends, so that a trainer that stopped reading delays nobody. Requests
that may wait run in threads of their own; everything in memory is guarded by one condition.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore import __version__
from ckptstore.agent.jobs import Attachment, RunJobs
from ckptstore.agent.protocol import (
    PROTOCOL,
    Channel,
    Event,
    SealRequest,
    close_fds,
    error_to_wire,
    layout_id_of,
    pieces_from_wire,
)
from ckptstore.agent.runtime import RuntimeDir, listen
from ckptstore.clock import SYSTEM_CLOCK, Clock, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, ConfigError, LockedError
from ckptstore.format.manifest import Json, check_run_name
from ckptstore.repo.local import LocalTier

log = logging.getLogger("ckptstore.agent")

TICK_SECONDS = 0.2
ROOT_CHECK_SECONDS = 2.0
SWEEP_SECONDS = 30.0
#: A staging directory nobody has touched for so long was left by a crash.
STALE_SECONDS = 120.0
#: An agent that nobody has spoken to yet stays at least this long.
FIRST_CONTACT_SECONDS = 10.0
MAX_CONNECTIONS = 1024
MAX_SLOT = 65535

Handler = Callable[[Json], tuple[Json, list[int]]]


class AgentServer:
    """The agent of one root. :meth:`start`, then :meth:`run` in the main thread.

    Args:
        root: of the local tier; made if absent.
        directory: runtime folder; the caller holds its lock.
        idle_exit_seconds: until a trainer says otherwise.
        drain_seconds: time for open work after SIGTERM.
    """

    def __init__(
        self,
        root: Path,
        directory: RuntimeDir,
        *,
        idle_exit_seconds: float,
        drain_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.agent_id = new_nonce()
        self.condition = threading.Condition(threading.RLock())
        self.runs: dict[str, RunJobs] = {}
        self.tier = LocalTier(root, clock)
        self.clock = clock
        self.idle_exit_seconds = idle_exit_seconds
        self._root = root
        self._directory = directory
        self._drain_seconds = drain_seconds
        self._connections: set[Connection] = set()
        self._begun = clock.monotonic()
        self._idle_since = self._begun + FIRST_CONTACT_SECONDS
        self._leave_by: float | None = None
        self._is_leaving = False
        self._leave_when_done = False
        self._next_root_check = self._next_sweep = self._begun

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Make the tier if need be, and listen.

        Raises:
            CkptError: the root can't be a local tier.
        """
        self.tier.create()
        status = os.stat(self._root)
        self._root_identity = (status.st_dev, status.st_ino)
        self._listener = listen(self._directory.socket)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        log.info("agent %s of %s: pid %d, ckptstore %s", self.agent_id, self._root, os.getpid(), __version__)

    def run(self) -> None:
        """Serve until there is nothing left to do; on return nobody is connected and nothing is written any more."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, self._on_sigterm)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        reason = None
        while reason is None:
            time.sleep(TICK_SECONDS)
            try:
                reason = self._tick()
            except Exception:
                log.exception("while looking after things")
        log.info("leaving: %s", reason)
        self._leave()

    def _on_sigterm(self, number: int, _frame: object) -> None:
        now = self.clock.monotonic()
        # The first asks to finish what is open, the second not to wait for it.
        self._leave_by = now + self._drain_seconds if self._leave_by is None else now
        log.info("signal %d: leaving within %.0f s", number, self._leave_by - now)

    def _tick(self) -> str | None:
        """Look after deadlines; a reason when it is time to leave."""
        now = self.clock.monotonic()
        runs = self._all_runs()
        for run in runs:
            run.check_deadlines()
        if now >= self._next_root_check:
            self._next_root_check = now + ROOT_CHECK_SECONDS
            if not self._root_is_there():
                self._is_leaving = True
                return "the root is gone"
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            for run in runs:
                self._sweep(run)
        with self.condition:
            is_busy = any(run.is_busy() for run in runs)
            is_attended = any(connection.attachment is not None for connection in self._connections)
            if self._leave_by is not None:
                if now >= self._leave_by:
                    self._is_leaving = True
                    return "time is up" + (", with work left" if is_busy else "")
                if not is_busy and (not is_attended or self._leave_when_done):
                    self._is_leaving = True
                    return "told to, and all is done"
            elif is_busy or is_attended:
                self._idle_since = now
            elif now - self._idle_since >= self.idle_exit_seconds:
                self._is_leaving = True
                return "idle"
        return None

    def _root_is_there(self) -> bool:
        try:
            status = os.stat(self._root)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a file system that answers badly is not an absent one
        return (status.st_dev, status.st_ino) == self._root_identity

    def _leave(self) -> None:
        with suppress(OSError):
            self._directory.socket.unlink()
        self._listener.close()
        uploaders = [uploader for run in self._all_runs() for uploader in run.uploaders.values()]
        for uploader in uploaders:
            uploader.stop()
        deadline = time.monotonic() + 5.0
        for uploader in uploaders:
            uploader.join(max(0.0, deadline - time.monotonic()))
        for connection in list(self._connections):
            connection.shutdown()

    def request_leave(self, timeout_s: float, *, when_done: bool) -> None:
        """Drain, then leave; at the latest after ``timeout_s``. ``when_done``: even if trainers are connected."""
        with self.condition:
            self._leave_by = self.clock.monotonic() + max(0.0, timeout_s)
            self._leave_when_done = self._leave_when_done or when_done

    # ------------------------------------------------------------------ connections

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._is_leaving:
                    return
                time.sleep(0.1)  # out of descriptors, perhaps; a closed listener ends the process anyway
                continue
            try:
                pid = _peer_pid(sock)
                if pid is None or len(self._connections) >= MAX_CONNECTIONS:
                    sock.close()
                    continue
                connection = Connection(self, sock, pid)
                with self.condition:
                    if self._is_leaving:
                        connection.shutdown()
                        continue
                    self._connections.add(connection)
                connection.start()
            except Exception:
                log.exception("accepting a connection")
                sock.close()

    def forget(self, connection: Connection) -> None:
        with self.condition:
            self._connections.discard(connection)

    def jobs_of(self, run: str, config: StoreConfig) -> RunJobs:
        """The run's jobs, made at its first attachment."""
        with self.condition:
            jobs = self.runs.get(run)
            if jobs is None:
                jobs = self.runs[run] = RunJobs(self.condition, self.tier, run, config, self.clock)
                self._next_sweep = 0.0
            return jobs

    def _all_runs(self) -> list[RunJobs]:
        with self.condition:
            return list(self.runs.values())

    def _sweep(self, run: RunJobs) -> None:
        """Remove what crashes left, sparing whatever another process may be writing: restores and other nodes."""
        try:
            removed = self.tier.sweep(run.run, run.live() | _recent(self.tier.run_path(run.run)))
        except CkptError as error:
            log.warning("can't sweep %s: %s", run.run, error)
            return
        if removed:
            log.info("removed leftovers in %s: %s", run.run, ", ".join(removed))

    # ------------------------------------------------------------------ looking at it

    def status(self) -> Json:
        """What `ckptctl status` shows."""
        with self.condition:
            runs = {name: run.describe() for name, run in self.runs.items()}
            slots = [slot.describe() for run in self.runs.values() for slot in run.slots.values()]
            trainers = sum(connection.attachment is not None for connection in self._connections)
        return {
            "agent_id": self.agent_id,
            "pid": os.getpid(),
            "protocol": PROTOCOL,
            "version": __version__,
            "root": str(self._root),
            "log": str(self._directory.log),
            "uptime_seconds": round(self.clock.monotonic() - self._begun, 3),
            "rss_bytes": _rss_bytes(),
            "trainers": trainers,
            "is_leaving": self._leave_by is not None,
            "runs": runs,
            "slots": slots,
        }

    def wait_staged(self, run: str, timeout_s: float) -> bool:
        """Wait until what was sealed in this run is on disk, or has failed; whether it is."""
        with self.condition:
            jobs = self.runs.get(run)
            return jobs is None or self.condition.wait_for(lambda: not jobs.is_staging(), timeout_s)

    def wait_settled(self, timeout_s: float) -> bool:
        """Wait until everything staged is committed and uploaded, or waiting can't help; whether all is."""
        deadline = self.clock.monotonic() + timeout_s
        while True:
            runs = self._all_runs()
            if all(run.is_settled() for run in runs):
                return True
            if self.clock.monotonic() >= deadline or self._is_leaving or not any(run.is_busy() for run in runs):
                return False
            time.sleep(0.05)


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

    def _op_hello(self, request: Json) -> tuple[Json, list[int]]:
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

    def _op_leave(self, _request: Json) -> tuple[Json, list[int]]:
        """Asked by a trainer of another version: make room, if nobody needs this agent."""
        server = self._server
        with server.condition:
            if any(c.attachment is not None for c in server._connections) or any(
                run.is_busy() for run in server.runs.values()
            ):
                raise LockedError("the node agent has trainers or work", hint="`ckptctl agent stop` ends it when done")
        server.request_leave(0.0, when_done=True)
        return {}, []

    def _op_attach(self, request: Json) -> tuple[Json, list[int]]:
        if self.attachment is not None:
            raise ConfigError("this connection has a slot already")
        server = self._server
        run, slot = check_run_name(request["run"]), int(request["slot"])
        if not 0 <= slot <= MAX_SLOT:
            raise ConfigError(f"slot {slot} is not one of 0..{MAX_SLOT}")
        config = StoreConfig(**request["config"])
        server.tier.create()
        server.tier.make_run(run)
        server.idle_exit_seconds = config.agent_idle_exit_seconds
        self._jobs = server.jobs_of(run, config)
        self.attachment = self._jobs.attach(
            slot,
            self.push,
            rank=request.get("rank"),
            config=config,
            remotes=dict(request["remotes"]),
            environ=dict(request["environ"]),
        )
        log.info("pid %d attached as slot %d of %s", self._pid, slot, run)
        return {}, []

    def _attached(self) -> tuple[RunJobs, Attachment]:
        if self._jobs is None or self.attachment is None:
            raise ConfigError("this connection has no slot")
        return self._jobs, self.attachment

    def _op_layout(self, request: Json) -> tuple[Json, list[int]]:
        jobs, attachment = self._attached()
        pieces = pieces_from_wire(request["pieces"])
        layout, generations = attachment.slot.configure(
            attachment, pieces, jobs.config.generations, request["timeout_s"]
        )
        answer = {
            "layout_id": layout_id_of(pieces),
            "starts": layout.starts,
            "image_bytes": layout.image_bytes,
            "capacity_bytes": [g.capacity_bytes for g in generations],
        }
        return answer, [os.dup(g.fd) for g in generations]

    def _op_reserve(self, request: Json) -> tuple[Json, list[int]]:
        _, attachment = self._attached()
        index = attachment.slot.reserve(attachment, request["timeout_s"], request.get("save_id"))
        return {"generation": index}, []

    def _op_release(self, request: Json) -> tuple[Json, list[int]]:
        _, attachment = self._attached()
        attachment.slot.release(attachment, request["generation"])
        return {}, []

    def _op_seal(self, request: Json) -> tuple[Json, list[int]]:
        jobs, attachment = self._attached()
        jobs.seal(attachment, request["generation"], SealRequest.from_wire(request["seal"]))
        return {}, []

    def _op_discard(self, request: Json) -> tuple[Json, list[int]]:
        jobs, _ = self._attached()
        return {"discarded": jobs.discard(request["save_id"], str(request["reason"]))}, []

    def _op_announce(self, request: Json) -> tuple[Json, list[int]]:
        jobs, _ = self._attached()
        jobs.emit(Event("announced", request["save_id"], None, {"level": str(request["level"])}))
        return {}, []

    def _op_complete(self, request: Json) -> tuple[Json, list[int]]:
        jobs, _ = self._attached()
        jobs.complete(request["save_id"], request["root"].encode())
        return {}, []

    def _op_claim_timeline(self, request: Json) -> tuple[Json, list[int]]:
        jobs, _ = self._attached()
        record = request["record"]
        return {
            "number": jobs.claim_timeline(request["at_least"], record.encode() if isinstance(record, str) else record)
        }, []

    def _op_status(self, _request: Json) -> tuple[Json, list[int]]:
        return self._server.status(), []

    def _op_settle(self, request: Json) -> tuple[Json, list[int]]:
        return {"is_settled": self._server.wait_staged(request["run"], request["timeout_s"])}, []

    def _op_drain(self, request: Json) -> tuple[Json, list[int]]:
        return {"is_settled": self._server.wait_settled(request["timeout_s"])}, []

    def _op_stop(self, request: Json) -> tuple[Json, list[int]]:
        self._server.request_leave(request["timeout_s"], when_done=True)
        return {}, []

    def _op_bye(self, _request: Json) -> tuple[Json, list[int]]:
        self._said_bye = True
        return {}, []


def _peer_pid(sock: socket.socket) -> int | None:
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


def _recent(run: Path) -> set[str]:
    """Saves whose staging directory, or a file in it, was touched lately."""
    from ckptstore.repo import names

    recent = set()
    limit = time.time() - STALE_SECONDS
    with suppress(OSError), os.scandir(run) as entries:
        for entry in entries:
            save_id = names.parse_staging_dir(entry.name)
            if save_id is not None and _touched(entry.path) > limit:
                recent.add(save_id)
    return recent


def _touched(directory: str) -> float:
    newest = 0.0
    with suppress(OSError):
        newest = os.lstat(directory).st_mtime
        with os.scandir(directory) as entries:
            for entry in entries:
                newest = max(newest, entry.stat(follow_symlinks=False).st_mtime)
    return newest


def _rss_bytes() -> dict[str, Any]:
    """Memory of this process: its own, and the arenas it has mapped."""
    fields = {"RssAnon": "own", "RssFile": "files", "RssShmem": "arenas"}
    result = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in fields:
                result[fields[name]] = int(rest.split()[0]) * 1024
    return result
