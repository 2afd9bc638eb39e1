"""`import`: a state from elsewhere becomes a checkpoint of a local tier, streaming, committed as any other.

Safetensors files are read here, without torch. What needs torch to be read arrives as a ForeignState.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ckptstore.clock import SYSTEM_CLOCK, new_nonce, rfc3339
from ckptstore.errors import CheckpointExistsError, ConfigError, FormatError, NotFoundError
from ckptstore.format import stock, tree
from ckptstore.format.dtypes import itemsize
from ckptstore.format.foreign import ForeignState, ForeignTensor, tree_of_names
from ckptstore.format.manifest import Json, Piece, ShardManifest, Summary, TensorMeta, digest, root_of
from ckptstore.format.stock import PieceSpec
from ckptstore.ops import safetensors
from ckptstore.ops.export import STATE_KEY
from ckptstore.ops.regions import allocate
from ckptstore.repo import names
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.commit import StagingDir
from ckptstore.repo.durable import READ_FLAGS, raise_for_errno, read_bounded
from ckptstore.repo.local import LocalTier
from ckptstore.repo.progress import Meter, ProgressCallback
from ckptstore.repo.timelines import Claim

CHUNK_ELEMENTS = 1 << 20
_MAX_INDEX_BYTES = 256 << 20
_READ_BYTES = 8 << 20


def import_state(
    tier: LocalTier, run: str, step: int, state: ForeignState, *, progress: ProgressCallback | None = None
) -> Record:
    """Write ``state`` as the checkpoint of ``step``, in a timeline of its own, and commit it. Blocks.

    Raises:
        CheckpointExistsError: the run has a checkpoint at or above this step, which this one would supersede.
        FormatError: the source is not what it says.
        NoSpaceError, StorageError: as the disk said; nothing is left.
    """
    tier.create()
    catalog = Catalog.read(tier, (), run)
    above = [record.step for record in catalog.line() if record.step >= step]
    if above:
        raise CheckpointExistsError(
            f"run {run!r} has checkpoints at or above step {step} already (step {above[-1]})",
            hint="import into a run of its own: --run NAME",
            run=run,
            step=step,
        )
    job = new_nonce()
    parent = catalog.parent_for(step)
    number = catalog.next_timeline()
    while not tier.claim_timeline(run, number, Claim(timeline=number, job=job, step=step, parent=parent).encode()):
        number += 1
    summary = Summary(
        run=run,
        save_id=f"{job}-1",
        timeline=number,
        parent=parent,
        step=step,
        created_at=rfc3339(SYSTEM_CLOCK.now()),
        job=job,
        world_size=1,
        tags=("imported",),
    )
    meter = Meter(sum(tensor.size_bytes for tensor in state.tensors), progress)
    specs = [whole_piece(t.name, t.dtype, t.shape) for t in state.tensors]
    return write_state(
        tier,
        summary,
        specs,
        state.tree,
        state.aliases,
        lambda fd, shard: _payloads(fd, shard, state.tensors, meter),
    )


def whole_piece(name: str, dtype: str, shape: tuple[int, ...]) -> PieceSpec:
    """A tensor that one rank stores whole."""
    return PieceSpec(name, dtype, shape, (0,) * len(shape), shape)


#: Fills the payloads of a shard file that is otherwise written, and gives the digests of each piece's chunks.
Payloads = Callable[[int, ShardManifest], list[tuple[str, ...]]]


def write_state(
    tier: LocalTier,
    summary: Summary,
    specs: Sequence[PieceSpec],
    state_tree: Json,
    aliases: Mapping[str, str],
    payloads: Payloads,
) -> Record:
    """Commit a checkpoint of one shard. Blocks; after an error nothing of it is left.

    Raises:
        NoSpaceError, StorageError: as the disk said. What ``payloads`` raises passes unchanged.
    """
    with StagingDir(tier, summary.run, summary.step, summary.save_id) as staging:
        image = stock.layout(specs)
        appended, _ = stock.tail(stock.stock_items(state_tree), image.image_bytes)
        pieces = tuple(
            Piece(fqn=s.fqn, offsets=s.offsets, shape=s.shape, start=start, size_bytes=s.size_bytes)
            for s, start in zip(specs, image.starts, strict=True)
        )
        shard = ShardManifest(
            save_id=summary.save_id,
            step=summary.step,
            rank=0,
            world_size=1,
            file=names.shard_file(0),
            file_bytes=image.image_bytes + len(appended),
            chunk_elements=CHUNK_ELEMENTS,
            pieces=pieces,
            tensors={s.fqn: TensorMeta(dtype=s.dtype, shape=s.global_shape) for s in specs},
            summary=summary,
            tree=state_tree,
            aliases=dict(aliases),
        )
        rest = xxhash.xxh3_128()
        fd = staging.open_file(shard.file)
        with staging.deed(f"write {shard.file} of"):
            allocate(fd, shard.file_bytes)
            for offset, data in stock.skeleton(shard):
                rest.update(data)
                os.pwrite(fd, data, offset)
            digests = payloads(fd, shard)
        staging.close_file(fd)
        checked = tuple(p.model_copy(update={"digests": d}) for p, d in zip(pieces, digests, strict=True))
        shard = shard.model_copy(update={"skeleton_digest": rest.hexdigest(), "pieces": checked})
        staging.write_file(names.shard_manifest_file(0), shard.encode())
        root = root_of([shard])
        staging.complete(root, stock.metadata(root, [shard]))
        staging.commit()
    return Catalog.read(tier, (), summary.run).resolve(summary.save_id)


def digests_of(fd: int, shard: ShardManifest) -> list[tuple[str, ...]]:
    """The digests of what lies in the places of a shard file's pieces now."""
    return _payloads(fd, shard, None, Meter(0))


