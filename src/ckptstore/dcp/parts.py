"""Slots and parts: where a stored piece and memory of the target overlap, and how chunks of the one get into the other.

A chunk is a run of elements of its piece. Where it is a run of the slot's memory too it can be read straight into it,
otherwise it is copied from a buffer, box by box.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ckptstore.dcp.boxes import Box, copyable
from ckptstore.dcp.geometry import Shape, boxes_of_run, is_run, overlap
from ckptstore.format.manifest import Piece


@dataclass(frozen=True)
class Slot:
    """Memory that is to hold a box of a stored tensor.

    Attributes:
        key: dotted name in the target.
        name: stored name.
        box: local memory and its place in the global tensor.
    """

    key: str
    name: str
    box: Box


@dataclass(frozen=True)
class Part:
    """The overlap of one stored piece with one slot."""

    slot: Slot
    rank: int
    piece_index: int
    piece: Piece
    offsets: Shape
    shape: Shape
    dtype: torch.dtype
    chunk_elements: int
    chunk_bytes: tuple[int, ...]


def chunks_touched(part: Part) -> Iterator[int]:
    """Numbers of the piece's chunks that hold something of this part."""
    if part.shape == part.piece.shape:
        yield from range(len(part.chunk_bytes))
        return
    at = tuple(o - p for o, p in zip(part.offsets, part.piece.offsets, strict=True))
    for number in range(len(part.chunk_bytes)):
        start = number * part.chunk_elements
        count = min(part.chunk_elements, prod(part.piece.shape) - start)
        if any(
            overlap(offsets, shape, at, part.shape) is not None
            for offsets, shape in boxes_of_run(part.piece.shape, start, count)
        ):
            yield number


def memory_of(part: Part, number: int) -> memoryview | None:
    """The target's own memory for a chunk that is a run there, wholly wanted and in no need of conversion."""
    box = part.slot.box
    local, dtype = box.local, part.dtype
    if (
        local.dtype != dtype
        or local.device.type != "cpu"
        or not local.is_contiguous()
        or local.is_conj()
        or local.is_neg()
    ):
        return None
    start, size = number * part.chunk_elements, part.chunk_bytes[number]
    count = size // dtype.itemsize
    at = tuple(o - p for o, p in zip(part.offsets, part.piece.offsets, strict=True))
    first = is_run(part.piece.shape, at, part.shape)
    target_at = tuple(o - b for o, b in zip(part.offsets, box.offsets, strict=True))
    target_first = is_run(box.shape, target_at, part.shape)
    if first is None or target_first is None:
        return None
    if start < first or start + count > first + prod(part.shape):
        return None
    address = local.data_ptr() + (target_first + (start - first)) * dtype.itemsize
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def scatter(part: Part, start: int, data: memoryview) -> None:
    """Copy what is wanted of a chunk that begins at element ``start`` of the piece into the slot, box by box."""
    chunk = torch.from_numpy(np.frombuffer(data, np.uint8)).view(part.dtype)
    box = part.slot.box
    at = tuple(o - p for o, p in zip(part.offsets, part.piece.offsets, strict=True))
    shift = tuple(p - b for p, b in zip(part.piece.offsets, box.offsets, strict=True))
    position = 0
    for offsets, shape in boxes_of_run(part.piece.shape, start, chunk.numel()):
        count = prod(shape)
        run = chunk[position : position + count].view(shape)
        position += count
        common = overlap(offsets, shape, at, part.shape)
        if common is None:
            continue
        where, extent = common
        source = run[tuple(slice(w - o, w - o + e) for w, o, e in zip(where, offsets, extent, strict=True))]
        target = box.local[tuple(slice(w + s, w + s + e) for w, s, e in zip(where, shift, extent, strict=True))]
        target, source = copyable(target), copyable(source)
        # Converted first: torch copies float16 into a negated float32 view with the wrong sign.
        target.copy_(source if source.dtype == target.dtype else source.to(target.dtype))
