"""Chunks, frames and packs: where they lie and what bounds them.

A *chunk* is a slice of a piece in a shard file; a *frame* is that chunk as encoded; a *pack* is an immutable object of
frames back to back. A frame may rest on another one: a delta on a full frame, a derived one on its fp32 master's frame,
full or delta; never on more. So a chain has three frames at most, and deltas never rest on deltas.

Everything here is arithmetic over documents that may have been tampered with, so nothing is read, allocated or seeked
to before it was bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptstore.codec.base import CODECS, MAX_CHUNK_BYTES
from ckptstore.errors import FormatError
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import SAVE_ID_PATTERN, Frame, RemoteShard, ShardManifest

#: A frame is never larger than its chunk by more: what doesn't shrink is stored raw behind a short header.
FRAME_SLACK_BYTES = 4096

#: What a frame may rest on, by its codec: the codecs of its base, and how many times its plain bytes the base has.
#: The others are *full*: they rest on nothing.
FULL = ("raw", "zstd", "planes")
_RESTS_ON: dict[str, tuple[tuple[str, ...], int]] = {"delta": (FULL, 1), "derived": ((*FULL, "delta"), 2)}

#: Adjacent frames are fetched in one request of at most this many bytes ...
RANGE_BYTES = 16 << 20
#: ... reading over gaps that cost less than a request of their own.
RANGE_GAP_BYTES = 64 << 10

_PACK = re.compile(rf"packs/({SAVE_ID_PATTERN})/[0-9]{{5,6}}-[0-9a-f]{{16}}\.pack")


def pack_name(save_id: str, rank: int, name: str) -> str:
    """Key of a pack below the run's prefix; ``name`` is a digest of the whole pack."""
    return f"packs/{save_id}/{rank:05d}-{name[:16]}.pack"


def pack_owner(key: str) -> str | None:
    """The save that sent this pack, or None for a name that isn't a pack's."""
    match = _PACK.fullmatch(key)
    return match.group(1) if match else None


@dataclass(frozen=True)
class Chunk:
    """One chunk of a shard: ``size_bytes`` bytes at ``offset`` of the shard file."""

    piece: int
    index: int
    offset: int
    size_bytes: int
    digest: str


