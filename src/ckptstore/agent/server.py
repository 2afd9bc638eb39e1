"""The agent's life: it listens, watches over deadlines and its root, drains, and leaves.

Everything in memory is guarded by one condition; nobody waits for a disk, a network or a peer while holding it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore._version import __version__
from ckptstore.agent import service
from ckptstore.agent.connection import Connection, peer_pid
from ckptstore.agent.job import Watcher
from ckptstore.agent.jobs import RunJobs
from ckptstore.agent.listener import Listener
from ckptstore.agent.memory import own_memory
from ckptstore.agent.protocol import PROTOCOL
from ckptstore.agent.runtime import RuntimeDir
from ckptstore.clock import SYSTEM_CLOCK, Clock, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, TransientError
from ckptstore.format.manifest import Json
from ckptstore.repo import names
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.agent.hooks import Hooks
    from ckptstore.agent.metrics import Metrics

log = logging.getLogger("ckptstore.agent")

TICK_SECONDS = 0.2
ROOT_CHECK_SECONDS = 2.0
SWEEP_SECONDS = 30.0
#: A staging directory nobody has touched for so long was left by a crash.
STALE_SECONDS = 120.0
#: An agent that nobody has spoken to yet stays at least this long.
FIRST_CONTACT_SECONDS = 10.0
MAX_CONNECTIONS = 1024
#: Time for the last words to the hooks.
HOOK_SECONDS = 10.0


class AgentServer:
    """The agent of one root. :meth:`start`, then :meth:`run` in the main thread.

    Args:
        root: of the local tier; made if absent.
        directory: runtime folder; the caller holds its lock.
        idle_exit_seconds: without trainers and work, until a trainer says otherwise; None: a service, which stays until
            it is told to leave.
        drain_seconds: time for open work after SIGTERM.
    """

    def __init__(
        self,
        root: Path,
        directory: RuntimeDir,
        *,
        idle_exit_seconds: float | None,
        drain_seconds: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.agent_id = new_nonce()
        self.condition = threading.Condition(threading.RLock())
        self.runs: dict[str, RunJobs] = {}
        self.tier = LocalTier(root, clock)
        self.clock = clock
        self._idle_exit_seconds = idle_exit_seconds
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
        self._watchers: list[Watcher] = []
        self._metrics: Metrics | None = None
        self._hooks: Hooks | None = None

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Make the tier if need be, and listen.

        Raises:
            CkptError: the root can't be a local tier.
        """
        self.tier.create()
        self._sweep_own()
        status = os.stat(self._root)
        self._root_identity = (status.st_dev, status.st_ino)
        self._listener = Listener(self._directory)
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
                time.sleep(1.0)
        log.info("leaving: %s", reason)
        service.tell("STOPPING=1")
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
            run.remotes.hurry(self._leave_by)
        if now >= self._next_root_check:
            self._next_root_check = now + ROOT_CHECK_SECONDS
            if not self._root_is_there():
                self._is_leaving = True
                return "the root is gone"
            self._listener.mend()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            for run in runs:
                self._sweep(run)
        with self.condition:
            is_busy = any(run.is_busy() for run in runs)
            is_attended = self._is_attended()
            if self._leave_by is not None:
                if now >= self._leave_by:
                    self._is_leaving = True
                    return "time is up" + (", with work left" if is_busy else "")
                if not is_busy and (not is_attended or self._leave_when_done):
                    self._is_leaving = True
                    return "told to, and all is done"
            elif is_busy or is_attended:
                self._idle_since = now
            elif self._idle_exit_seconds is not None and now - self._idle_since >= self._idle_exit_seconds:
                self._is_leaving = True
                return self._idle_reason()
        return None

    def _idle_reason(self) -> str:
        left = [
            f"{count} saves of {run} are not on {name}: `ckptctl push {self._root} --remote URL --run {run}` sends them"
            for run, jobs in self.runs.items()
            for name, uploader in jobs.remotes.uploaders.items()
            if (count := uploader.pending())
        ]
        return f"idle, but {'; '.join(left)}" if left else "idle"

    def _root_is_there(self) -> bool:
        try:
            status = os.stat(self._root)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a file system that answers badly is not an absent one
        return (status.st_dev, status.st_ino) == self._root_identity

    def check_root(self) -> None:
        """Refuse a trainer whose root has been replaced: its agent is the next one.

        Raises:
            TransientError: this agent is about to leave.
        """
        if not self._root_is_there():
            self._next_root_check = 0.0
            raise TransientError(f"{self._root} is not the directory this agent was started for", reason="leaving")

    def _leave(self) -> None:
        self._listener.close()
        uploaders = [uploader for run in self._all_runs() for uploader in run.remotes.uploaders.values()]
        for uploader in uploaders:
            uploader.stop()
        deadline = time.monotonic() + 5.0
        for uploader in uploaders:
            uploader.join(max(0.0, deadline - time.monotonic()))
        if self._hooks is not None:
            self._hooks.close(HOOK_SECONDS)
        for connection in list(self._connections):
            connection.shutdown()

    def is_needed(self) -> bool:
        """Whether a trainer is attached or work can be done."""
        with self.condition:
            return self._is_attended() or any(run.is_busy() for run in self.runs.values())

    def _is_attended(self) -> bool:
        return any(connection.attachment is not None for connection in self._connections)

    def leave_when_idle_for(self, seconds: float) -> None:
        """Leave after so long without trainers and work, counted from now at the earliest; a service stays."""
        with self.condition:
            if self._idle_exit_seconds is not None:
                self._idle_exit_seconds = seconds
            self._idle_since = max(self._idle_since, self.clock.monotonic())

    def request_leave(self, timeout_s: float, *, when_done: bool) -> None:
        """Drain, then leave; at the latest after ``timeout_s``. ``when_done``: even if trainers are connected."""
        with self.condition:
            self._leave_by = self.clock.monotonic() + max(0.0, timeout_s)
            self._leave_when_done = self._leave_when_done or when_done

    # ------------------------------------------------------------------ connections

    def _accept(self) -> None:
        while True:
            try:
                sock = self._listener.accept()
            except OSError:
                if self._is_leaving:
                    return
                time.sleep(0.1)  # out of descriptors, perhaps, or to listen elsewhere
                continue
            try:
                pid = peer_pid(sock)
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

    def known_jobs(self, run: str) -> RunJobs | None:
        """The run's jobs, if somebody has attached to it."""
        with self.condition:
            return self.runs.get(run)

    def jobs_of(self, run: str, config: StoreConfig) -> RunJobs:
        """The run's jobs, made at its first attachment."""
        with self.condition:
            jobs = self.runs.get(run)
            if jobs is None:
                jobs = self.runs[run] = RunJobs(self.condition, self.tier, self._directory, run, config, self.clock)
                self._next_sweep = 0.0
                jobs.watchers += self._watchers
            return jobs

    def serve_metrics(self, port: int) -> None:
        """Serve metrics on this port of 127.0.0.1, from now on; once is enough, the newest port wins.

        A port that somebody else has is logged and shown by ``status``: training goes on without metrics.

        Raises:
            ConfigError: the extra is not installed.
        """
        from ckptstore.agent.metrics import Metrics

        with self.condition:
            if self._metrics is None:
                self._metrics = Metrics(self.status, self._root)
                self._watch(self._metrics)
        self._metrics.serve(port)

    def count_restored(self, run: str, bytes_by_source: Mapping[str, int], repaired_files: int) -> bool:
        """Count what a rank has loaded; whether there are metrics to count it in."""
        if self._metrics is not None:
            self._metrics.restored(run, bytes_by_source, repaired_files)
        return self._metrics is not None

    def tell(self, config: StoreConfig, environ: Mapping[str, str]) -> None:
        """Call the hooks this trainer asks for, from now on; the newest trainer that asks for any decides."""
        from ckptstore.agent.hooks import Hooks, Targets

        if (targets := Targets.of(config, environ)) is None:
            return
        with self.condition:
            if self._hooks is None:
                self._hooks = Hooks(self.status, self._root, self.clock)
                self._watch(self._hooks)
        self._hooks.aim(targets)

    def _watch(self, watcher: Watcher) -> None:
        """Let it hear of every run's saves."""
        self._watchers.append(watcher)
        for jobs in self.runs.values():
            jobs.watchers.append(watcher)

    def _all_runs(self) -> list[RunJobs]:
        with self.condition:
            return list(self.runs.values())

    def _sweep_own(self) -> None:
        """Remove what an agent of this root was writing when it was killed."""
        for run, save_id in self._directory.left_staging():
            try:
                self.tier.sweep(run, _staged(self.tier.run_path(run)) - {save_id})
            except CkptError as error:
                log.warning("can't remove the leftover of save %s: %s", save_id, error)

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
            slots = [slot for run in self.runs.values() for slot in run.slots.describe()]
            trainers = sum(connection.attachment is not None for connection in self._connections)
        return {
            "agent_id": self.agent_id,
            "pid": os.getpid(),
            "protocol": PROTOCOL,
            "version": __version__,
            "root": str(self._root),
            "log": str(self._directory.log),
            "uptime_seconds": round(self.clock.monotonic() - self._begun, 3),
            "rss_bytes": own_memory(),
            "trainers": trainers,
            "is_leaving": self._leave_by is not None,
            "metrics": None if self._metrics is None else self._metrics.place(),
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


def _staged(run: Path) -> set[str]:
    """Saves that have a staging or half-deleted directory."""
    with suppress(OSError), os.scandir(run) as entries:
        found = [(names.parse_staging_dir(e.name) or names.parse_deleting_dir(e.name)) for e in entries]
        return {save_id for save_id in found if save_id is not None}
    return set()


def _recent(run: Path) -> set[str]:
    """Saves whose staging directory, or a file in it, was touched lately."""
    limit = time.time() - STALE_SECONDS
    return {save_id for save_id in _staged(run) if _touched(run / names.staging_dir(save_id)) > limit}


def _touched(directory: Path) -> float:
    newest = 0.0
    with suppress(OSError):
        newest = os.lstat(directory).st_mtime
        with os.scandir(directory) as entries:
            for entry in entries:
                newest = max(newest, entry.stat(follow_symlinks=False).st_mtime)
    return newest
