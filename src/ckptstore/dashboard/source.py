"""What pages are made of, kept fresh in the background while somebody looks.

Pages never wait for a bucket or an agent: they show the last look, and how old it is. Only the first look at a run's
local tier is waited for.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.dashboard.agents import AgentWatch, Uploading
from ckptstore.dashboard.journals import Journals
from ckptstore.dashboard.tiers import RememberedLocal, RememberedRemote
from ckptstore.errors import CheckpointNotFoundError, CkptError
from ckptstore.ops.open import Place, RunTiers
from ckptstore.repo import timings
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.remote import runs as remote_runs
from ckptstore.types import CheckpointInfo

log = logging.getLogger("ckptstore.dashboard")

T = TypeVar("T")

LOCAL_SECONDS = 1.0
REMOTE_SECONDS = 10.0
#: Nobody has asked for so long: stop looking.
WATCHED_SECONDS = 45.0
#: Look at every directory again after so long, for damage that leaves the run's directory as it was.
RESCAN_SECONDS = 30.0
#: A page takes what the background has seen if that is not older.
FRESH_SECONDS = 3.0
#: Notes of so many of the newest saves are read again until they tell about every remote.
YOUNG_NOTES = 50


@dataclass(frozen=True)
class RemoteLook:
    """How fresh the view of one remote is.

    Attributes:
        age_s: since the last good look; None before the first.
        error: why the last look failed.
    """

    name: str
    url: str
    age_s: float | None
    error: CkptError | None = None


@dataclass
class RunView:
    """One run at one moment; pages of the same ``revision`` are the same."""

    run: str
    catalog: Catalog
    revision: int
    has_local: bool
    remote_names: tuple[str, ...]
    unknown_remotes: frozenset[str] = frozenset()
    """Remotes nobody has been able to look at yet: what they hold is not known, which is not nothing."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """save_id -> where its time went, as far as it has been read."""
    _made: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def infos(self) -> list[CheckpointInfo]:
        """Every complete save, oldest first, superseded ones too."""
        return [record.info() for record in self.catalog.records]

    @cached_property
    def line(self) -> list[CheckpointInfo]:
        """The current line, oldest first."""
        return [info for info in self.infos if not info.superseded]

    @cached_property
    def by_id(self) -> dict[str, Record]:
        return {record.save_id: record for record in self.catalog.records}

    @property
    def num_notes(self) -> int:
        """How many entries the notes have; grows as they are read."""
        return sum(map(len, self.notes.copy().values()))

    def remember(self, key: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once while the run stays as it is."""
        kind = key.partition(" ")[0]
        known = self._made.get(kind)
        if known is None or known[0] != key:
            known = self._made[kind] = (key, make())
        made: T = known[1]
        return made

    @property
    def tiers(self) -> tuple[str, ...]:
        return (("local",) if self.has_local else ()) + self.remote_names


