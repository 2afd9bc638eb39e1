"""What a chunk is like, measured on a small fixed sample: how each byte plane of its words is best kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ckptstore.codec.arrays import Bytes, Words

#: A plane above this is stored as it is: coding it would cost time for less than 2 %.
_DENSE_BITS = 7.9

Counts: TypeAlias = npt.NDArray[np.intp]

_RUNS = 32
_RUN_WORDS = 128

#: (share of the most frequent value, bits): from this share on a byte is cut to so many bits before coding.
_NARROW = ((0.85, 1), (0.5, 2), (0.12, 4))
#: From this share of misfits on four bits are not worth it: finding them takes longer than coding whole bytes.
_MISFITS = 0.05

#: A lag must save this many bits per byte: summing it up again costs the reader time.
_LAG_MARGIN_BITS = 0.2
_MOST_STEPS = 0.79


@dataclass(frozen=True)
class Trait:
    """One byte plane of a sample.

    Attributes:
        bits: order-0 entropy per byte, as it would be coded.
        is_dense: not worth coding.
        is_even: dense but for the lowest bit, which is zero throughout.
        narrow_bits: bits to cut its bytes to, or 0.
        bias: the value that becomes 0 when cut: the first of the range of values that holds most.
        lag: distance of the element each is best stored as a difference from, or 0.
    """

    bits: float
    is_dense: bool = False
    is_even: bool = False
    narrow_bits: int = 0
    bias: int = 0
    lag: int = 0

    @property
    def may_lag(self) -> bool:
        """Whether a lag is worth a try."""
        return not self.is_dense and self.bits > 1

    @property
    def cost(self) -> float:
        """Estimated stored bytes per byte."""
        return (7 if self.is_even else 8 if self.is_dense else self.bits) / 8


@lru_cache(maxsize=256)
def positions(count: int) -> npt.NDArray[np.int64]:
    """Indices of the sample of ``count`` words: evenly spread runs, always the same; all of them when they are few."""
    if count <= _RUNS * _RUN_WORDS:
        return np.arange(count)
    starts = np.linspace(0, count - _RUN_WORDS, _RUNS).astype(np.int64)
    return (starts[:, None] + np.arange(_RUN_WORDS)).reshape(-1)


def traits(words: Words) -> list[Trait]:
    """One trait for each byte of the sampled ``words``, least significant first."""
    octets = words.view(np.uint8).reshape(-1, words.itemsize)
    counts = _histograms(octets)
    return [_trait(c, float(b)) for c, b in zip(counts, _entropies(counts), strict=True)]


def cost(planes: list[Trait]) -> float:
    """Estimated stored bytes per plain byte."""
    return sum(p.cost for p in planes) / len(planes)


def distinct(words: Words) -> float:
    """Share of different words in a part of the sampled ``words``."""
    part = np.sort(words[::4])
    return (np.count_nonzero(part[1:] != part[:-1]) + 1) / max(1, len(part))


def with_lag(trait: Trait, lag: int, octets: Bytes, before: Bytes) -> Trait:
    """The trait with this lag if it is better with it.

    Args:
        trait: the plane as far as is known: without lag, or with the best one so far.
        lag: the one to judge.
        octets: some of the plane's bytes.
        before: for each, the byte so far before it.
    """
    steps = octets - before
    # Exponents that follow the earlier ones mostly equal them; without that the full count is not worth its time.
    if np.count_nonzero(steps) > _MOST_STEPS * len(steps):
        return trait
    counts = _histograms(steps[:, None])
    bits = float(_entropies(counts)[0])
    margin = 0 if trait.lag else _LAG_MARGIN_BITS
    return replace(_trait(counts[0], bits), lag=lag) if bits < trait.bits - margin else trait


def _trait(counts: Counts, bits: float) -> Trait:
    if bits > _DENSE_BITS:
        return Trait(bits, is_dense=True)
    if bits > _DENSE_BITS - 1 and not counts[1::2].any():
        return Trait(bits, is_dense=True, is_even=True)
    most = counts.max() / max(1, counts.sum())
    narrow = next((n for share, n in _NARROW if most >= share), 0)
    if not narrow:
        return Trait(bits)
    bias, held = _bias(counts, (1 << narrow) - 1)
    if narrow == 4 and held < (1 - _MISFITS) * counts.sum():
        return Trait(bits)
    return Trait(bits, narrow_bits=narrow, bias=bias)


def _bias(counts: Counts, size: int) -> tuple[int, int]:
    """First of the ``size`` successive values, 0 after 255, that occur most; and how often they do."""
    around = np.cumsum(np.concatenate([[0], counts, counts[: size - 1]]))
    within = around[size:] - around[:-size]
    first = int(np.argmax(within))
    return first, int(within[first])


def _histograms(octets: Bytes) -> Counts:
    """Counts of each value in each column."""
    width = octets.shape[1]
    return np.bincount((octets + _COLUMNS[:width]).reshape(-1), minlength=256 * width).reshape(width, 256)


_COLUMNS = 256 * np.arange(8)
_X_LOG_X = np.arange(1 + _RUNS * _RUN_WORDS) * np.log2(np.maximum(1, np.arange(1 + _RUNS * _RUN_WORDS)))


def _entropies(counts: Counts) -> npt.NDArray[np.float64]:
    """Bits per byte for each row of counts, of a sample at most."""
    total = np.maximum(1, counts.sum(axis=1))
    bits = np.log2(total) - _X_LOG_X[counts].sum(axis=1) / total
    # Miller-Madow: a finite sample looks more orderly than its source.
    seen = np.count_nonzero(counts, axis=1)
    return np.asarray(bits + np.maximum(0, seen - 1) / (2 * total * np.log(2)))
