"""Damage as disks and people do it, for sweeps that count what `verify` finds."""

from __future__ import annotations

import random
from collections.abc import Iterator

#: A kind of damage, and what the file holds afterwards; None: it is gone.
Damaged = tuple[str, bytes | None]


def damages(data: bytes, other: bytes | None, rng: random.Random, *, flips: int) -> Iterator[Damaged]:
    """Ways to damage one file: single bits, truncations, zero-fills, deletion, a sibling's content in its place.

    Args:
        data: What it holds.
        other: What a sibling of its kind holds; None where there is none.
        rng: Chooses places.
        flips: How many single-bit flips, each on its own.
    """
    for _ in range(flips if data else 0):
        at = rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        yield "bit flip", bytes(flipped)
    for length in sorted({0, len(data) // 2, max(len(data) - 1, 0)}):
        if length < len(data):
            yield "truncation", data[:length]
    for size in (1, 64, 4096):
        start = rng.randrange(max(len(data) - size, 1)) if data else 0
        zeroed = data[:start] + bytes(len(data[start : start + size])) + data[start + size :]
        if zeroed != data:
            yield "zero-fill", zeroed
    yield "deletion", None
    if other is not None and other != data:
        yield "swap", other
