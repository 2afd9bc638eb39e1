"""Numbers and times as people read them: on the command line, on the dashboard's pages and in its report."""

from __future__ import annotations

from datetime import datetime, timezone


def human_bytes(size: float | None, unknown: str = "-") -> str:
    """``1.5 GiB``; binary units, three digits."""
    if size is None:
        return unknown
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """``42 s``, ``3 min``, ``5 h``, ``2 d``."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def human_age(when: datetime, now: datetime | None = None) -> str:
    """``3 min ago``."""
    return human_seconds(((now or datetime.now(timezone.utc)) - when).total_seconds()) + " ago"


def counted(number: int, noun: str) -> str:
    """``1 copy``, ``2 copies``, ``3 tensors``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
