"""A checkpoint in memory with the reader's interface, made by the real binder, planner, stage and layout."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ckptstore.clock import rfc3339
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.prepare import Prepared, Preparer
from ckptstore.dcp.stage import copy_pieces
from ckptstore.errors import IntegrityError
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Piece, ShardManifest, Summary, TensorMeta, digest, root_of
from ckptstore.format.stock import layout
from ckptstore.repo.packs import chunks_of

SAVE_ID = "0123456789ab-1"


def shard_of(
    prepared: Prepared, *, rank: int = 0, world_size: int = 1, step: int = 1, chunk_elements: int = 1024
) -> tuple[ShardManifest, bytes]:
    """What a rank would write: its manifest and the image of its file (without the stock tail)."""
    from datetime import datetime, timezone

    plan, binding = prepared.plan, prepared.binding
    places = layout(plan.pieces)
    image = bytearray(max(1, places.image_bytes))
    copy_pieces(plan, binding, image, places.starts, threads=2)
    pieces = []
    for spec, start in zip(plan.pieces, places.starts, strict=True):
        data = bytes(image[start : start + spec.size_bytes])
        step_bytes = chunk_elements * itemsize(spec.dtype)
        digests = tuple(digest(data[i : i + step_bytes]) for i in range(0, len(data), step_bytes))
        pieces.append(
            Piece(
                fqn=spec.fqn,
                offsets=spec.offsets,
                shape=spec.shape,
                start=start,
                size_bytes=spec.size_bytes,
                digests=digests,
            )
        )
    summary = Summary(
        run="r",
        save_id=SAVE_ID,
        timeline=1,
        step=step,
        created_at=rfc3339(datetime.now(timezone.utc)),
        job="j",
        world_size=world_size,
    )
    manifest = ShardManifest(
        save_id=SAVE_ID,
        step=step,
        rank=rank,
        world_size=world_size,
        file=f"__{rank}_0.distcp",
        file_bytes=len(image),
        chunk_elements=chunk_elements,
        pieces=tuple(pieces),
        tensors={
            s.fqn: TensorMeta(dtype=s.dtype, shape=s.global_shape, requires_grad=s.requires_grad) for s in plan.pieces
        },
        per_rank=binding.per_rank,
        summary=summary if rank == 0 else None,
        tree=binding.tree if rank == 0 else None,
        aliases=binding.aliases if rank == 0 else {},
    )
    return ShardManifest.decode(manifest.encode(), what="shard"), bytes(image)


class MemoryCheckpoint:
    """All shards of one save; every read is checked against the digests, as the real reader does."""

    def __init__(self, shards: list[tuple[ShardManifest, bytes]]) -> None:
        self.shards = {manifest.rank: manifest for manifest, _ in shards}
        self.images = {manifest.rank: image for manifest, image in shards}
        self.root = root_of(list(self.shards.values()))
        self.tensors: dict[str, TensorMeta] = {}
        for shard in self.shards.values():
            self.tensors.update(shard.tensors)
        self.tree = self.shards[0].tree
        self.aliases = dict(self.shards[0].aliases)
        self.reads: Counter[str] = Counter()
        self._chunks: dict[int, tuple[ShardManifest, Any]] = {}

    @classmethod
    def open(cls, folder: Path) -> MemoryCheckpoint:
        """What the ranks of a job left with :meth:`leave`."""
        return cls([pickle.loads(path.read_bytes()) for path in sorted(folder.glob("shard-*"))])

    @staticmethod
    def leave(folder: Path, manifest: ShardManifest, image: bytes) -> None:
        (folder / f"shard-{manifest.rank:05d}").write_bytes(pickle.dumps((manifest, image)))

    def per_rank(self, rank: int) -> Any:
        return self.shards[rank].per_rank

    def pieces(self, fqn: str) -> list[tuple[int, int, Piece]]:
        fqn = self.aliases.get(fqn, fqn)
        return [(r, i, p) for r, s in self.shards.items() for i, p in enumerate(s.pieces) if p.fqn == fqn]

    def chunks(self, rank: int, piece_index: int) -> Any:
        shard = self.shards[rank]
        if rank not in self._chunks or self._chunks[rank][0] is not shard:
            self._chunks[rank] = shard, chunks_of(shard)
        return self._chunks[rank][1][piece_index]

    def read_batch(self, wanted: Any) -> list[str]:
        return [self.read_chunk(*one) for one in wanted]

    read_nearby = read_batch

    def repair(self, rank: int, piece_index: int, chunk_index: int, good: memoryview) -> None:
        """It has no disk."""

    def read_chunk(self, rank: int, piece_index: int, chunk_index: int, out: memoryview) -> str:
        chunk = self.chunks(rank, piece_index)[chunk_index]
        data = self.images[rank][chunk.offset : chunk.offset + chunk.size_bytes]
        fqn = self.shards[rank].pieces[piece_index].fqn
        if digest(data) != chunk.digest:
            raise IntegrityError(f"{fqn} is damaged", key=fqn)
        np.frombuffer(out, dtype=np.uint8)[:] = np.frombuffer(data, dtype=np.uint8)
        self.reads[fqn] += len(data)
        return "local"


def save(state: Any, *, chunk_elements: int = 1024) -> MemoryCheckpoint:
    """Save ``state`` as one process would."""
    prepared = Preparer(Agreement.alone()).prepare(state, step=1, counter=1)
    return MemoryCheckpoint([shard_of(prepared, chunk_elements=chunk_elements)])
