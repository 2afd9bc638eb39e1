"""From sealed memory to a durable directory: the shard files, their manifests, and on a single node the commit.

The arena is the image of the shard file, so writing is one sequential stream of large blocks. O_DIRECT where the file
system takes it (no page cache to evict, a thirtieth of the CPU), else buffered with ``sync_file_range``, so that the
fsync at the end finds little left to do. Digests are computed by a second thread while the disk is busy.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ckptstore.agent.arena import gaps, libc
from ckptstore.agent.protocol import SealRequest
from ckptstore.errors import CkptError, FormatError, StorageError
from ckptstore.format import stock
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Piece, RootManifest, ShardManifest, TensorMeta, digest, root_of
from ckptstore.format.stock import Layout, PieceSpec
from ckptstore.repo import commit, names
from ckptstore.repo.commit import StagingDir, raise_for_errno
from ckptstore.repo.local import LocalTier

log = logging.getLogger("ckptstore.agent")

BLOCK_BYTES = 8 << 20
_DIRECT_ALIGNMENT = 4096
_WRITE, _WAIT = 2, 1 | 2 | 4  # Source: sync_file_range(2): WRITE; WAIT_BEFORE | WRITE | WAIT_AFTER


@dataclass(frozen=True)
class Image:
    """One rank's sealed part. ``memory`` holds the layout's image at its beginning and stays as it is meanwhile."""

    request: SealRequest
    layout: Layout
    pieces: tuple[PieceSpec, ...]
    memory: memoryview


@dataclass(frozen=True)
class Written:
    """A durable part; ``root`` is None when parts of other nodes are still needed (*prepared*).

    Attributes:
        timing: seconds spent by stage: write (fsync included), commit.
    """

    path: Path
    shards: tuple[ShardManifest, ...]
    root: RootManifest | None
    timing: dict[str, float]


class Abandoned(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The save was discarded while it was being written; nothing of it is left."""


def write_part(
    tier: LocalTier, run: str, images: Sequence[Image], *, chunk_elements: int, is_abandoned: Callable[[], bool]
) -> Written:
    """Make the local ranks' parts of one save durable, and commit if they are all there is. Blocks.

    After an I/O error the part is written once more, into new files: an fsync that failed may lie the second time.

    Raises:
        NoSpaceError, StorageError: nothing is left of the part.
        Abandoned: ``is_abandoned`` said so before the commit.
    """
    try:
        return _write_part(tier, run, images, chunk_elements, is_abandoned)
    except StorageError as error:
        if error.context.get("errno") != "EIO":
            raise
        log.warning("writing save %s again: %s", images[0].request.save_id, error)
        return _write_part(tier, run, images, chunk_elements, is_abandoned)


def _write_part(
    tier: LocalTier, run: str, images: Sequence[Image], chunk_elements: int, is_abandoned: Callable[[], bool]
) -> Written:
    first = images[0].request
    staging = StagingDir(tier, run, first.step, first.save_id)
    begun = time.monotonic()
    try:
        staging.create()
        shards = tuple(_write_shard(staging, image, chunk_elements, is_abandoned) for image in images)
        written = time.monotonic()
        root = root_of(list(shards)) if first.num_nodes == 1 else None
        if root is not None:
            commit.complete(staging.path, root, written=shards)
        if is_abandoned():
            raise Abandoned
        path = staging.commit()
    except BaseException:
        staging.discard()
        raise
    return Written(path, shards, root, {"write": written - begun, "commit": time.monotonic() - written})


def _write_shard(
    staging: StagingDir, image: Image, chunk_elements: int, is_abandoned: Callable[[], bool]
) -> ShardManifest:
    request = image.request
    tail = b""
    if request.tree is not None:
        tail, _ = stock.tail(stock.stock_items(request.tree), image.layout.image_bytes)
    name = names.shard_file(request.rank)
    with ThreadPoolExecutor(1, f"digest-{request.rank}") as pool:
        digests = pool.submit(_digests, image, chunk_elements)
        skeleton = pool.submit(_skeleton_digest, image, tail)
        fd = staging.open_file(name)
        try:
            _write_image(fd, image.memory[: image.layout.image_bytes], tail, is_abandoned)
        except OSError as error:
            if isinstance(error, CkptError):
                raise
            raise_for_errno(error, f"can't write {name} of step {request.step}", step=request.step, rank=request.rank)
        staging.close_file(fd)
        shard = _shard_manifest(image, chunk_elements, len(tail), digests.result(), skeleton.result())
    staging.write_file(names.shard_manifest_file(request.rank), shard.encode())
    return shard


