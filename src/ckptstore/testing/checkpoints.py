"""Local checkpoints made without torch, trainers or an agent, the same bytes a trainer's would have."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ckptstore.clock import new_nonce
from ckptstore.format import stock, tree
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Parent, Piece, ShardManifest, Summary, TensorMeta, digest, root_of
from ckptstore.repo import names
from ckptstore.repo.commit import StagingDir, complete
from ckptstore.repo.local import LocalTier

Array = npt.NDArray[np.generic]


def new_save_id(counter: int = 1) -> str:
    """A save_id nobody else has."""
    return f"{new_nonce()}-{counter}"


def write_checkpoint(
    tier: LocalTier,
    state: Mapping[str, Array],
    *,
    run: str = "default",
    step: int = 1,
    save_id: str | None = None,
    world_size: int = 1,
    ranks: Collection[int] | None = None,
    timeline: int = 1,
    parent: Parent | None = None,
    dtypes: Mapping[str, str] | None = None,
    extras: Mapping[str, object] | None = None,
    chunk_elements: int = 4096,
    told: Mapping[str, object] | None = None,
) -> Path:
    """Write one save of ``state`` and commit it; without all its ranks it is *prepared*, as on one node of several.

    Args:
        tier: Where; made if need be.
        state: Arrays by name, each split by rows over the ranks; 0-dim ones are rank 0's.
        run: The run.
        step: Step of the save.
        save_id: Its identity; None: a new one. Parts of one save on several tiers need the same one.
        world_size: Number of ranks.
        ranks: Those written here; None: all. Each counts as a node of its own then.
        timeline: Timeline of the save.
        parent: The save its timeline continues from.
        dtypes: torch dtypes of arrays that NumPy has no dtype for, such as bfloat16 kept as uint16.
        extras: Values that aren't tensors.
        chunk_elements: Elements per chunk.
        told: Fields of the summary, such as ``epoch``, ``metrics``, ``tags`` or ``created_at``.

    Returns:
        The checkpoint's directory.
    """
    tier.create()
    save_id = save_id or new_save_id()
    staging = StagingDir(tier, run, step, save_id)
    staging.create()
    summary = Summary(
        run=run,
        save_id=save_id,
        timeline=timeline,
        parent=parent,
        step=step,
        created_at="2026-11-25T12:00:00.000Z",
        job=save_id.partition("-")[0],
        world_size=world_size,
    ).model_copy(update=dict(told or {}))
    nested = {**{name: _Named(name) for name in state}, **(extras or {})}
    encoded = tree.encode(nested, lambda _, value: tree.TensorRef(value.name) if isinstance(value, _Named) else value)
    shards = []
    for rank in range(world_size) if ranks is None else sorted(ranks):
        shard = ShardManifest(
            save_id=save_id,
            step=step,
            rank=rank,
            world_size=world_size,
            node=0 if ranks is None else rank,
            file=names.shard_file(rank),
            file_bytes=0,
            chunk_elements=chunk_elements,
            summary=summary if rank == 0 else None,
            tree=encoded if rank == 0 else None,
        )
        boxes = {name: box for name, array in state.items() if (box := _box(array, rank, world_size)) is not None}
        shards.append(_write_shard(staging, shard, state, boxes, dtypes or {}))
    if len(shards) == world_size:
        complete(staging.path, root_of(shards))
    return staging.commit()


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


def _box(array: Array, rank: int, world_size: int) -> tuple[int, int] | None:
    """First row and number of rows of this rank; None when it has none of them."""
    if array.ndim == 0:
        return (0, 0) if rank == 0 else None
    per_rank = -(-array.shape[0] // world_size)
    start = min(rank * per_rank, array.shape[0])
    rows = min(per_rank, array.shape[0] - start)
    return (start, rows) if rows or (rank == 0 and array.shape[0] == 0) else None


def _write_shard(
    staging: StagingDir,
    shard: ShardManifest,
    state: Mapping[str, Array],
    boxes: Mapping[str, tuple[int, int]],
    dtypes: Mapping[str, str],
) -> ShardManifest:
    specs, payloads = [], []
    for name, (start, rows) in boxes.items():
        array = state[name]
        dtype = dtypes.get(name, array.dtype.name)
        part = array if array.ndim == 0 else array[start : start + rows]
        offsets = (start, *([0] * (array.ndim - 1))) if array.ndim else ()
        specs.append(stock.PieceSpec(name, dtype, array.shape, offsets, part.shape))
        payloads.append(np.ascontiguousarray(part).tobytes())
    image = stock.layout(specs)
    pieces = []
    for spec, start, payload in zip(specs, image.starts, payloads, strict=True):
        width = shard.chunk_elements * itemsize(spec.dtype)
        digests = tuple(digest(payload[at : at + width]) for at in range(0, len(payload), width))
        pieces.append(
            Piece(
                fqn=spec.fqn,
                offsets=spec.offsets,
                shape=spec.shape,
                start=start,
                size_bytes=len(payload),
                digests=digests,
            )
        )
    appended = stock.tail(stock.stock_items(shard.tree), image.image_bytes)[0] if shard.tree is not None else b""
    shard = shard.model_copy(
        update={
            "pieces": tuple(pieces),
            "tensors": {s.fqn: TensorMeta(dtype=s.dtype, shape=s.global_shape) for s in specs},
            "file_bytes": image.image_bytes + len(appended),
        }
    )
    state_of_rest = xxhash.xxh3_128()
    fd = staging.open_file(shard.file)
    for offset, data in stock.skeleton(shard):
        state_of_rest.update(data)
        os.pwrite(fd, data, offset)
    for piece, payload in zip(pieces, payloads, strict=True):
        os.pwrite(fd, payload, piece.start)
    staging.close_file(fd)
    shard = shard.model_copy(update={"skeleton_digest": state_of_rest.hexdigest()})
    staging.write_file(names.shard_manifest_file(shard.rank), shard.encode())
    return shard
