"""When a checkpoint of this run was last seen to come back whole: a backup nobody has restored is a hope.

What counts is in the run's journal: a load of this or an earlier job, ``ckptctl drill``, and ``ckptctl verify`` with
``--read-data``, each of which checks every byte it reads. Where there are remotes, only bytes that came from one of
them count: the local disk is not what is left when the machine is lost.
"""

from __future__ import annotations

from datetime import datetime

from ckptstore.clock import SYSTEM_CLOCK, Clock, parse_rfc3339
from ckptstore.ops import history
from ckptstore.ops.words import human_seconds
from ckptstore.repo.catalog import LOCAL
from ckptstore.repo.local import LocalTier
from ckptstore.store import CheckpointStore
from ckptstore.types import CheckpointInfo


class Proof:
    """Watches the age of the last verified restore, on rank 0.

    Args:
        limit_s: when to remind; 0: never.
    """

    def __init__(self, store: CheckpointStore, *, limit_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._tier = LocalTier(store.local) if store.local is not None else None
        self._run, self._limit_s, self._clock = store.run, limit_s, clock
        self._places = frozenset(store.remotes) or frozenset({LOCAL})
        remote = next(iter(store.remotes.values()), None)
        what = f"drill -s {store.local} --remote '{remote}'" if remote else f"verify -s {store.local} --read-data"
        self._command = f"ckptctl {what} --run {store.run}"
        self._since = clock.now()  # a job gets this long before it is reminded
        self._reminded: datetime | None = None

    def restored(self, info: CheckpointInfo) -> None:
        """This job has loaded a checkpoint, every byte of it checked."""
        sources = {name for name, size in info.report.bytes_by_source.items() if size} if info.report else set()
        place = ", ".join(sorted(sources)) if sources and sources <= self._places else LOCAL
        history.note_restored(self._tier, self._run, info.step, info.save_id, place, clock=self._clock)

    def verified(self) -> set[str]:
        """Every save that was read in full and found good, wherever it was read."""
        return {str(record["save_id"]) for record in self._good()}

    def reminder(self) -> str | None:
        """What to say, once per period, when the last verified restore is too long ago."""
        now = self._clock.now()
        latest = max(self._since, self._reminded or self._since)
        if not self._limit_s or self._tier is None or (now - latest).total_seconds() < self._limit_s:
            return None
        times = [parse_rfc3339(record["time"]) for record in self._good() if self._is_here(record["tier"])]
        last = max(times, default=None)
        self._since = max(self._since, last or self._since)
        if (now - self._since).total_seconds() < self._limit_s:
            return None
        self._reminded = now
        where = "" if self._places == {LOCAL} else f" from {' or '.join(sorted(self._places))}"
        when = f"was {human_seconds((now - last).total_seconds())} ago" if last is not None else "never happened"
        return (
            f"the last verified restore of run {self._run!r}{where} {when}: `{self._command}` tries one beside the job"
        )

    def _good(self) -> list[dict[str, str]]:
        found = history.verified(self._tier, self._run) if self._tier is not None else []
        return [r for r in found if r.get("result") == "good" and r.get("depth") in ("restore", "bytes")]

    def _is_here(self, places: str) -> bool:
        return set(places.split(", ")) <= self._places
