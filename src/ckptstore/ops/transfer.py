"""`push`, `pull`, `restore`: move what is missing, either way; all resume where they were stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptstore.config import StoreConfig
from ckptstore.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError
from ckptstore.format.foreign import tree_of_names
from ckptstore.format.manifest import ShardManifest
from ckptstore.ops.export import Selection
from ckptstore.ops.importing import digests_of, whole_piece, write_state
from ckptstore.ops.open import RunTiers
from ckptstore.ops.regions import Region, fill
from ckptstore.repo import names, timings
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.progress import Meter, Progress
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.types import CheckpointInfo, StepLike

ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Pushed:
    """What one push did."""

    step: int
    save_id: str
    remote: str
    result: PushResult


def push_checkpoints(
    tiers: RunTiers, step: StepLike | None, *, everything: bool, progress: ProgressCallback | None = None
) -> list[Pushed]:
    """Upload what the remotes lack: one step, the newest, or all; newest first.

    Raises:
        ConfigError: no local tier or no remote was named.
        CheckpointNotFoundError: the local tier lacks that step.
    """
    if tiers.local is None or not tiers.remotes:
        raise ConfigError("push needs a local store and a remote", hint="ckptctl push /data/ckpt --remote s3://...")
    records = [r for r in Catalog.read(tiers.local, (), tiers.run).records if r.local is not None]
    if not everything:
        records = [Catalog.read(tiers.local, (), tiers.run).resolve("latest" if step is None else step)]
    done = []
    for remote in tiers.remotes:
        held = {save.save_id for save in remote.saves()} if remote.exists() else set()
        for record in reversed(records):
            summary = record.summary
            if summary.save_id in held or record.local is None:
                continue
            result = push(tiers.local, record.local.path, tiers.run, remote, config=StoreConfig(), progress=progress)
            timings.note(tiers.local, tiers.run, summary.save_id, {f"remote {remote.name}": result.notes()})
            done.append(Pushed(summary.step, summary.save_id, remote.name, result))
    return done


@dataclass(frozen=True)
class Restored:
    """What a restore did."""

    info: CheckpointInfo
    path: Path
    was_there: bool


def restore(
    tiers: RunTiers,
    step: StepLike,
    folder: Path,
    *,
    part: tuple[int, int] | None = None,
    only: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> Restored:
    """Rebuild a local tier in ``folder`` that trainers, and stock DCP, can open. Every byte is verified.

    Args:
        tiers: Where from.
        step: Which checkpoint.
        folder: A new or empty folder, or a store.
        part: Only every n-th rank's shard.
        only: Globs of tensor names: fetch and keep only these, as a checkpoint of its own that ranks below the whole
            one wherever both are known.
        progress: Called often.

    Raises:
        CheckpointExistsError: the folder holds something that is not a store of ours; with ``only``, the run.
        CheckpointNotFoundError: no such run or step.
        ConfigError: nothing to restore from.
    """
    sources = tiers.remotes
    if not sources:
        raise ConfigError("restore needs a remote to take the bytes from", hint="ckptctl restore s3://... --to DIR")
    if part is not None and only:
        raise ConfigError("--part and --only don't go together", hint="give one of them")
    record: Record = Catalog.read(None, sources, tiers.run).resolve(step)
    target = LocalTier(folder.absolute())
    if not target.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointExistsError(
            f"{folder} is not empty and not a store", hint="restore into a new folder, or into an existing store"
        )
    if only:
        return _restore_some(tiers, record, target, only, progress)
    return _bring(tiers, record, target, part, progress)


def _bring(
    tiers: RunTiers,
    record: Record,
    target: LocalTier,
    part: tuple[int, int] | None,
    progress: ProgressCallback | None,
) -> Restored:
    sources, save_id = tiers.remotes, record.summary.save_id
    if not target.exists():
        target.create()
    was_there = any(save.save_id == save_id and save.state == "complete" for save in target.saves(tiers.run))
    path = pull(sources, save_id, target, part=part, progress=progress)
    found = Catalog.read(target, sources, tiers.run)
    infos = [r.info() for r in found.records if r.summary.save_id == save_id]
    if not infos:
        raise CheckpointNotFoundError(f"save {save_id} is not in {target.root} after the restore")
    info = replace(infos[0], stored_bytes=stored_bytes(sources, record))
    return Restored(info, path, was_there)


def _restore_some(
    tiers: RunTiers, record: Record, target: LocalTier, only: Sequence[str], progress: ProgressCallback | None
) -> Restored:
    """A checkpoint of some tensors, in the line and at the step of the whole one, numbered before it."""
    with CheckpointReader(record, None, tiers.remotes) as reader:
        chosen = Selection(only=tuple(only)).choose(reader)
        if not target.exists():
            target.create()
        stored = list({one.source: one for one in reversed(chosen)}.values())[::-1]
        first = {one.source: one.name for one in stored}
        aliases = {one.name: first[one.source] for one in chosen if one.name != first[one.source]}
        nonce, _ = names.split_save_id(record.save_id)
        save_id = f"{nonce}-0"
        if target.saves(tiers.run):
            return _some_there(target, tiers.run, record.step, save_id, {one.name for one in chosen})
        update = {"save_id": save_id, "world_size": 1, "num_nodes": 1, "tags": (*record.summary.tags, "partial")}
        meter = Meter(sum(one.size_bytes for one in stored), progress)

        def payloads(fd: int, shard: ShardManifest) -> list[tuple[str, ...]]:
            places = zip(stored, shard.pieces, strict=True)
            fill(fd, reader, [Region(one.source, piece.start, one.dtype) for one, piece in places], meter)
            return digests_of(fd, shard)

        written = write_state(
            target,
            record.summary.model_copy(update=update),
            [whole_piece(one.name, one.dtype, one.shape) for one in stored],
            tree_of_names([one.name for one in chosen]),
            aliases,
            payloads,
        )
    meter.add(stage="done")
    if written.local is None:
        raise AssertionError("committed to a local tier that does not have it")
    return Restored(written.info(), written.local.path, False)


def _some_there(target: LocalTier, run: str, step: int, save_id: str, wanted: set[str]) -> Restored:
    """What an earlier call has left, if it was asked for the same tensors of the same checkpoint."""
    for record in Catalog.read(target, (), run).records:
        if (record.step, record.save_id) == (step, save_id) and record.local is not None:
            shard = target.shard_manifest(record.local.path, 0)
            if wanted == {*shard.tensors, *shard.aliases}:
                return Restored(record.info(), record.local.path, True)
    raise CheckpointExistsError(
        f"{target.root} holds checkpoints of run {run!r}", hint="restore a part into a new folder"
    )


def pull_checkpoints(
    tiers: RunTiers, step: StepLike | None, *, everything: bool, progress: ProgressCallback | None = None
) -> list[Restored]:
    """Download what the local tier lacks: one step, the newest, or the whole current line; newest first.

    Raises:
        ConfigError: no local tier or no remote was named.
        CheckpointNotFoundError: the remotes lack that step.
    """
    if tiers.local is None or not tiers.remotes:
        raise ConfigError("pull needs a local store and a remote", hint="ckptctl pull /data/ckpt --remote s3://...")
    tiers.local.create()
    catalog = Catalog.read(None, tiers.remotes, tiers.run)
    records = catalog.line() if everything else [catalog.resolve("latest" if step is None else step)]
    return [_bring(tiers, record, tiers.local, None, progress) for record in reversed(records)]


def stored_bytes(remotes: Sequence[RemoteTier], record: Record) -> int | None:
    """Bytes this save added to the first of these remotes that has it; None if none has."""
    for remote in remotes:
        if remote.name in record.remote:
            root = remote.root_manifest(record.remote[remote.name])
            return sum(remote.remote_shard(record.save_id, ref).stored_bytes for ref in root.shards)
    return None


__all__ = ["Pushed", "Restored", "pull_checkpoints", "push_checkpoints", "restore"]
