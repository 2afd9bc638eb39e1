"""What a chunk is like, measured on a small fixed sample: how each byte plane of its words is best kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckptstore.codec.base import Bytes, Words

#: A plane above this is stored as it is: coding it would cost time for less than 2 %.
_DENSE_BITS = 7.9

_RUNS = 32
_RUN_WORDS = 256

#: Share of zeros from which elements are cut to so many bits before coding; the densest rule that applies wins.
_NARROW = ((0.85, 1), (0.5, 2), (0.2, 4))

#: A lag must save this many bits per byte: summing it up again costs the reader time.
_LAG_MARGIN_BITS = 0.2


@dataclass(frozen=True)
class Trait:
    """One byte plane of a sample.

    Attributes:
        bits: order-0 entropy per byte, as it would be coded.
        is_dense: not worth coding.
        is_even: dense but for the lowest bit, which is zero throughout.
        narrow_bits: bits to cut its bytes to, or 0.
        lag: distance of the element each is best stored as a difference from, or 0.
    """

    bits: float
    is_dense: bool = False
    is_even: bool = False
    narrow_bits: int = 0
    lag: int = 0

    @property
    def may_lag(self) -> bool:
        """Whether a lag is worth a try."""
        return not self.is_dense and not self.narrow_bits and self.bits > 1

    @property
    def cost(self) -> float:
        """Estimated stored bytes per byte."""
        return (7 if self.is_even else 8 if self.is_dense else self.bits) / 8


def positions(count: int) -> npt.NDArray[np.int64]:
    """Indices of the sample of ``count`` words: evenly spread runs, always the same; all of them when they are few."""
    if count <= _RUNS * _RUN_WORDS:
        return np.arange(count)
    starts = np.linspace(0, count - _RUN_WORDS, _RUNS).astype(np.int64)
    return (starts[:, None] + np.arange(_RUN_WORDS)).reshape(-1)


def traits(words: Words) -> list[Trait]:
    """One trait for each byte of the sampled ``words``, least significant first."""
    octets = words.view(np.uint8).reshape(-1, words.itemsize)
    return [_trait(octets[:, i]) for i in range(words.itemsize)]


def cost(planes: list[Trait]) -> float:
    """Estimated stored bytes per plain byte."""
    return sum(p.cost for p in planes) / len(planes)


def distinct(words: Words) -> float:
    """Share of different words in a thinner sample."""
    picked = np.sort(words[positions(len(words))[::4]])
    return (np.count_nonzero(picked[1:] != picked[:-1]) + 1) / max(1, len(picked))


def with_lag(trait: Trait, pairs: dict[int, tuple[Bytes, Bytes]]) -> Trait:
    """The trait, with the lag that codes the plane best, if one is worth it.

    Args:
        trait: the plane without lag.
        pairs: lag -> (some of the plane's bytes, the bytes so far before each of them).
    """
    best = trait
    for lag, (octets, before) in pairs.items():
        bits = _entropy(np.bincount(octets - before, minlength=256))
        if bits < min(best.bits, trait.bits - _LAG_MARGIN_BITS):
            best = Trait(bits, lag=lag)
    return best


def _trait(octets: Bytes) -> Trait:
    counts = np.bincount(octets, minlength=256)
    bits = _entropy(counts)
    if bits > _DENSE_BITS:
        return Trait(bits, is_dense=True)
    if not counts[1::2].any() and bits > _DENSE_BITS - 1:
        return Trait(bits, is_dense=True, is_even=True)
    zeros = counts[0] / max(1, len(octets))
    return Trait(bits, narrow_bits=next((n for share, n in _NARROW if zeros >= share), 0))


def _entropy(counts: npt.NDArray[np.intp]) -> float:
    total = int(counts.sum())
    if not total:
        return 0.0
    seen = counts[counts > 0]
    bits = float(np.log2(total) - (seen * np.log2(seen)).sum() / total)
    # Miller-Madow: a finite sample looks more orderly than its source.
    return bits + (len(seen) - 1) / (2 * total * float(np.log(2)))