class Source:
    """The store behind the dashboard. Thread-safe; close it to stop looking.

    Args:
        place: local tier, buckets, or both; stays the caller's to close.
        clock: time, for tests.
        remote_seconds: between two looks at a bucket.
    """

    def __init__(self, place: Place, *, clock: Clock = SYSTEM_CLOCK, remote_seconds: float = REMOTE_SECONDS) -> None:
        self.place = place
        self.clock = clock
        self.local = None if place.local is None else RememberedLocal(place.local.root, clock)
        self.agent = AgentWatch(None if place.local is None else place.local.root, clock)
        self.journals = Journals(self.local)
        self._remotes: dict[str, tuple[RememberedRemote, ...]] = {}
        self._remote_runs: tuple[str, ...] | None = None if place.blobs else ()
        self._remote_error: CkptError | None = None
        self._views: dict[str, RunView] = {}
        self._prints: dict[str, tuple[object, float]] = {}
        self._notes: dict[str, dict[str, dict[str, Any]]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._watched = threading.Event()
        self._watched_until = 0.0
        self._checked = -FRESH_SECONDS
        self._stopping = threading.Event()
        self._kick = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(step, every, kick), name=name, daemon=True)
            for step, every, kick, name in (
                (self._look_at_local, LOCAL_SECONDS, None, "dashboard-local"),
                (self._look_at_remotes, remote_seconds, self._kick, "dashboard-remote"),
                (self.agent.look, LOCAL_SECONDS, None, "dashboard-agent"),
            )
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop looking; idempotent."""
        self._stopping.set()
        self._watched.set()
        self._kick.set()
        for thread in self._threads:
            thread.join(5.0)
        self.agent.close()

    # ------------------------------------------------------------------ asked by pages

    def runs(self) -> list[str]:
        """Names of all runs, of the local tier now and of the buckets at the last look."""
        self._watch()
        found = set(self.local.runs()) if self.local is not None else set()
        return sorted(found.union(self._remote_runs or ()))

    @property
    def is_waiting_for_runs(self) -> bool:
        """Whether a bucket has not answered yet, so that there may be more runs."""
        return self._remote_runs is None

    @property
    def remote_error(self) -> CkptError | None:
        """Why the buckets could not be asked for their runs."""
        return self._remote_error

    def view(self, run: str) -> RunView:
        """One run, as it was a few seconds ago at most.

        Raises:
            CheckpointNotFoundError: no such run.
            CkptError: the local tier can't be read.
        """
        self._watch()
        known = self._views.get(run)
        if known is None:
            if run not in self.runs():
                raise CheckpointNotFoundError(f"no run {run!r} here", run=run, hint="the first page lists the runs")
            self._tiers(run)
            self._kick.set()
            return self._update(run)
        if self.clock.monotonic() - self._checked < FRESH_SECONDS:
            return known  # the thread that looks every second replaces it; no page waits for ten thousand saves
        return self._update(run) if self._is_stale(run) else known

    def look_now(self, run: str) -> RunView:
        """One run with everything there is to know, remotes and notes included; waits for them.

        Raises:
            CheckpointNotFoundError: no such run.
            CkptError: the local tier can't be read.
        """
        self._tiers(run)
        self._look_at_remotes()
        self.view(run)
        self.agent.look()
        view = self._update(run)
        self._read_notes(run)
        return view

    def look_again(self, run: str) -> None:
        """Something of this run was changed from here: pages shall not show what was."""
        self._prints.pop(run, None)
        self._update(run)
        self._kick.set()

    def notes_of(self, run: str, save_id: str) -> dict[str, Any]:
        """Where the time of one save went, as noted by now."""
        if self.local is None:
            return {}
        found = timings.read(self.local, run, save_id)
        self._notes.setdefault(run, {})[save_id] = found
        return found

    def looks(self, run: str) -> list[RemoteLook]:
        """How fresh each remote's part of the view is."""
        now = self.clock.monotonic()
        return [
            RemoteLook(r.name, r.blob.url, None if r.listed_at is None else now - r.listed_at, r.error)
            for r in self._tiers(run)
        ]

    def tiers(self, run: str) -> RunTiers:
        """Tiers to read one checkpoint's manifests from."""
        return RunTiers(run, self.local, self._tiers(run))

    def uploading(self, run: str, sizes: Mapping[str, int]) -> list[Uploading]:
        """The agent's queues of this run."""
        return self.agent.uploading(run, sizes)

    def disk(self) -> tuple[int, int] | None:
        """Free and total bytes of the disk below the local tier."""
        if self.local is None:
            return None
        with suppress(OSError):
            usage = shutil.disk_usage(self.local.root)
            return usage.free, usage.total
        return None

    # ------------------------------------------------------------------ looking

    def _watch(self) -> None:
        self._watched_until = self.clock.monotonic() + WATCHED_SECONDS
        self._watched.set()

    def _loop(self, step: Callable[[], None], every: float, kick: threading.Event | None) -> None:
        while not self._stopping.is_set():
            self._watched.wait()
            if self._stopping.is_set():
                return
            if self.clock.monotonic() > self._watched_until:
                self._watched.clear()
                continue
            try:
                step()
            except CkptError as error:
                log.debug("looking: %s", error)  # pages say so when they look themselves
            except Exception:
                log.exception("looking at %s", self.place)
            if kick is None:
                self._stopping.wait(every)
            elif kick.wait(every):
                kick.clear()

    def _look_at_local(self) -> None:
        for run in list(self._views):
            if self._stopping.is_set():
                return
            if self._is_stale(run):
                self._update(run)
            self._checked = self.clock.monotonic()
            self._read_notes(run)

    def _look_at_remotes(self) -> None:
        found: set[str] = set()
        error: CkptError | None = None
        for blob in self.place.blobs.values():
            try:
                found.update(remote_runs(blob))
            except CkptError as failure:
                error = failure
        if error is None or found:
            self._remote_runs = tuple(sorted(found))
        self._remote_error = error
        for run in list(self._remotes):
            changed = [remote.refresh(self.clock.monotonic) for remote in self._tiers(run)]
            if any(changed) and not self._stopping.is_set():
                self._update(run)

    def _tiers(self, run: str) -> tuple[RememberedRemote, ...]:
        with self._lock:
            if run not in self._remotes:
                self._remotes[run] = tuple(RememberedRemote(r) for r in self.place.tiers(run).remotes)
            return self._remotes[run]

    def _print(self, run: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Changes when the run does. Saves that are prepared are completed inside their own directories."""
        view = self._views.get(run)
        prepared = () if view is None else [save.path for save in view.catalog.prepared]
        local = self.local.fingerprint(run, prepared) if self.local is not None else ()
        return local, tuple(remote.revision for remote in self._tiers(run))

    def _is_stale(self, run: str) -> bool:
        seen, since = self._prints.get(run, (None, -math.inf))
        return seen != self._print(run) or self.clock.monotonic() - since > RESCAN_SECONDS

    def _update(self, run: str) -> RunView:
        with self._lock:
            lock = self._locks.setdefault(run, threading.Lock())
        if not lock.acquire(blocking=run not in self._views):
            return self._views[run]  # being made by somebody else; the last one will do
        try:
            if run in self._views and not self._is_stale(run):
                return self._views[run]
            seen = self._print(run)
            remotes = self._tiers(run)
            known = [remote for remote in remotes if remote.listed_at is not None]
            catalog = Catalog.read(self.local, known, run, tolerate_unreachable=bool(known))
            # A directory that has just changed may change again without its time telling.
            unsettled = self._is_young(seen)
            old = self._views.get(run)
            view = RunView(
                run=run,
                catalog=catalog,
                revision=1 if old is None else old.revision + 1,
                has_local=self.local is not None,
                remote_names=tuple(remote.name for remote in remotes),
                unknown_remotes=frozenset(remote.name for remote in remotes if remote.listed_at is None),
                notes=self._notes.setdefault(run, {}),
            )
            if old is not None and _same(old, view):
                view = old
            self._views[run] = view
            # Told again, because it now covers the directories of prepared saves, which the old view may not name.
            after = self._print(run)
            is_settled = not unsettled and after[1] == seen[1] and after[0][: len(seen[0])] == seen[0]
            self._prints[run] = (after if is_settled else None), self.clock.monotonic()
            return view
        finally:
            lock.release()

    def _is_young(self, seen: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        newest_ns = max(seen[0], default=0)
        return self.clock.now().timestamp() * 1e9 - newest_ns < 2e9

    def _read_notes(self, run: str) -> None:
        """Read where the time of each save went; once a save's notes name all its remotes they don't change."""
        if self.local is None:
            return
        notes = self._notes.setdefault(run, {})
        records = self._views[run].catalog.records
        for age, record in enumerate(reversed(records)):
            have = notes.get(record.save_id)
            is_growing = age < YOUNG_NOTES and not {f"remote {name}" for name in record.remote} <= (have or {}).keys()
            if have is None or is_growing:
                notes[record.save_id] = timings.read(self.local, run, record.save_id)
            if self._stopping.is_set():
                return


def _same(old: RunView, new: RunView) -> bool:
    return (old.catalog.records, old.catalog.damaged, old.catalog.prepared, old.unknown_remotes) == (
        new.catalog.records, new.catalog.damaged, new.catalog.prepared, new.unknown_remotes,
    )  # fmt: skip
