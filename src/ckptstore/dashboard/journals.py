"""The journals of the local tier, each read again only when it has grown."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from ckptstore.clock import parse_rfc3339
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier


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
        stamp = (0, 0)
        with suppress(OSError):
            status = os.lstat(journal.path_of(self._tier, run, name))
            stamp = status.st_mtime_ns, status.st_size
        with self._lock:
            known = self._seen.get((run, name))
            if known is None or known[0] != stamp:
                known = self._seen[run, name] = stamp, journal.read(self._tier, run, name) if stamp[1] else []
            return known[1]

    def rules(self, run: str) -> dict[str, Any] | None:
        """The retention in force, as the last job's manager noted it."""
        records = self.records(run, "rules")
        return records[-1] if records else None

    def verified(self, run: str, save_id: str) -> list[dict[str, Any]]:
        """Looks at the copies of one checkpoint, newest first."""
        return [record for record in reversed(self.records(run, "verified")) if record.get("save_id") == save_id]

    def read_back_at(self, run: str) -> datetime | None:
        """When a checkpoint was last read back, every byte of it, and found good."""
        for record in reversed(self.records(run, "verified")):
            if record.get("result") == "good" and record.get("depth") in ("bytes", "restore"):
                return when(record)
        return None

    def well_read(self, run: str) -> frozenset[str]:
        """save_ids whose every byte was read and found good, and never damaged since."""
        good: set[str] = set()
        for record in self.records(run, "verified"):
            if record.get("result") == "damaged":
                good.discard(str(record.get("save_id")))
            elif record.get("result") == "good" and record.get("depth") in ("bytes", "restore"):
                good.add(str(record.get("save_id")))
        return frozenset(good)


def when(record: Mapping[str, Any]) -> datetime | None:
    """The time of a record; None if it has none that can be read."""
    with suppress(ValueError, TypeError, AttributeError):
        return parse_rfc3339(record["time"]) if "time" in record else None
    return None
