"""Numbers and times as people read them. Every page, and the report, words them here."""

from __future__ import annotations

from datetime import datetime


def human_bytes(size: float | None) -> str:
    """``1.5 GiB``; binary units, three digits."""
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float | None) -> str:
    """``42 s``, ``3 min``, ``5 h``, ``2 d``; below a second ``120 ms``."""
    if seconds is None:
        return "–"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def human_number(value: float | str | None) -> str:
    """A metric: four digits, and non-finite values by name."""
    if value is None:
        return "–"
    return f"{float(value):.4g}"


def count(number: int, word: str) -> str:
    """``1 checkpoint``, ``2 checkpoints``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def utc(when: datetime | None) -> str:
    """``2026-11-25 12:00:00 UTC``."""
    return "–" if when is None else when.strftime("%Y-%m-%d %H:%M:%S UTC")
