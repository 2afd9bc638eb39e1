"""One shard's chunks on their way to a remote: referenced, derived, taken as a difference, or encoded in full.

Every frame is decoded again and compared with the digest of its chunk before it counts.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ckptstore import codec
from ckptstore.errors import IntegrityError
from ckptstore.format.manifest import ShardManifest, digest, strong_digest
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.known import Base, KnownChunks
from ckptstore.repo.masters import find_masters
from ckptstore.repo.packs import Chunk, PlacedFrame, chunks_of


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk that is not there yet.

    Attributes:
        base: the frame a delta rests on.
        is_settled: an earlier save has it; it lies apart from chunks that nobody had.
    """

    frame: codec.Buffer
    codec: str
    name: str
    base: PlacedFrame | None = None
    is_settled: bool = False


@dataclass(frozen=True)
class ChunkJob:
    """One chunk to deal with, and the one it may be the rounding of."""

    chunk: Chunk
    master: Chunk | None = None


class _Buffers(threading.local):
    """Memory that one thread uses again for every chunk: fresh memory costs as much as reading it."""

    def __init__(self) -> None:
        self._slots: dict[str, bytearray] = {}

    def take(self, slot: str, size_bytes: int) -> memoryview:
        """So many bytes with undefined content, valid until this slot is taken again."""
        held = self._slots.get(slot)
        if held is None or len(held) < size_bytes:
            held = self._slots[slot] = bytearray(size_bytes)
        return memoryview(held)[:size_bytes]


_BUFFERS = _Buffers()


class ChunkEncoder:
    """Works on the chunks of one shard. Thread-safe.

    Args:
        shard: The shard.
        fd: Its open file.
        known: What the remote holds already.
        compress: False sends every chunk as it is.
    """

    def __init__(self, shard: ShardManifest, fd: int, known: KnownChunks, *, compress: bool) -> None:
        self._shard = shard
        self._fd = fd
        self._known = known
        self._compress = compress

    def jobs(self) -> Iterator[ChunkJob]:
        """The chunks in file order, but those that may be roundings right behind their masters."""
        rows = chunks_of(self._shard)
        masters = find_masters(self._shard, self._fd) if self._compress else {}
        copies: defaultdict[int, list[int]] = defaultdict(list)
        for copy, master in masters.items():
            copies[master].append(copy)
        for number, row in enumerate(rows):
            if number not in masters:
                for chunk in row:
                    yield ChunkJob(chunk)
                    yield from (ChunkJob(rows[copy][chunk.index], chunk) for copy in copies[number])

    def encode(self, job: ChunkJob) -> EncodedChunk | PlacedFrame:
        """Refer to this chunk, or read, check and encode it.

        Raises:
            IntegrityError: the local file does not hold what its manifest says.
            StorageError: it can't be read.
        """
        chunk = job.chunk
        piece = self._shard.pieces[chunk.piece]
        dtype = self._shard.tensors[piece.fqn].dtype
        there = self._known.find(chunk, dtype)
        if there is not None:
            return there
        plain = self._read(chunk, "plain")
        encoded, base, base_plain = self._encode(job, plain)
        out = _BUFFERS.take("again", chunk.size_bytes)
        again = codec.decode(encoded.frame, size_bytes=len(plain), base=base_plain, out=out, is_checked_by_caller=True)
        if digest(again) != chunk.digest:
            raise IntegrityError(f"{piece.fqn}: codec {encoded.codec} does not return what it was given", key=piece.fqn)
        return EncodedChunk(
            frame=encoded.frame,
            codec=encoded.codec,
            name=strong_digest(plain),
            base=base.frame if base is not None else None,
            is_settled=self._known.is_settled(chunk),
        )

    def _encode(self, job: ChunkJob, plain: memoryview) -> tuple[codec.Encoded, Base | None, memoryview | None]:
        """The chunk's frame; the base it rests on, if it is a delta; and the bytes that its decoder needs."""
        shard = self._shard
        piece = shard.pieces[job.chunk.piece]
        dtype = shard.tensors[piece.fqn].dtype
        row = piece.shape[-1] if piece.shape else 0
        if not self._compress:
            return codec.encode(plain, dtype=dtype, digest=job.chunk.digest, compress=False), None, None
        if job.master is not None:
            master = self._read(job.master, "base")
            derived = codec.derive(plain, master, digest=job.chunk.digest)
            if derived is not None:
                return derived, None, master
        base = self._known.base_for(shard, piece, job.chunk)
        base_plain = _BUFFERS.take("base", job.chunk.size_bytes)
        if base is not None and base.plain.read_into(base_plain):
            encoded = codec.encode(plain, dtype=dtype, base=base_plain, row=row, digest=job.chunk.digest)
            if encoded.codec != "delta":
                return encoded, None, None
            if len(encoded.frame) <= base.limit_bytes:
                return encoded, base, base_plain
        return codec.encode(plain, dtype=dtype, row=row, digest=job.chunk.digest), None, None

    def _read(self, chunk: Chunk, slot: str) -> memoryview:
        """The chunk's plain bytes as its digest says, in this thread's buffer, or IntegrityError."""
        shard = self._shard
        piece = shard.pieces[chunk.piece]
        plain = _BUFFERS.take(slot, chunk.size_bytes)
        try:
            count = os.preadv(self._fd, [plain], chunk.offset)
        except OSError as error:
            raise_for_errno(error, f"can't read {shard.file} of step {shard.step}", rank=shard.rank, key=piece.fqn)
        if count != chunk.size_bytes or digest(plain) != chunk.digest:
            raise IntegrityError(
                f"{piece.fqn} is damaged in the local file {shard.file} of rank {shard.rank}, step {shard.step}",
                hint="it was not uploaded; `ckptctl verify --repair` takes it from another tier if one has it",
                key=piece.fqn,
                rank=shard.rank,
                step=shard.step,
                tier="local",
            )
        return plain
