"""`verify` in the local tier: documents, sizes, and with ``read_data`` every byte of every shard file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ckptstore.format import stock
from ckptstore.format.manifest import RootManifest, ShardManifest, digest
from ckptstore.ops.findings import Breach, Depth, Step, bytes_of, root_fits, twice
from ckptstore.repo.catalog import Record
from ckptstore.repo.directory import parts_of_node
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import chunks_of


def check_local(tier: LocalTier, run: str, record: Record, depth: Depth) -> Iterator[Step]:
    save = record.local
    if save is None:
        return
    if save.damaged:
        yield Breach(save.damaged, object=save.path.name)
    root, breach = twice(lambda: tier.root_manifest(run, save), "manifest.json")
    if breach is not None:
        yield breach
    if root is None:
        return
    summary = save.path / "summary.json"
    if bytes_of(summary) != root.summary.encode():
        yield Breach("summary.json is not what the manifest says", object="summary.json")
    shards: list[ShardManifest] = []
    for ref in parts_of_node(save.path, root):
        file = save.path / ref.file
        shard, breach = twice(lambda ref=ref: tier.shard_manifest(save.path, ref), f"shard-{ref.rank:05d}.json")  # type: ignore[misc]
        if breach is not None:
            yield breach
        if shard is not None:
            shards.append(shard)
            if depth.has_rank(ref.rank):
                yield from _local_file(file, shard, depth)
    yield from root_fits(root, shards, "manifest.json")
    if len(shards) == len(root.shards):
        yield from _stock_metadata(save.path, root, shards)


def _stock_metadata(path: Path, root: RootManifest, shards: list[ShardManifest]) -> Iterator[Step]:
    """The one derived file: equal to what the manifests derive, or rebuilt by a restore."""
    found = bytes_of(path / ".metadata")
    if found is None:
        yield Breach(".metadata is missing: stock DCP can't open this checkpoint", object=".metadata")
    elif found != stock.metadata(root, shards):
        yield Breach(".metadata differs from what the manifests say", object=".metadata")


def _local_file(file: Path, shard: ShardManifest, depth: Depth) -> Iterator[Step]:
    name = file.name
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Breach(f"{name} is missing", object=name)
        return
    except OSError as error:
        yield Breach(f"{name} can't be opened: {error.strerror}", object=name)
        return
    try:
        size = os.fstat(fd).st_size
        if size != shard.file_bytes:
            yield Breach(f"{name} has {size} bytes, its manifest says {shard.file_bytes}", object=name)
            return
        if not depth.read_data:
            return
        for piece, chunks in zip(shard.pieces, chunks_of(shard), strict=True):
            for chunk in chunks:
                if not depth.takes():
                    continue
                where = f"chunk {chunk.index} of {piece.fqn}"
                breach = _readtwice(fd, chunk.offset, chunk.size_bytes, lambda data: digest(data) == chunk.digest)  # noqa: B023
                if breach is not None:
                    yield replace(breach, what=f"{name}: {where} {breach.what}", key=piece.fqn, object=name)
                yield chunk.size_bytes
        for offset, expected in stock.skeleton(shard):
            breach = _readtwice(fd, offset, len(expected), lambda data: data == expected)  # noqa: B023
            if breach is not None:
                yield replace(breach, what=f"{name}: the envelope at byte {offset} {breach.what}", object=name)
    finally:
        os.close(fd)


def _readtwice(fd: int, offset: int, size: int, is_good: Callable[[bytes], bool]) -> Breach | None:
    """Read, and if it is wrong read again, from the disk."""
    reason = "is damaged"
    for attempt in range(2):
        try:
            data = os.pread(fd, size, offset)
        except OSError as error:
            reason = f"can't be read: {error.strerror}"
        else:
            if len(data) == size and is_good(data):
                return None if attempt == 0 else Breach("was wrong once and right when read again", kind="unsteady")
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
    return Breach(reason)
