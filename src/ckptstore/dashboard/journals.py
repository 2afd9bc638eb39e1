"""The journals of the local tier, each read again only when it has grown."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from ckptstore.clock import parse_rfc3339
from ckptstore.ops.history import sound_of
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier


@dataclass(frozen=True)
class Look:
    """One look at a copy of a checkpoint, as it was noted."""

    at: datetime
    step: int
    save_id: str
    tier: str
    depth: str
    result: str
    what: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Look | None:
        """None for a line that is not what we write."""
        at, step = when(record), record.get("step")
        if at is None or not isinstance(step, int):
            return None
        words = {name: str(record.get(name, "")) for name in ("save_id", "tier", "depth", "result", "what")}
        return cls(at, step, **words)

    @property
    def is_proof(self) -> bool:
        """Whether every byte was read and was right."""
        return self.result == "good" and self.depth in ("bytes", "restore")


class Journals:
    """What happened to each run, as noted on this machine. Thread-safe; empty without a local tier."""

    def __init__(self, tier: LocalTier | None) -> None:
        self._tier = tier
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], tuple[tuple[int, int], list[dict[str, Any]]]] = {}

    def records(self, run: str, name: journal.Name) -> list[dict[str, Any]]:
        """Every record, oldest first."""
        if self._tier is None:
            return []
        stamp = self.stamp(run, name)
        with self._lock:
            known = self._seen.get((run, name))
            if known is None or known[0] != stamp:
                known = self._seen[run, name] = stamp, journal.read(self._tier, run, name) if stamp[1] else []
            return known[1]

    def stamp(self, run: str, name: journal.Name) -> tuple[int, int]:
        """Changes when the journal does."""
        if self._tier is not None:
            with suppress(OSError):
                status = os.lstat(journal.path_of(self._tier, run, name))
                return status.st_mtime_ns, status.st_size
        return 0, 0

    def rules(self, run: str) -> dict[str, Any] | None:
        """The retention in force, as the last job's manager noted it."""
        records = self.records(run, "rules")
        return records[-1] if records else None

    def looks(self, run: str, save_id: str | None = None, *, most: int = 20) -> list[Look]:
        """Looks at the copies of one checkpoint, or of all, newest first."""
        found = (look for record in reversed(self.records(run, "verified")) if (look := Look.of(record)) is not None)
        return list(islice((look for look in found if save_id in (None, look.save_id)), most))

    def read_back_at(self, run: str) -> datetime | None:
        """When a checkpoint was last read back, every byte of it, and found good."""
        for record in reversed(self.records(run, "verified")):
            look = Look.of(record)
            if look is not None and look.is_proof:
                return look.at
        return None

    def well_read(self, run: str) -> frozenset[str]:
        """save_ids with a copy whose last look at every byte found it good."""
        return frozenset(sound_of(self.records(run, "verified")))


def when(record: Mapping[str, Any]) -> datetime | None:
    """The time of a record; None if it has none that can be read."""
    with suppress(ValueError, TypeError, AttributeError):
        return parse_rfc3339(record["time"]) if "time" in record else None
    return None
