"""Stored tensors into places of a file, many at once, with bounded memory.

The file is mapped. A stored piece that lies in one stretch of its tensor is read straight into the mapping, chunk by
chunk; any other is read whole and put in row by row. The room is taken before, so a full disk shows up as an error and
not as a signal.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np

from ckptstore.errors import IncompleteCheckpointError
from ckptstore.format.dtypes import itemsize
from ckptstore.ops.numbers import Bytes, convert
from ckptstore.repo.progress import Meter
from ckptstore.repo.reader import CheckpointReader

_BATCH_BYTES = 8 << 20
_THREADS = 4


@dataclass(frozen=True)
class Region:
    """A stored tensor (no alias) and the place of its first byte in the file, as ``dtype``."""

    name: str
    offset: int
    dtype: str


def allocate(fd: int, size_bytes: int) -> None:
    """Take the room now."""
    if size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, size_bytes)


def fill(fd: int, reader: CheckpointReader, regions: Sequence[Region], meter: Meter) -> None:
    """Fill the regions of a file that :func:`allocate` has sized. Every byte is verified. Blocks.

    Raises:
        IntegrityError, TransientError, StorageError: as the reader.
        IncompleteCheckpointError: the stored pieces don't cover a tensor.
    """
    size_bytes = os.fstat(fd).st_size
    if not size_bytes or not regions:
        return
    mapping = mmap.mmap(fd, size_bytes)  # unmapped with the last view into it
    memory = np.frombuffer(mapping, np.uint8)
    with ThreadPoolExecutor(_THREADS, "ckptstore-export") as pool:
        work = [pool.submit(_read, reader, batch, meter) for batch in _batches(reader, memory, regions)]
        try:
            for one in work:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    mapping.flush()


@dataclass(frozen=True)
class _Place:
    """One piece: its box in the mapping, element bytes last; None of it is copied until it is read."""

    rank: int
    index: int
    box: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    stored: str
    wanted: str
    size_bytes: int


def _places(reader: CheckpointReader, memory: Bytes, regions: Iterable[Region]) -> Iterator[_Place]:
    for region in regions:
        meta = reader.tensors[region.name]
        width = itemsize(region.dtype)
        count = prod(meta.shape)
        whole = memory[region.offset : region.offset + count * width].reshape(*meta.shape, width)
        covered = 0
        for rank, index, piece in reader.pieces(region.name):
            if not piece.size_bytes:
                continue
            box = whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))]
            covered += prod(piece.shape)
            yield _Place(rank, index, box, meta.dtype, region.dtype, piece.size_bytes)
        if covered != count:
            raise IncompleteCheckpointError(
                f"the stored pieces of {region.name!r} hold {covered} of its {count} elements", key=region.name
            )


def _batches(reader: CheckpointReader, memory: Bytes, regions: Iterable[Region]) -> Iterator[list[_Place]]:
    """Neighbours in one shard file together."""
    batch: list[_Place] = []
    size = 0
    for place in sorted(_places(reader, memory, regions), key=lambda place: (place.rank, place.index)):
        if batch and (size + place.size_bytes > _BATCH_BYTES or place.rank != batch[0].rank):
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += place.size_bytes
    if batch:
        yield batch


def _read(reader: CheckpointReader, batch: list[_Place], meter: Meter) -> None:
    wanted: list[tuple[int, int, int, memoryview]] = []
    later: list[tuple[_Place, Bytes]] = []
    for place in batch:
        if place.stored == place.wanted and place.box.flags.c_contiguous:
            target = place.box.reshape(-1)
        else:
            target = np.empty(place.size_bytes, np.uint8)
            later.append((place, target))
        at = 0
        for chunk in reader.chunks(place.rank, place.index):
            wanted.append((place.rank, place.index, chunk.index, target[at : at + chunk.size_bytes].data))
            at += chunk.size_bytes
    for some in _bounded(wanted):
        reader.read_batch(some)
        meter.add(plain=sum(out.nbytes for *_, out in some))
    for place, data in later:
        place.box[...] = convert(data, place.stored, place.wanted).reshape(place.box.shape)


def _bounded(
    wanted: Sequence[tuple[int, int, int, memoryview]],
) -> Iterator[list[tuple[int, int, int, memoryview]]]:
    some: list[tuple[int, int, int, memoryview]] = []
    size = 0
    for one in wanted:
        if some and size + one[3].nbytes > _BATCH_BYTES:
            yield some
            some, size = [], 0
        some.append(one)
        size += one[3].nbytes
    if some:
        yield some