def chunks_of(shard: ShardManifest) -> list[list[Chunk]]:
    """The chunks of each piece, in order.

    Raises:
        FormatError: the manifest contradicts itself, or a chunk is larger than any decoder takes.
    """
    result = []
    for number, piece in enumerate(shard.pieces):
        where = f"shard manifest of rank {shard.rank}, {piece.fqn}"
        meta = shard.tensors.get(piece.fqn)
        if meta is None:
            raise FormatError(f"{where}: no metadata for this tensor", rank=shard.rank, key=piece.fqn)
        step = shard.chunk_elements * itemsize(meta.dtype)
        if len(piece.digests) != -(-piece.size_bytes // step) or piece.start + piece.size_bytes > shard.file_bytes:
            raise FormatError(f"{where}: sizes and digests don't fit together", rank=shard.rank, key=piece.fqn)
        if min(step, piece.size_bytes) > MAX_CHUNK_BYTES:
            raise FormatError(f"{where}: chunks of {step} bytes are too large", rank=shard.rank, key=piece.fqn)
        result.append(
            [
                Chunk(number, i, piece.start + i * step, min(step, piece.size_bytes - i * step), digest)
                for i, digest in enumerate(piece.digests)
            ]
        )
    return result


@dataclass(frozen=True)
class PlacedFrame:
    """A frame by the key of its pack, so that it means the same in every document of the run."""

    pack: str
    offset: int
    length: int
    codec: str
    size_bytes: int
    name: str
    base: PlacedFrame | None = None

    def chain(self) -> Iterator[PlacedFrame]:
        """This frame, what it rests on, and so on down to a full frame: all that is read to decode it."""
        part: PlacedFrame | None = self
        while part is not None:
            yield part
            part = part.base


def placed(document: RemoteShard, frame: Frame) -> PlacedFrame:
    """``frame`` of this document with its pack's key."""
    return PlacedFrame(
        pack=document.packs[frame.pack],
        offset=frame.offset,
        length=frame.length,
        codec=frame.codec,
        size_bytes=frame.size_bytes,
        name=frame.name,
        base=placed(document, frame.base) if frame.base is not None else None,
    )


def own_bytes(document: RemoteShard) -> int:
    """Bytes of the packs that this save's rank has sent: what ``stored_bytes`` must be."""
    own = f"packs/{document.shard.save_id}/{document.shard.rank:05d}-"
    ends: dict[str, int] = {}
    for frame in (placed(document, one) for one in document.frames):
        for part in frame.chain():
            if part.pack.startswith(own):
                ends[part.pack] = max(ends.get(part.pack, 0), part.offset + part.length)
    return sum(ends.values())


class FrameTable:
    """Collects the frames of one remote shard manifest, each distinct one once."""

    def __init__(self) -> None:
        self._packs: dict[str, int] = {}
        self._frames: dict[PlacedFrame, int] = {}
        self._documents: list[Frame] = []

    def add(self, frame: PlacedFrame) -> int:
        """Index of this frame in the document."""
        if frame not in self._frames:
            self._frames[frame] = len(self._documents)
            self._documents.append(self._document(frame))
        return self._frames[frame]

    def _document(self, frame: PlacedFrame) -> Frame:
        return Frame(
            pack=self._packs.setdefault(frame.pack, len(self._packs)),
            offset=frame.offset,
            length=frame.length,
            codec=frame.codec,
            size_bytes=frame.size_bytes,
            name=frame.name,
            base=self._document(frame.base) if frame.base is not None else None,
        )

    def remote_shard(self, shard: ShardManifest, chunks: list[list[int]], stored_bytes: int) -> RemoteShard:
        """The finished document; ``chunks`` holds indices returned by :meth:`add`."""
        return RemoteShard(
            shard=shard,
            packs=tuple(self._packs),
            frames=tuple(self._documents),
            chunks=tuple(tuple(row) for row in chunks),
            stored_bytes=stored_bytes,
        )


def check_remote_shard(document: RemoteShard) -> None:
    """Believe nothing a remote shard manifest says about frames before this has returned.

    Raises:
        FormatError: it points outside its own tables, at names that aren't packs, or at frames of impossible sizes.
    """
    what = f"remote shard manifest of rank {document.shard.rank}, save {document.shard.save_id}"
    for key in document.packs:
        if pack_owner(key) is None:
            raise FormatError(f"{what}: {key[:80]!r} is not the name of a pack", rank=document.shard.rank)
    for frame in document.frames:
        _check_frame(frame, len(document.packs), what)
    wanted = chunks_of(document.shard)
    if [len(row) for row in document.chunks] != [len(row) for row in wanted]:
        raise FormatError(f"{what}: it does not have one frame per chunk", rank=document.shard.rank)
    for row, chunks in zip(document.chunks, wanted, strict=True):
        for index, chunk in zip(row, chunks, strict=True):
            if not 0 <= index < len(document.frames) or document.frames[index].size_bytes != chunk.size_bytes:
                raise FormatError(f"{what}: a chunk points at a frame that can't be its own", rank=document.shard.rank)


def _check_frame(frame: Frame, num_packs: int, what: str) -> None:
    """One frame and, since it only goes down to smaller chains, all it rests on."""
    limit = min(frame.size_bytes, MAX_CHUNK_BYTES) + FRAME_SLACK_BYTES
    if frame.pack >= num_packs or frame.size_bytes > MAX_CHUNK_BYTES or frame.length > limit:
        raise FormatError(f"{what}: a frame is out of bounds")
    if frame.codec not in CODECS:
        raise FormatError(f"{what}: unknown codec {frame.codec[:20]!r}", hint="upgrade ckptstore")
    allowed, times = _RESTS_ON.get(frame.codec, ((), 0))
    if frame.base is None and not allowed:
        return
    if frame.base is None or frame.base.codec not in allowed or frame.base.size_bytes != times * frame.size_bytes:
        raise FormatError(f"{what}: a {frame.codec} frame can't rest on what it says it does")
    _check_frame(frame.base, num_packs, what)


@dataclass(frozen=True)
class Range:
    """One request: ``length`` bytes at ``start`` of ``pack``, which hold these frames."""

    pack: str
    start: int
    length: int
    frames: tuple[PlacedFrame, ...]


def ranges(frames: Iterable[PlacedFrame], *, max_bytes: int = RANGE_BYTES) -> Iterator[Range]:
    """Requests that together hold all these frames: neighbours share one, none is much larger than ``max_bytes``.

    Also bounded by the plain bytes they decode to (twice ``max_bytes``), so that small frames of large chunks don't
    pile up in memory. A derived frame right behind its master comes with it: neither is of use alone.
    """
    held: list[PlacedFrame] = []
    start = end = plain = 0
    for begin, frame in sorted(((_begin(f), f) for f in set(frames)), key=lambda p: (p[1].pack, p[0], p[1].offset)):
        frame_end = frame.offset + frame.length
        if held and not (
            frame.pack == held[0].pack
            and begin - end <= RANGE_GAP_BYTES
            and max(end, frame_end) - start <= max_bytes
            and plain + frame.size_bytes <= 2 * max_bytes
        ):
            yield Range(held[0].pack, start, end - start, tuple(held))
            held = []
        if not held:
            start, end, plain = begin, frame_end, 0
        held.append(frame)
        end, plain = max(end, frame_end), plain + frame.size_bytes
    if held:
        yield Range(held[0].pack, start, end - start, tuple(held))


def _begin(frame: PlacedFrame) -> int:
    """Where to begin reading for this frame."""
    base = frame.base
    if frame.codec != "derived" or base is None or base.pack != frame.pack:
        return frame.offset
    gap = frame.offset - (base.offset + base.length)
    return base.offset if 0 <= gap <= RANGE_GAP_BYTES else frame.offset
