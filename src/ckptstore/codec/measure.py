"""What a chunk is like, judged by its sample: how each byte plane of its words is best kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ckptstore.codec.sample import MOST, Counts

#: A plane above this is stored as it is: coding it would cost time for less than 2 %.
_DENSE_BITS = 7.9

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


def traits(counts: Counts) -> list[Trait]:
    """One trait for each byte of the sampled words, least significant first."""
    total = int(counts[0].sum())
    return [_trait(row, bits, total) for row, bits in zip(counts, _entropies(counts, total), strict=True)]


def cost(planes: list[Trait]) -> float:
    """Estimated stored bytes per plain byte."""
    return sum(p.cost for p in planes) / len(planes)


def with_lag(trait: Trait, lag: int, counts: Counts) -> Trait:
    """The trait with this lag if it is better with it.

    Args:
        trait: the plane as far as is known: without lag, or with the best one so far.
        lag: the one to judge.
        counts: of the differences between the plane's bytes that lie so far apart.
    """
    total = int(counts.sum())
    # Exponents that follow the earlier ones mostly equal them; without that the full count is not worth its time.
    if total - int(counts[0]) > _MOST_STEPS * total:
        return trait
    bits = _entropies(counts[None], total)[0]
    margin = 0 if trait.lag else _LAG_MARGIN_BITS
    return replace(_trait(counts, bits, total), lag=lag) if bits < trait.bits - margin else trait


def _trait(counts: Counts, bits: float, total: int) -> Trait:
    if bits > _DENSE_BITS:
        return Trait(bits, is_dense=True)
    if bits > _DENSE_BITS - 1 and not counts[1::2].any():
        return Trait(bits, is_dense=True, is_even=True)
    most = int(counts.max()) / max(1, total)
    narrow = next((n for share, n in _NARROW if most >= share), 0)
    if not narrow:
        return Trait(bits)
    bias, held = _bias(counts, (1 << narrow) - 1)
    if narrow == 4 and held < (1 - _MISFITS) * total:
        return Trait(bits)
    return Trait(bits, narrow_bits=narrow, bias=bias)


def _bias(counts: Counts, size: int) -> tuple[int, int]:
    """First of the ``size`` successive values, 0 after 255, that occur most; and how often they do."""
    around = np.cumsum(np.concatenate([[0], counts, counts[: size - 1]]))
    within = around[size:] - around[:-size]
    first = int(np.argmax(within))
    return first, int(within[first])


_X_LOG_X = np.arange(1 + MOST) * np.log2(np.maximum(1, np.arange(1 + MOST)))
_LOG_2 = np.log2(np.maximum(1, np.arange(1 + MOST))).tolist()
_LN_2 = float(np.log(2))


def _entropies(counts: Counts, total: int) -> list[float]:
    """Bits per byte for each row of counts, which has so many in all."""
    total = max(1, total)
    sums, seen = _X_LOG_X[counts].sum(axis=1).tolist(), np.count_nonzero(counts, axis=1).tolist()
    # Miller-Madow: a finite sample looks more orderly than its source.
    return [_LOG_2[total] - s / total + max(0, n - 1) / (2 * total * _LN_2) for s, n in zip(sums, seen, strict=True)]
