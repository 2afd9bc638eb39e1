"""Large bodies in parts: how many, how large, and sending them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

#: Source: S3 and OSS both allow 10 000 parts of 5 GiB at most.
MAX_PARTS = 10_000
_ROUND = 1024**2


@dataclass(frozen=True)
class Part:
    """One part: its number, counted from 1, and its bytes."""

    number: int
    start: int
    stop: int


def parts_of(size_bytes: int, part_bytes: int) -> list[Part]:
    """Cut a body into parts of ``part_bytes``, or of more if there would be too many; all but the last equal."""
    least = -(-size_bytes // MAX_PARTS)
    part_bytes = max(part_bytes, -(-least // _ROUND) * _ROUND)
    starts = range(0, size_bytes, part_bytes)
    return [Part(index + 1, start, min(start + part_bytes, size_bytes)) for index, start in enumerate(starts)]


def send_parts(parts: Sequence[Part], send: Callable[[Part], T], pool: Executor) -> list[T]:
    """Send all parts and return the answers in order. At the first failure those not begun are dropped.

    Nothing is in flight any more when this returns or raises, so the upload can be completed or aborted.
    """
    futures = [pool.submit(send, part) for part in parts]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
