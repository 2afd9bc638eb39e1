"""Loading: stored chunks into the target's memory, whatever boxes were stored and whatever boxes are wanted.

A chunk is a run of elements of a stored box. Where such a run is a run of the target's memory too, it is read straight
into it; otherwise into a buffer of one chunk per thread and from there, box by box, into place. So memory stays at the
target plus a few chunks.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.boxes import copyable, dtype_of
from ckptstore.dcp.geometry import Shape, boxes_of_run, is_run, overlap
from ckptstore.dcp.stored import ChunkSource
from ckptstore.dcp.target import Matched, Matcher, Slot
from ckptstore.errors import CkptError, IncompleteCheckpointError, LoadMismatchError
from ckptstore.format.manifest import Piece
from ckptstore.types import LoadReport

#: Chunks are handed to threads in batches of about this many bytes.
_BATCH_BYTES = 8 << 20
_LISTED = 20


def load_into(
    state: Mapping[Any, Any],
    source: ChunkSource,
    *,
    only: Iterable[str] = (),
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    rank: int = 0,
    agreement: Agreement | None = None,
    threads: int | None = None,
) -> LoadReport:
    """Fill ``state`` from a checkpoint. Collective with an agreement, which supplies the rank; local without.

    Modules, optimizers and tensors are filled in place, without a hook or a step; other leaves are replaced in their
    nearest mutable container; objects with ``load_state_dict`` are handed their state. Top-level keys that ``state``
    doesn't have are not read. Rank r gets the ``per_rank`` values of rank r modulo the world that saved.

    Args:
        only: globs of dotted names; nothing else is touched or read.
        rename: stored prefix -> target prefix of dotted names.
        strict: False: missing and unexpected names are reported, dtypes converted. Shapes must fit either way.
        threads: concurrent reads; None: as many as cores, 4 to 8.

    Raises:
        LoadMismatchError: the target doesn't fit; lists both sides; nothing was changed.
        IntegrityError: bytes are damaged and no good copy is left; ``context["changed"]`` names what was written to.
        SaveFailedError: a peer was lost.
    """
    ranks = agreement or Agreement.alone()
    rank = ranks.rank if agreement is not None else rank
    matcher: Matcher | None = None
    error: CkptError | None = None
    try:
        matcher = Matcher(state, source, rank=rank, only=only, rename=rename, strict=strict)
        matched = matcher.match()
        error = _mismatch(matched, strict=strict)
    except CkptError as refused:
        error = refused
    ranks.together(error, what="comparing the target with the checkpoint")
    assert matcher is not None

    reading = _Reading(source, matched.slots)
    try:
        reading.run(threads or max(4, min(8, os.cpu_count() or 4)))
        for key, action in matched.actions:
            _act(key, action)
    except CkptError as failed:
        error = failed
        error.context["changed"] = sorted(reading.touched)
    ranks.together(error, what="loading")
    return LoadReport(
        missing=tuple(matched.missing),
        unexpected=tuple(matched.unexpected),
        cast=matched.cast,
        renamed=matcher.renamed,
        bytes_by_source=dict(reading.bytes_by_source),
        repaired=tuple(getattr(source, "repaired", ())),
    )


def fill(slots: list[Slot], source: ChunkSource, *, threads: int = 4) -> dict[str, int]:
    """Read slots without a target around them; returns plain bytes by source."""
    reading = _Reading(source, slots)
    reading.run(threads)
    return dict(reading.bytes_by_source)


def _act(key: str, action: Any) -> None:
    try:
        with torch.no_grad():
            action()
    except CkptError:
        raise
    except Exception as error:
        raise LoadMismatchError(
            f"{key!r} did not take its state back: {type(error).__name__}: {error}",
            hint="all tensors are loaded",
            key=key,
        ) from error


def _mismatch(matched: Matched, *, strict: bool) -> LoadMismatchError | None:
    problems = []
    if matched.mismatched:
        problems.append("different: " + _listed(matched.mismatched))
    if strict and matched.missing:
        problems.append("missing in the checkpoint: " + _listed(matched.missing))
    if strict and matched.unexpected:
        problems.append("not in the target: " + _listed(matched.unexpected))
    if not problems:
        return None
    return LoadMismatchError(
        "the target does not fit the checkpoint; " + "; ".join(problems),
        hint="fix the target, or pass strict=False to load what fits"
        if strict
        else "shapes must fit even with strict=False",
        missing=list(matched.missing),
        unexpected=list(matched.unexpected),
        mismatched=list(matched.mismatched),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@dataclass(frozen=True)
class _Part:
    """The overlap of one stored piece with one slot."""

    slot: Slot
    rank: int
    piece_index: int
    piece: Piece
    offsets: Shape
    shape: Shape
    chunk_elements: int
    chunk_bytes: tuple[int, ...]


class _Reading:
    """Fills slots; remembers which targets were written to and where the bytes came from."""

    def __init__(self, source: ChunkSource, slots: list[Slot]) -> None:
        self._source = source
        self._slots = _last_of_each_memory(slots)
        self._lock = threading.Lock()
        self._local = threading.local()
        self.touched: set[str] = set()
        self.bytes_by_source: Counter[str] = Counter()

    def run(self, threads: int) -> None:
        batches = list(_batched(self._jobs()))
        if len(batches) <= 1:
            for batch in batches:
                self._read_batch(batch)
            return
        with ThreadPoolExecutor(min(threads, len(batches)), thread_name_prefix="ckptstore-load") as pool:
            futures = [pool.submit(self._read_batch, batch) for batch in batches]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _jobs(self) -> Iterator[tuple[_Part, int]]:
        """(part, number of a chunk that has something for it)."""
        for slot in self._slots:
            wanted = 0
            for part in self._parts(slot):
                wanted += prod(part.shape)
                for number in _chunks_touched(part):
                    yield part, number
            if wanted != prod(slot.box.shape):
                raise IncompleteCheckpointError(
                    f"the stored pieces of {slot.name!r} hold {wanted} of the {prod(slot.box.shape)} elements "
                    f"wanted for {slot.key!r}",
                    key=slot.name,
                )

    def _parts(self, slot: Slot) -> Iterator[_Part]:
        itemsize = dtype_of(self._source.tensors[slot.name].dtype).itemsize
        if slot.box.local.numel() == 0:
            return
        for rank, index, piece in self._source.pieces(slot.name):
            common = overlap(piece.offsets, piece.shape, slot.box.offsets, slot.box.shape)
            if common is None:
                continue
            sizes = tuple(chunk.size_bytes for chunk in self._source.chunks(rank, index))
            yield _Part(slot, rank, index, piece, *common, sizes[0] // itemsize, sizes)

    def _read_batch(self, batch: list[tuple[_Part, int]]) -> None:
        with torch.no_grad():
            for part, number in batch:
                self._read(part, number)

    def _read(self, part: _Part, number: int) -> None:
        size = part.chunk_bytes[number]
        box = part.slot.box
        dtype = dtype_of(self._source.tensors[part.slot.name].dtype)
        start = number * part.chunk_elements
        count = size // dtype.itemsize
        direct = _run_in_target(part, start, count, dtype)
        with self._lock:
            self.touched.add(part.slot.key)
        if direct is not None:
            out = _bytes_at(box.local.data_ptr() + direct * dtype.itemsize, size)
            where = self._source.read_chunk(part.rank, part.piece_index, number, out)
        else:
            buffer = self._buffer(size)
            where = self._source.read_chunk(part.rank, part.piece_index, number, _bytes_at(buffer.data_ptr(), size))
            _scatter(part, start, buffer[:size].view(dtype))
        with self._lock:
            self.bytes_by_source[where] += size

    def _buffer(self, size: int) -> torch.Tensor:
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.uint8)
        return buffer


def _last_of_each_memory(slots: list[Slot]) -> list[Slot]:
    """Tied targets are filled once; where different tensors are stored for them the last one wins, as in torch."""
    by_memory: dict[object, Slot] = {}
    for slot in slots:
        local = slot.box.local
        memory = (local.device, local.data_ptr(), local.shape, local.stride()) if local.numel() else id(local)
        by_memory.pop(memory, None)
        by_memory[memory] = slot
    return list(by_memory.values())


def _batched(jobs: Iterable[tuple[_Part, int]]) -> Iterator[list[tuple[_Part, int]]]:
    batch: list[tuple[_Part, int]] = []
    size = 0
    for part, number in jobs:
        batch.append((part, number))
        size += part.chunk_bytes[number] + 4096
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _chunks_touched(part: _Part) -> Iterator[int]:
    at = tuple(o - p for o, p in zip(part.offsets, part.piece.offsets, strict=True))
    for number in range(len(part.chunk_bytes)):
        start = number * part.chunk_elements
        count = min(part.chunk_elements, prod(part.piece.shape) - start)
        if any(
            overlap(offsets, shape, at, part.shape) is not None
            for offsets, shape in boxes_of_run(part.piece.shape, start, count)
        ):
            yield number


def _run_in_target(part: _Part, start: int, count: int, dtype: torch.dtype) -> int | None:
    """First element in the target's memory if the chunk is a run there, wholly wanted and needs no conversion."""
    box = part.slot.box
    local = box.local
    if (
        local.dtype != dtype
        or local.device.type != "cpu"
        or not local.is_contiguous()
        or local.is_conj()
        or local.is_neg()
    ):
        return None
    at = tuple(o - p for o, p in zip(part.offsets, part.piece.offsets, strict=True))
    first = is_run(part.piece.shape, at, part.shape)
    target_at = tuple(o - b for o, b in zip(part.offsets, box.offsets, strict=True))
    target_first = is_run(box.shape, target_at, part.shape)
    if first is None or target_first is None:
        return None
    if start < first or start + count > first + prod(part.shape):
        return None
    return target_first + (start - first)


def _scatter(part: _Part, start: int, chunk: torch.Tensor) -> None:
    """Copy what is wanted of a chunk into the target, box by box."""
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
        copyable(target).copy_(copyable(source))


def _bytes_at(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