def _payloads(
    fd: int, shard: ShardManifest, tensors: Sequence[ForeignTensor] | None, meter: Meter
) -> list[tuple[str, ...]]:
    """Have every tensor read into its place of the file; the digests of its chunks. None: all is there already."""
    if not any(piece.size_bytes for piece in shard.pieces):
        return [()] * len(shard.pieces)
    memory = np.frombuffer(mmap.mmap(fd, shard.file_bytes), np.uint8)  # unmapped with the last view into it
    result = []
    for number, piece in enumerate(shard.pieces):
        place = memory[piece.start : piece.start + piece.size_bytes].data
        if piece.size_bytes and tensors is not None:
            tensors[number].read_into(place)
        width = shard.chunk_elements * itemsize(shard.tensors[piece.fqn].dtype)
        result.append(tuple(digest(place[at : at + width]) for at in range(0, piece.size_bytes, width)))
        meter.add(plain=piece.size_bytes)
    return result


# ---------------------------------------------------------------------- safetensors


@contextmanager
def open_safetensors(path: Path, *, under: str | None = None) -> Iterator[ForeignState]:
    """A ``.safetensors`` file, or a directory of them with or without an index.

    Args:
        path: File or directory.
        under: A top-level key to put all tensors below, as ``model`` for weights whose names don't begin with it.

    Raises:
        NotFoundError: there is none.
        FormatError: damaged, or a file the index names is missing or lacks a tensor.
    """
    with ExitStack() as stack:
        tensors: dict[str, ForeignTensor] = {}
        files, weight_map, state = _files(path)
        for file in files:
            fd = _open(file)
            stack.callback(os.close, fd)
            entries, metadata = safetensors.read_header(file, fd)
            state = metadata.get(STATE_KEY, state)
            for entry in entries:
                if weight_map.get(entry.name, file.name) != file.name:
                    continue
                if entry.name in tensors:
                    raise FormatError(f"{entry.name!r} is in two files of {path}", key=entry.name)
                name = f"{under}.{entry.name}" if under else entry.name
                read = partial(_read_into, file, fd, entry.start)
                tensors[entry.name] = ForeignTensor(name, entry.dtype, entry.shape, read)
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            raise FormatError(f"the index of {path} names {missing[0]!r}, which no file has", key=missing[0])
        encoded = _state_of(state, set(tensors)) if under is None else None
        if encoded is None:
            encoded = tree_of_names([tensor.name for tensor in tensors.values()])
        yield ForeignState(list(tensors.values()), encoded, {})


def _files(path: Path) -> tuple[list[Path], dict[str, str], str | None]:
    """The files to read, the index's word on which tensor is in which, and the state kept with it."""
    if not path.is_dir():
        return [path], {}, None
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise NotFoundError(f"{path} holds no .safetensors files", path=str(path))
        return files, {}, None
    if len(indexes) > 1:
        raise ConfigError(f"{path} holds several indexes", hint="give one of the files instead")
    try:
        index: Any = json.loads(read_bounded(indexes[0], _MAX_INDEX_BYTES))
        weight_map, metadata = index["weight_map"], index.get("metadata") or {}
        if not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise FormatError(f"{indexes[0]} is not an index of safetensors files")
        state = metadata.get(STATE_KEY)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{indexes[0]} is not an index of safetensors files", path=str(indexes[0])) from None
    except OSError as error:
        raise_for_errno(error, f"can't read {indexes[0]}")
    here = {file.name: file for file in path.glob("*.safetensors")}
    absent = sorted(set(weight_map.values()) - set(here))
    if absent:  # names are looked up among what is there, never joined to a path
        raise FormatError(f"{indexes[0].name} names {absent[0]!r}, which is not in {path}", path=str(path))
    return (
        [here[name] for name in sorted(set(weight_map.values()))],
        weight_map,
        state if isinstance(state, str) else None,
    )


def _state_of(text: str | None, tensors: set[str]) -> Json | None:
    """The state tree kept with an export of ours, if it fits the tensors."""
    if text is None:
        return None
    try:
        encoded: Json = json.loads(text)
        tree.subtrees(encoded)
        return encoded if set(tree.tensor_names(encoded)) <= tensors else None
    except (ValueError, RecursionError, FormatError):
        return None


def _open(file: Path) -> int:
    try:
        return os.open(file, READ_FLAGS & ~os.O_NOFOLLOW)  # downloads are often links into a cache
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}", path=str(file)) from None
    except OSError as error:
        raise_for_errno(error, f"can't read {file}")


def _read_into(file: Path, fd: int, start: int, out: memoryview) -> None:
    done = 0
    try:
        while done < out.nbytes:
            count = os.preadv(fd, [out[done : done + _READ_BYTES]], start + done)
            if count == 0:
                raise FormatError(f"{file} became shorter while it was read", path=str(file))
            done += count
    except OSError as error:
        raise_for_errno(error, f"can't read {file}")
