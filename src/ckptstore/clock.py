"""Time and randomness, injected so that tests can hold them still."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    """What the store needs of time: wall time for people, a monotonic one for waits."""

    def now(self) -> datetime:
        """Aware UTC wall time."""

    def monotonic(self) -> float:
        """Seconds that never jump."""

    def sleep(self, seconds: float) -> None:
        """Block this thread."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class ManualClock:
    """A clock for tests that moves only when told."""

    wall: datetime = field(default_factory=lambda: datetime(2026, 1, 1, tzinfo=timezone.utc))
    elapsed: float = 0.0

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.elapsed

    def sleep(self, seconds: float) -> None:
        from datetime import timedelta

        self.elapsed += seconds
        self.wall += timedelta(seconds=seconds)


SYSTEM_CLOCK: Clock = SystemClock()


def new_nonce() -> str:
    """12 lower-case hex digits, for job ids and temporary names."""
    return secrets.token_hex(6)


def rfc3339(when: datetime) -> str:
    """``2026-11-25T12:00:00.123Z``; sortable, as every time in this project is written."""
    return when.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: str) -> datetime:
    """Inverse of :func:`rfc3339`."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
