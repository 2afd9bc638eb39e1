"""Words into planes of equal significance and back, by way of a reversible map.

The map is either the difference from a base, over the whole word, or the rotation, over the word's *head* only: its
top two bytes (one in words of a byte), which hold sign, exponent and first fraction bits. The rest needs no map, and
half-words are mapped twice as fast. Head and rest never share a plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptstore import native
from ckptstore.codec import words
from ckptstore.codec.arrays import WORD, Words
from ckptstore.codec.base import BLOCK
from ckptstore.codec.frame import damaged
from ckptstore.codec.measure import Trait
from ckptstore.codec.scratch import SCRATCH


def group(traits: list[Trait]) -> list[int]:
    """Word bytes per plane, least significant first: dense neighbours stay together, others stand alone."""
    rest = len(traits) - words.head_bytes(len(traits))
    return _group(traits[:rest]) + _group(traits[rest:])


def split(numbers: Words, old: Words | None, groups: list[int], first: Words | None = None) -> list[Words]:
    """The planes of ``numbers``, mapped against ``old`` or rotated; this thread's buffers, but for ``first``."""
    count, width = len(numbers), numbers.itemsize
    planes = [SCRATCH.words(f"plane{i}", count, size) for i, size in enumerate(groups)]
    if first is not None:
        planes[0] = first
    if native.is_available():
        native.split(numbers, old, planes)
        return planes
    rest = _planes_below_head(groups, width)
    length = min(BLOCK, count)
    spare = SCRATCH.words("spare", length, width)
    for start in range(0, count, BLOCK):
        block = numbers[start : start + BLOCK]
        slices = [p[start : start + BLOCK] for p in planes]
        if old is None:
            _take_apart(block, slices[:rest], spare[: len(block)])
            head = _rotated_head(block, spare[: len(block)])
            _take_apart(head, slices[rest:], SCRATCH.words("head spare", len(head), head.itemsize))
        else:
            difference = SCRATCH.words("difference", len(block), width)
            words.difference(block, old[start : start + BLOCK], difference, spare[: len(block)])
            _take_apart(difference, slices[:rest], spare[: len(block)])
            head = _raw_head(difference, spare[: len(block)])
            _take_apart(head, slices[rest:], SCRATCH.words("head spare", len(head), head.itemsize))
    return planes


def join(planes: Sequence[Words], old: Words | None, *, rotated: bool, out: Words) -> None:
    """Undo :func:`split`: against ``old`` if there is one, else as told. ``old`` may be what ``out`` holds.

    Raises:
        IntegrityError: the planes can't come from :func:`split`.
    """
    count, width = len(out), out.itemsize
    rest = _planes_below_head([p.itemsize for p in planes], width)
    if native.is_available():
        native.join(planes, old, rotated=rotated, out=out)
        return
    is_in_place = old is not None and np.may_share_memory(old, out)
    for start in range(0, count, BLOCK):
        block = out[start : start + BLOCK]
        slices = [p[start : start + BLOCK] for p in planes]
        before = None if old is None else old[start : start + BLOCK]
        if is_in_place and before is not None:
            before = SCRATCH.words("before", len(block), width)
            np.copyto(before, block)
        head = SCRATCH.words("head", len(block), words.head_bytes(width))
        _put_together(slices[rest:], head)
        if rotated:
            words.unrotate(head, SCRATCH.words("head spare", len(block), head.itemsize))
        _put_together([*slices[:rest], head], block)
        if before is not None:
            words.undifference(block, before, SCRATCH.words("spare", len(block), width))


def _group(traits: list[Trait]) -> list[int]:
    groups, index = [], 0
    while index < len(traits):
        dense = 0
        while index + dense < len(traits) and traits[index + dense].is_dense:
            dense += 1
        size = max((w for w in WORD if w <= dense), default=1)
        groups.append(size)
        index += size
    return groups


def _planes_below_head(groups: list[int], width: int) -> int:
    covered = np.cumsum([0, *groups]).tolist()
    if width - words.head_bytes(width) not in covered:
        raise damaged("a plane spans head and rest of its words")
    return int(covered.index(width - words.head_bytes(width)))


def _raw_head(block: Words, spare: Words) -> Words:
    size = words.head_bytes(block.itemsize)
    if size == block.itemsize:
        return block
    raw = SCRATCH.words("raw head", len(block), size)
    np.right_shift(block, 8 * (block.itemsize - size), out=spare)
    np.copyto(raw, spare, casting="unsafe")
    return raw


def _rotated_head(block: Words, spare: Words) -> Words:
    raw = _raw_head(block, spare)
    head = SCRATCH.words("head", len(block), raw.itemsize)
    words.rotate(raw, head, SCRATCH.words("head spare", len(block), raw.itemsize))
    return head


def _take_apart(block: Words, planes: Sequence[Words], spare: Words) -> None:
    shift = 0
    for plane in planes:
        # A shift and a narrowing copy are faster than one shift that narrows.
        source = np.right_shift(block, shift, out=spare) if shift else block
        np.copyto(plane, source, casting="unsafe")
        shift += 8 * plane.itemsize


def _put_together(planes: Sequence[Words], out: Words) -> None:
    np.copyto(out, planes[-1], casting="unsafe")
    for plane in reversed(planes[:-1]):
        np.left_shift(out, 8 * plane.itemsize, out=out)
        np.bitwise_or(out, plane, out=out)
