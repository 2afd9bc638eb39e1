"""Words into planes of equal significance and back."""

from __future__ import annotations

import numpy as np

from ckptstore.codec.base import WORD, Words
from ckptstore.codec.measure import Trait
from ckptstore.codec.scratch import SCRATCH


def group(traits: list[Trait]) -> list[int]:
    """Word bytes per plane, least significant first: dense neighbours stay together, others stand alone."""
    groups, index = [], 0
    while index < len(traits):
        dense = 0
        while index + dense < len(traits) and traits[index + dense].is_dense:
            dense += 1
        size = max((w for w in WORD if w <= dense), default=1)
        groups.append(size)
        index += size
    return groups


def buffers(groups: list[int], count: int) -> list[Words]:
    """This thread's buffers for the planes of ``count`` words."""
    return [SCRATCH.words(f"plane{i}", count, size) for i, size in enumerate(groups)]


def split(words: Words, start: int, planes: list[Words]) -> None:
    """Write a block of ``words`` into ``planes`` from position ``start`` on."""
    shift = 0
    for plane in planes:
        np.right_shift(words, shift, out=plane[start : start + len(words)], casting="unsafe")
        shift += 8 * plane.itemsize


def join(planes: list[Words], start: int, out: Words) -> None:
    """Undo :func:`split` for the block that ``out`` is."""
    np.copyto(out, planes[-1][start : start + len(out)], casting="unsafe")
    for plane in reversed(planes[:-1]):
        np.left_shift(out, 8 * plane.itemsize, out=out)
        np.bitwise_or(out, plane[start : start + len(out)], out=out)
