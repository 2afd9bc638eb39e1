"""A chunk's sample: always the same few of its words, and how often each value occurs among their bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ckptstore import native
from ckptstore.codec import words
from ckptstore.codec.arrays import WORD, Bytes, Words

#: Places of words in a chunk.
Places: TypeAlias = npt.NDArray[np.int64]
#: How often each of 256 values occurs, or one row of that for each byte of a word, least significant first.
Counts: TypeAlias = npt.NDArray[np.int64]

_RUNS = 32
_RUN_WORDS = 128
#: Words in a sample at most.
MOST = _RUNS * _RUN_WORDS


@lru_cache(maxsize=256)
def places(count: int) -> Places:
    """Where the sample of ``count`` words lies: evenly spread runs; everywhere when they are few."""
    if count <= MOST:
        return np.arange(count, dtype=np.int64)
    starts = np.linspace(0, count - _RUN_WORDS, _RUNS).astype(np.int64)
    return (starts[:, None] + np.arange(_RUN_WORDS)).reshape(-1)


def histograms(numbers: Words, old: Words | None, at: Places) -> Counts:
    """Counts for each byte of the words at these places, mapped as :func:`ckptstore.codec.planes.split` does."""
    width = numbers.itemsize
    if native.is_available():
        counts = np.zeros((width, 256), np.int64)
        native.histograms(numbers, old, at, counts)
        return counts
    octets = _mapped(numbers, old, at).view(np.uint8).reshape(-1, width)
    return _count((octets + _COLUMNS[:width]).reshape(-1), width).reshape(width, 256)


def steps(numbers: Words, old: Words | None, at: Places, lag: int) -> Counts:
    """Counts for what the top bytes of the mapped words at these places exceed those ``lag`` words before them by."""
    if native.is_available():
        counts = np.zeros(256, np.int64)
        native.steps(numbers, old, at, lag, counts)
        return counts
    return _count(_top_bytes(_mapped(numbers, old, at)) - _top_bytes(_mapped(numbers, old, at - lag)), 1)


def distinct(numbers: Words, at: Places) -> float:
    """Share of different words in a part of those at these places."""
    part = np.sort(numbers[at[::4]])
    return float(np.count_nonzero(part[1:] != part[:-1]) + 1) / max(1, len(part))


def _mapped(numbers: Words, old: Words | None, at: Places) -> Words:
    out = numbers[at]
    if old is not None:
        words.difference(numbers[at], old[at], out, np.empty_like(out))
        return out
    size = words.head_bytes(numbers.itemsize)
    head = out.view(WORD[size])[numbers.itemsize // size - 1 :: numbers.itemsize // size]
    raw = head.copy()
    words.rotate(raw, head, np.empty_like(raw))
    return out


def _top_bytes(mapped: Words) -> Bytes:
    return mapped.view(np.uint8)[mapped.itemsize - 1 :: mapped.itemsize]


def _count(values: npt.NDArray[np.integer], rows: int) -> Counts:
    return np.bincount(values, minlength=256 * rows).astype(np.int64, copy=False)


_COLUMNS = 256 * np.arange(8)
