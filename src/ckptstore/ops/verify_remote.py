"""`verify` in a remote: documents and packs by HEAD, and with ``read_data`` every frame, decoded."""

from __future__ import annotations

from collections.abc import Iterator

from ckptstore.codec.base import CODECS
from ckptstore.errors import CkptError, IntegrityError, NotFoundError
from ckptstore.format.manifest import FORMAT, FORMAT_VERSION, ShardManifest, digest, strong_digest
from ckptstore.ops.findings import Breach, Depth, Step, root_fits, twice
from ckptstore.repo.catalog import Record
from ckptstore.repo.frames import RemoteChunks
from ckptstore.repo.packs import PlacedFrame, Range, chunks_of, own_bytes, placed, ranges
from ckptstore.repo.remote import RemoteTier


def check_remote(remote: RemoteTier, record: Record, depth: Depth) -> Iterator[Step]:
    save = record.remote[remote.name]
    root, breach = twice(lambda: remote.root_manifest(save), save.key)
    if breach is not None:
        yield breach
    if root is None:
        return
    summary, breach = twice(lambda: remote.summary(save), save.summary_key)
    if breach is not None:
        yield breach
    if summary is not None and summary != root.summary:
        yield Breach("the summary is not what the manifest says", object=save.summary_key)
    if not remote.has(save.summary_key):
        yield Breach("the summary is missing", object=save.summary_key)
    shards: list[ShardManifest] = []
    for ref in root.shards:
        if not depth.has_rank(ref.rank):
            continue
        name = f"shards/{save.save_id}/shard-{ref.rank:05d}.json"
        document, breach = twice(lambda ref=ref: remote.remote_shard(save.save_id, ref), name)  # type: ignore[misc]
        if breach is not None:
            yield breach
        if document is None:
            continue
        shards.append(document.shard)
        frames = [placed(document, frame) for frame in document.frames]
        codecs = {part.codec for frame in frames for part in frame.chain()}
        is_ours = (document.format, document.version) == (FORMAT, FORMAT_VERSION)
        if not is_ours or document.stored_bytes != own_bytes(document) or not codecs <= set(CODECS):
            yield Breach(f"{name} contradicts itself", object=name)
        ends: dict[str, int] = {}
        for frame in frames:
            for part in frame.chain():
                ends[part.pack] = max(ends.get(part.pack, 0), part.offset + part.length)
        gone = set()
        for pack, end in ends.items():
            info = remote.head_pack(pack)
            if info is None or info.size_bytes < end:
                gone.add(pack)
                yield Breach(f"{pack} is {'missing' if info is None else 'too short'}", object=pack)
        if not depth.read_data:
            continue
        owners: dict[PlacedFrame, tuple[str, str | None]] = {}
        for piece, row, chunks in zip(document.shard.pieces, document.chunks, chunks_of(document.shard), strict=True):
            for index, chunk in zip(row, chunks, strict=True):
                if depth.takes():
                    owners[frames[index]] = (piece.fqn, chunk.digest)
                    for base in list(frames[index].chain())[1:]:
                        owners.setdefault(base, (piece.fqn, None))
        wanted = [frame for frame in owners if not any(part.pack in gone for part in frame.chain())]
        for request in ranges(wanted):
            yield from _frames(remote, save.save_id, request, owners)
    yield from root_fits(root, shards, save.key)


def _frames(
    remote: RemoteTier, save_id: str, request: Range, owners: dict[PlacedFrame, tuple[str, str | None]]
) -> Iterator[Step]:
    bad = _bad_frames(remote, save_id, request, owners)
    still = _bad_frames(remote, save_id, request, owners) if bad else {}
    for frame in request.frames:
        fqn = owners[frame][0]
        if frame in still:
            yield Breach(still[frame], fqn, ", ".join(dict.fromkeys(part.pack for part in frame.chain())))
        elif frame in bad:
            yield Breach(f"{bad[frame]}; right when read again", fqn, frame.pack, kind="unsteady")
        elif owners[frame][1] is not None:
            yield frame.size_bytes


def _bad_frames(
    remote: RemoteTier, save_id: str, request: Range, owners: dict[PlacedFrame, tuple[str, str | None]]
) -> dict[PlacedFrame, str]:
    """What is wrong with which frame of one request; a new reader each time, which remembers nothing."""
    bad: dict[PlacedFrame, str] = {}
    try:
        # A request's answer is judged frame by frame, bases too: their names are in the manifests as well.
        for frame, plain in RemoteChunks([remote], save_id).read_range(remote, request):
            fqn, expected = owners[frame]
            if isinstance(plain, CkptError):
                bad[frame] = f"{frame.pack}: {plain.message}"
            elif strong_digest(plain) != frame.name or expected not in (None, digest(plain)):
                bad[frame] = f"{frame.pack} does not hold the bytes of {fqn} it should"
    except (IntegrityError, NotFoundError) as error:
        return dict.fromkeys(request.frames, error.message)
    return bad
