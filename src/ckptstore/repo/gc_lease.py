"""One collector at a time, by the server's clock alone.

A lease is a small object whose time the server writes; its age is the difference to the time of another object written
just now. So neither a wrong clock here nor one on another machine matters. A holder that stalls for longer than the
lease loses it, and finds out before it deletes more. Nothing rests on the lease but economy: two collectors at once
would be safe, see :mod:`ckptstore.repo.condemned`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from ckptstore.blob.base import BlobStore, ObjectInfo
from ckptstore.clock import SYSTEM_CLOCK, Clock, new_nonce
from ckptstore.errors import CheckpointExistsError, CkptError, LockedError, TransientError
from ckptstore.format.manifest import canonical
from ckptstore.repo.remote import modified

FOLDER = "gc/"
LEASE_SECONDS = 900.0

_LEASE = re.compile(r"gc/lease-([0-9]{1,5})-of-([0-9]{1,5})-([0-9]{8,12})\.json")


class ServerTime:
    """What time it is for the server: asked once, then carried on by a clock that never jumps."""

    def __init__(self, blob: BlobStore, clock: Clock = SYSTEM_CLOCK) -> None:
        """Ask: write an object, look at its time, remove it.

        Raises:
            TransientError: a listing does not show the object, so no listing of this store can be believed now.
        """
        self._clock = clock
        key = f"{FOLDER}clock-{new_nonce()}"
        blob.put(key, b"", if_absent=True)
        try:
            info = blob.head(key)
            if info is None or key not in {found.key for found in blob.list(FOLDER)}:
                raise TransientError(f"{blob.url} does not list what was just written", hint="try again later")
            self._asked = modified(info)
        finally:
            with suppress(CkptError):
                blob.delete([key])
        self._at = clock.monotonic()

    def now(self) -> datetime:
        """The server's time."""
        return self._asked + timedelta(seconds=self._clock.monotonic() - self._at)


@dataclass(frozen=True)
class _Found:
    key: str
    index: int
    count: int
    epoch: int
    modified: datetime

    @property
    def rank(self) -> tuple[int, str]:
        """Of two that overlap, the smaller one holds."""
        return self.epoch, self.key

    def overlaps(self, index: int, count: int) -> bool:
        """Parts of one division don't get in each other's way."""
        return count != self.count or index == self.index


class Lease:
    """The right to collect one part of a store; use as a context manager.

    Args:
        blob: The store.
        time: Its time.
        part: ``(i, n)``; parts of the same ``n`` may be collected at once.
    """

    def __init__(self, blob: BlobStore, time: ServerTime, part: tuple[int, int] = (0, 1)) -> None:
        self._blob = blob
        self._time = time
        self._index, self._count = part
        self._key = ""
        self._renewed = 0.0

    def __enter__(self) -> Lease:
        """Take it.

        Raises:
            LockedError: somebody else has it.
        """
        others = self._overlapping()
        self._refuse(others)
        epoch = 1 + max((lease.epoch for lease in others), default=0)
        self._key = f"{FOLDER}lease-{self._index}-of-{self._count}-{epoch:08d}.json"
        body = canonical({"format": "ckptstore", "version": 1, "seconds": LEASE_SECONDS})
        try:
            self._blob.put(self._key, body, if_absent=True)
        except CheckpointExistsError:
            raise _locked("somebody else has just begun to collect") from None
        now = [lease for lease in self._overlapping() if lease.key != self._key]
        try:
            self._refuse([lease for lease in now if lease.rank < (epoch, self._key)])
        except LockedError:
            self._blob.delete([self._key])
            raise
        if stale := [lease.key for lease in now if self._is_stale(lease)]:
            self._blob.delete(stale)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(CkptError):
            self._blob.delete([self._key])

    def check(self) -> None:
        """Make sure that it is still ours, and for long enough; call it before each batch of deletions.

        Raises:
            LockedError: it was lost; stop.
        """
        info = self._blob.head(self._key)
        if info is None:
            raise _locked("the lease was lost: this collector was too slow")
        if self._time.now() - modified(info) > timedelta(seconds=LEASE_SECONDS / 3):
            self._blob.put(self._key, self._blob.get(self._key))

    def _overlapping(self) -> list[_Found]:
        found = (_parse(info) for info in self._blob.list(f"{FOLDER}lease-"))
        return [lease for lease in found if lease is not None and lease.overlaps(self._index, self._count)]

    def _is_stale(self, lease: _Found) -> bool:
        return self._time.now() - lease.modified > timedelta(seconds=LEASE_SECONDS)

    def _refuse(self, leases: list[_Found]) -> None:
        for lease in leases:
            if not self._is_stale(lease):
                age = (self._time.now() - lease.modified).total_seconds()
                raise _locked(f"somebody is collecting part {lease.index}/{lease.count}, last seen {age:.0f} s ago")


def _parse(info: ObjectInfo) -> _Found | None:
    match = _LEASE.fullmatch(info.key)
    if match is None:
        return None
    return _Found(info.key, int(match[1]), int(match[2]), int(match[3]), modified(info))


def _locked(what: str) -> LockedError:
    return LockedError(what, hint=f"wait until it is done; a dead one counts for {LEASE_SECONDS / 60:.0f} min")
