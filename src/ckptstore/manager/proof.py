"""When a checkpoint of this run was last seen to come back whole: a backup nobody has restored is a hope.

What counts is in the run's journal: a load of this or an earlier job, ``ckptctl drill``, and ``ckptctl verify`` with
``--read-data``, each of which checks every byte it reads. Where there are remotes, only bytes that came from one of
them count: the local disk is not what is left when the machine is lost.
"""

from __future__ import annotations

from collections.abc import Collection
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

    def restored(self, info: CheckpointInfo, sources: Collection[str]) -> None:
        """This job has loaded a whole checkpoint from these, every byte of it checked."""
        if sources:
            place = ", ".join(sorted(sources))
            history.note_restored(self._tier, self._run, info.step, info.save_id, place, clock=self._clock)

    def verified(self) -> set[str]:
        """Every save whose last full look, in some tier, found it good."""
        return history.sound(self._tier, self._run) if self._tier is not None else set()

    def reminder(self) -> str | None:
        """What to say, once per period, when the last verified restore is too long ago."""
        now = self._clock.now()
        latest = max(self._since, self._reminded or self._since)
        if not self._limit_s or self._tier is None or (now - latest).total_seconds() < self._limit_s:
            return None
        looks = history.verified(self._tier, self._run)
        times = [
            parse_rfc3339(look["time"])
            for look in looks
            if "time" in look and history.is_good(look) and history.places_of(look) <= self._places
        ]
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
