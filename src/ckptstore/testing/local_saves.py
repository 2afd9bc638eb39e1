"""Small, real saves in a local tier, written through the commit protocol itself: for tests of what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptstore.clock import rfc3339
from ckptstore.format import stock
from ckptstore.format.manifest import Piece, ShardManifest, Summary, TensorMeta, digest, root_of
from ckptstore.repo import names
from ckptstore.repo.commit import StagingDir
from ckptstore.repo.local import LocalTier

CHUNK_ELEMENTS = 1024


def summary_of(tier: LocalTier, run: str, step: int, save_id: str, **fields: Any) -> Summary:
    """A summary with plain defaults; ``fields`` override them."""
    defaults: dict[str, Any] = {"timeline": 1, "job": "test", "world_size": 1, "created_at": rfc3339(tier.clock.now())}
    return Summary(run=run, step=step, save_id=save_id, **{**defaults, **fields})


def shard_of(summary: Summary, rank: int, payload: bytes, *, node: int = 0) -> ShardManifest:
    """The manifest of a rank that stores ``payload`` as the one tensor ``rank<rank>`` of dtype uint8."""
    fqn, shape = f"rank{rank}", (len(payload),)
    plan = stock.layout([stock.PieceSpec(fqn, "uint8", shape, (0,), shape)])
    slices = [payload[at : at + CHUNK_ELEMENTS] for at in range(0, len(payload), CHUNK_ELEMENTS)]
    piece = Piece(
        fqn=fqn,
        offsets=(0,),
        shape=shape,
        start=plan.starts[0],
        size_bytes=len(payload),
        digests=tuple(digest(part) for part in slices),
    )
    shard = ShardManifest(
        save_id=summary.save_id,
        step=summary.step,
        rank=rank,
        world_size=summary.world_size,
        node=node,
        file=names.shard_file(rank),
        file_bytes=plan.image_bytes,
        chunk_elements=CHUNK_ELEMENTS,
        pieces=(piece,),
        tensors={fqn: TensorMeta(dtype="uint8", shape=shape)},
        summary=summary if rank == 0 else None,
    )
    skeleton = b"".join(data for _, data in stock.skeleton(shard))
    return shard.model_copy(update={"skeleton_digest": digest(skeleton)})


def image_of(shard: ShardManifest, payload: bytes) -> bytes:
    """The bytes of the shard file."""
    image = bytearray(shard.file_bytes)
    for offset, data in stock.skeleton(shard):
        image[offset : offset + len(data)] = data
    start = shard.pieces[0].start
    image[start : start + len(payload)] = payload
    return bytes(image)


def write_save(
    tier: LocalTier,
    run: str,
    step: int,
    save_id: str,
    payload: bytes = b"payload",
    *,
    ranks: Sequence[int] | None = None,
    node: int = 0,
    defer_complete: bool = False,
    **fields: Any,
) -> Path:
    """Write and commit one save: complete if all its ranks are written here, else prepared.

    Args:
        payload: What each rank stores.
        ranks: Ranks of this node; None means all of them.
        node: Index of this node.
        defer_complete: Leave it prepared in any case.
        **fields: Of the summary, such as ``world_size``, ``timeline``, ``metrics``.
    """
    summary = summary_of(tier, run, step, save_id, **fields)
    own = range(summary.world_size) if ranks is None else ranks
    shards = [shard_of(summary, rank, payload, node=node) for rank in own]
    with StagingDir(tier, run, step, save_id) as staging:
        for shard in shards:
            staging.write_file(shard.file, image_of(shard, payload))
            staging.write_file(names.shard_manifest_file(shard.rank), shard.encode())
        if len(shards) == summary.world_size and not defer_complete:
            root = root_of(shards)
            staging.complete(root, stock.metadata(root, shards))
        return staging.commit()
