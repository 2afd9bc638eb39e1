"""`verify`: find every breach between what the manifests pin and what is there, tier by tier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptstore.errors import CkptError, FormatError, IncompleteCheckpointError, IntegrityError, NotFoundError
from ckptstore.format import stock
from ckptstore.format.manifest import RootManifest, ShardManifest, digest, strong_digest
from ckptstore.ops.open import RunTiers
from ckptstore.repo.catalog import Record
from ckptstore.repo.frames import RemoteChunks
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import PlacedFrame, chunks_of, placed, ranges
from ckptstore.repo.remote import RemoteTier
from ckptstore.types import StepLike

BytesDone = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifests say.

    ``kind`` is "damage" (bytes or documents are wrong or missing) or "unchecked" (could not be looked at now).
    """

    step: int
    save_id: str
    tier: str
    kind: str
    what: str
    key: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "step": self.step,
            "save_id": self.save_id,
            "tier": self.tier,
            "kind": self.kind,
            "what": self.what,
            "key": self.key,
        }


@dataclass
class Verification:
    """What was checked and found."""

    checked: list[tuple[int, str, str]] = field(default_factory=list)
    """(step, save_id, tier)"""
    findings: list[Finding] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def is_damaged(self) -> bool:
        return any(f.kind == "damage" for f in self.findings)


def verify(
    tiers: RunTiers, step: StepLike | None, *, everything: bool, read_data: bool, progress: BytesDone | None = None
) -> Verification:
    """Check one checkpoint (the newest by default) or all of them, in every tier that has it.

    Args:
        tiers: Where to look.
        step: Which checkpoint.
        everything: All of them, superseded ones too.
        read_data: Read and decode every byte; otherwise manifests, sizes and presence.
        progress: Told the bytes read so far.
    """
    catalog = tiers.catalog()
    records = list(catalog.records) if everything else [catalog.resolve("latest" if step is None else step)]
    result = Verification()
    for record in records:
        if tiers.local is not None and record.local is not None:
            _check(result, record, "local", _local(tiers.local, tiers.run, record, read_data), progress)
        for remote in tiers.remotes:
            if remote.name in record.remote:
                _check(result, record, remote.name, _remote(remote, record, read_data), progress)
    return result


#: A check yields bytes read, or (what, key) for a breach.
_Yield = int | tuple[str, str | None]


def _check(
    result: Verification, record: Record, tier: str, steps: Iterator[_Yield], progress: BytesDone | None
) -> None:
    summary = record.summary

    def found(kind: str, what: str, key: str | None) -> None:
        result.findings.append(Finding(summary.step, summary.save_id, tier, kind, what, key))

    result.checked.append((summary.step, summary.save_id, tier))
    try:
        for step in steps:
            if isinstance(step, int):
                result.bytes_read += step
                if progress is not None:
                    progress(result.bytes_read)
            else:
                found("damage", *step)
    except (IntegrityError, FormatError, IncompleteCheckpointError, NotFoundError) as error:
        found("damage", error.message, error.context.get("key"))
    except CkptError as error:
        found("unchecked", error.message, None)


def _local(tier: LocalTier, run: str, record: Record, read_data: bool) -> Iterator[_Yield]:
    save = record.local
    if save is None:
        return
    if save.damaged:
        yield save.damaged, None
    root = tier.root_manifest(run, save)
    shards: list[ShardManifest] = []
    for ref in root.shards:
        if not (save.path / ref.file).exists() and record.summary.num_nodes > 1:
            continue  # another node's part
        try:
            shard = tier.shard_manifest(save.path, ref)
        except (FormatError, IntegrityError, NotFoundError) as error:
            yield error.message, None
            continue
        shards.append(shard)
        yield from _local_file(save.path / ref.file, shard, read_data)
    if len(shards) == len(root.shards):
        yield from _stock_metadata(save.path, root, shards)


def _stock_metadata(path: Path, root: RootManifest, shards: list[ShardManifest]) -> Iterator[_Yield]:
    """The one derived file: equal to what the manifests derive, or rebuilt by a restore."""
    file = path / ".metadata"
    if not file.exists():
        yield ".metadata is missing: stock DCP can't open this checkpoint", None
    elif file.read_bytes() != stock.metadata(root, shards):
        yield ".metadata differs from what the manifests say", None


def _local_file(file: Path, shard: ShardManifest, read_data: bool) -> Iterator[_Yield]:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield f"{file.name} is missing", None
        return
    except OSError as error:
        yield f"{file.name} can't be opened: {error.strerror}", None
        return
    try:
        size = os.fstat(fd).st_size
        if size != shard.file_bytes:
            yield f"{file.name} has {size} bytes, its manifest says {shard.file_bytes}", None
            return
        if not read_data:
            return
        for piece, chunks in zip(shard.pieces, chunks_of(shard), strict=True):
            for chunk in chunks:
                try:
                    data = os.pread(fd, chunk.size_bytes, chunk.offset)
                except OSError as error:
                    yield f"{file.name}: {error.strerror} at byte {chunk.offset}", piece.fqn
                    continue
                if len(data) != chunk.size_bytes or digest(data) != chunk.digest:
                    yield f"{file.name}: chunk {chunk.index} of {piece.fqn} is damaged", piece.fqn
                yield len(data)
        for offset, expected in stock.skeleton(shard):
            if os.pread(fd, len(expected), offset) != expected:
                yield f"{file.name}: the envelope bytes at {offset} are damaged", None
    finally:
        os.close(fd)


def _remote(remote: RemoteTier, record: Record, read_data: bool) -> Iterator[_Yield]:
    root = remote.root_manifest(record.remote[remote.name])
    for ref in root.shards:
        try:
            document = remote.remote_shard(record.summary.save_id, ref)
        except (FormatError, IntegrityError, NotFoundError) as error:
            yield error.message, None
            continue
        frames = [placed(document, frame) for frame in document.frames]
        ends: dict[str, int] = {}
        for frame in frames:
            for part in frame.chain():
                ends[part.pack] = max(ends.get(part.pack, 0), part.offset + part.length)
        gone = set()
        for pack, end in ends.items():
            info = remote.head_pack(pack)
            if info is None or info.size_bytes < end:
                gone.add(pack)
                yield f"{pack} is {'missing' if info is None else 'too short'}", None
        if not read_data:
            continue
        owners: dict[PlacedFrame, tuple[str, str]] = {}
        for piece, row, chunks in zip(document.shard.pieces, document.chunks, chunks_of(document.shard), strict=True):
            for index, chunk in zip(row, chunks, strict=True):
                owners[frames[index]] = (piece.fqn, chunk.digest)
        reader = RemoteChunks([remote], record.summary.save_id)
        for request in ranges(f for f in owners if not any(part.pack in gone for part in f.chain())):
            try:
                for frame, plain in reader.read_range(remote, request):
                    fqn, expected = owners[frame]
                    if isinstance(plain, CkptError):
                        yield f"{frame.pack}: {plain.message}", fqn
                    elif strong_digest(plain) != frame.name or digest(plain) != expected:
                        yield f"{frame.pack} does not hold the bytes of {fqn} it should", fqn
                    yield frame.size_bytes
            except (IntegrityError, NotFoundError) as error:
                yield error.message, ", ".join(sorted({owners[frame][0] for frame in request.frames}))
