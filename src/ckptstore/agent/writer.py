"""From sealed memory to a durable directory: the shard files, their manifests, and on a single node the commit.

The arena is the image of the shard file, so writing is one stream of large blocks (:mod:`ckptstore.agent.disk`). While
the disk is busy a second thread computes the digests and all the documents that go beside the images.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ckptstore.agent import disk
from ckptstore.agent.arena import gaps
from ckptstore.agent.disk import Abandoned
from ckptstore.agent.protocol import SealRequest
from ckptstore.errors import CkptError, FormatError, StorageError
from ckptstore.format import stock
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Piece, RootManifest, ShardManifest, TensorMeta, digest, root_of
from ckptstore.format.stock import Layout, PieceSpec
from ckptstore.repo import names
from ckptstore.repo.commit import StagingDir, raise_for_errno
from ckptstore.repo.local import LocalTier

log = logging.getLogger("ckptstore.agent")


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
        timing: seconds spent by stage: write, fsync as the part of it that waited for the disk, commit.
    """

    path: Path
    shards: tuple[ShardManifest, ...]
    root: RootManifest | None
    timing: dict[str, float]


@dataclass(frozen=True)
class _Documents:
    """What goes beside the images.

    Attributes:
        manifests: each shard's, with its canonical bytes.
        root: None if other nodes have a part in the save.
        stock_metadata: None likewise.
    """

    manifests: tuple[tuple[ShardManifest, bytes], ...]
    root: RootManifest | None
    stock_metadata: bytes | None


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
    tails = [_tail(image) for image in images]
    try:
        staging.create()
        has_failed = threading.Event()
        with ThreadPoolExecutor(1, f"documents-{first.save_id}") as pool:
            future = pool.submit(
                _describe, images, tails, chunk_elements, lambda: has_failed.is_set() or is_abandoned()
            )
            try:
                synced = sum(
                    _write_image(staging, image, tail, is_abandoned) for image, tail in zip(images, tails, strict=True)
                )
            except BaseException:
                has_failed.set()  # or the pool waits until everything is digested, and the memory is kept as long
                raise
            documents = future.result()
        written = time.monotonic()
        for shard, data in documents.manifests:
            staging.write_file(names.shard_manifest_file(shard.rank), data)
        if documents.root is not None:
            staging.complete(documents.root, documents.stock_metadata)
        if is_abandoned():
            raise Abandoned
        path = staging.commit()
    except BaseException:
        staging.discard()
        raise
    shards = tuple(shard for shard, _ in documents.manifests)
    timing = {"write": written - begun, "fsync": synced, "commit": time.monotonic() - written}
    return Written(path, shards, documents.root, timing)


def _tail(image: Image) -> bytes:
    """What follows the image in the file: the state's other values as stock PyTorch finds them."""
    if image.request.tree is None:
        return b""
    return stock.tail(stock.stock_items(image.request.tree), image.layout.image_bytes)[0]


def _write_image(staging: StagingDir, image: Image, tail: bytes, is_abandoned: Callable[[], bool]) -> float:
    """Write one shard file, durably; the seconds its fsync took."""
    request = image.request
    name = names.shard_file(request.rank)
    fd = staging.open_file(name)
    try:
        disk.write_image(fd, image.memory[: image.layout.image_bytes], tail, is_abandoned)
    except OSError as error:
        if isinstance(error, CkptError):
            raise
        raise_for_errno(error, f"can't write {name} of step {request.step}", step=request.step, rank=request.rank)
    begun = time.monotonic()
    staging.close_file(fd)
    return time.monotonic() - begun


def _describe(
    images: Sequence[Image], tails: Sequence[bytes], chunk_elements: int, is_unwanted: Callable[[], bool]
) -> _Documents:
    """Digest the images and make the documents. All of it is hidden behind the disk's time.

    Raises:
        Abandoned: ``is_unwanted`` said so.
    """
    manifests = []
    for image, tail in zip(images, tails, strict=True):
        digests = _digests(image, chunk_elements, is_unwanted)
        shard = _shard_manifest(image, chunk_elements, len(tail), digests, _skeleton_digest(image, tail))
        manifests.append((shard, shard.encode()))
    if images[0].request.num_nodes > 1:
        return _Documents(tuple(manifests), None, None)
    shards = [shard for shard, _ in manifests]
    root = root_of(shards, [data for _, data in manifests])
    return _Documents(tuple(manifests), root, stock.metadata(root, shards))


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


def _digests(image: Image, chunk_elements: int, is_unwanted: Callable[[], bool]) -> list[tuple[str, ...]]:
    """For each piece, the digest of each of its chunks."""
    result = []
    for spec, start in zip(image.pieces, image.layout.starts, strict=True):
        if is_unwanted():
            raise Abandoned
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
