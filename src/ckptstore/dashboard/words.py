"""Numbers and times as people read them. Every page, and the report, words them here."""

from __future__ import annotations

from datetime import datetime

from ckptstore.ops import words


def human_bytes(size: float | None) -> str:
    """``1.5 GiB``; a dash for what is not known."""
    return words.human_bytes(size, unknown="–")


def human_seconds(seconds: float | None) -> str:
    """``42 s``, ``3 min``; below a second ``120 ms``; a dash for what is not known."""
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.0f} ms" if 0 < seconds < 1 else words.human_seconds(seconds)


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