def _shard_manifest(
    image: Image, chunk_elements: int, tail_bytes: int, digests: list[tuple[str, ...]], skeleton_digest: str
) -> ShardManifest:
    request = image.request
    tensors: dict[str, TensorMeta] = {}
    for spec in image.pieces:
        meta = TensorMeta(dtype=spec.dtype, shape=spec.global_shape, requires_grad=spec.requires_grad)
        if tensors.setdefault(spec.fqn, meta) != meta:
            raise FormatError(f"two pieces of {spec.fqn!r} disagree about its dtype or shape", key=spec.fqn)
    return ShardManifest(
        save_id=request.save_id,
        step=request.step,
        rank=request.rank,
        world_size=request.world_size,
        node=request.node,
        file=names.shard_file(request.rank),
        file_bytes=image.layout.image_bytes + tail_bytes,
        chunk_elements=chunk_elements,
        pieces=tuple(
            Piece(
                fqn=spec.fqn, offsets=spec.offsets, shape=spec.shape, start=start, size_bytes=spec.size_bytes, digests=d
            )
            for spec, start, d in zip(image.pieces, image.layout.starts, digests, strict=True)
        ),
        tensors=tensors,
        skeleton_digest=skeleton_digest,
        per_rank=request.per_rank,
        summary=request.summary,
        tree=request.tree,
        aliases=dict(request.aliases),
    )


def _digests(image: Image, chunk_elements: int) -> list[tuple[str, ...]]:
    """For each piece, the digest of each of its chunks."""
    result = []
    for spec, start in zip(image.pieces, image.layout.starts, strict=True):
        step, end = chunk_elements * itemsize(spec.dtype), start + spec.size_bytes
        result.append(tuple(digest(image.memory[at : min(at + step, end)]) for at in range(start, end, step)))
    return result


def _skeleton_digest(image: Image, tail: bytes) -> str:
    """Digest of every byte of the file outside the payloads, in file order."""
    state = xxhash.xxh3_128()
    for start, end in gaps(image.layout, image.pieces):
        state.update(image.memory[start:end])
    state.update(tail)
    return state.hexdigest()


# ---------------------------------------------------------------------- bytes to disk


def _write_image(fd: int, image: memoryview, tail: bytes, is_abandoned: Callable[[], bool]) -> None:
    """All of the image, then the tail; the file is not durable yet."""
    size = len(image)
    _allocate(fd, size + len(tail))
    is_direct = _set_direct(fd, True)
    aligned = size - size % _DIRECT_ALIGNMENT if is_direct else 0
    at = 0
    while at < aligned:
        if is_abandoned():
            raise Abandoned
        try:
            at += write_block(fd, image[at : min(at + BLOCK_BYTES, aligned)], at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the flag was taken, the write is not: some network and stacked file systems
        if at % _DIRECT_ALIGNMENT:
            break  # a short write; what follows can't be direct
    if is_direct:
        _set_direct(fd, False)
    _write_buffered(fd, image, at, is_abandoned)
    done = 0
    while done < len(tail):
        done += os.pwrite(fd, tail[done:], size + done)


def _write_buffered(fd: int, image: memoryview, at: int, is_abandoned: Callable[[], bool]) -> None:
    begun = at
    while at < len(image):
        if is_abandoned():
            raise Abandoned
        count = write_block(fd, image[at : at + BLOCK_BYTES], at)
        _sync_range(fd, at, count, _WRITE)
        if at - begun >= 2 * BLOCK_BYTES:
            _sync_range(fd, at - 2 * BLOCK_BYTES, BLOCK_BYTES, _WAIT)
        at += count


def write_block(fd: int, block: memoryview, offset: int) -> int:
    """Write some of ``block``; how much is returned. A seam of its own: tests make the disk slow or sick here."""
    return os.pwrite(fd, block, offset)


def _set_direct(fd: int, wanted: bool) -> bool:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return False
    return wanted


def _allocate(fd: int, size: int) -> None:
    """Reserve the file's blocks: a full disk is noticed before the first byte, and the file lies in one stretch.

    The raw call, because the C library's ``posix_fallocate`` writes zeros where the file system can't reserve.
    """
    if size == 0 or not hasattr(libc(), "fallocate"):
        return
    while libc().fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _sync_range(fd: int, offset: int, count: int, flags: int) -> None:
    """Start, or wait for, the writing of a range.

    An error here must be raised: having told us once, the kernel may not tell the fsync again.
    """
    if not hasattr(libc(), "sync_file_range"):
        return
    if libc().sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(count), flags) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ESPIPE):
            raise OSError(number, os.strerror(number))
