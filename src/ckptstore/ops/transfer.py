"""`push` and `restore`: move what is missing, either way; both resume where they were stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptstore.config import StoreConfig
from ckptstore.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError
from ckptstore.ops.open import RunTiers
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.progress import Progress
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
    progress: ProgressCallback | None = None,
) -> Restored:
    """Rebuild a local tier in ``folder`` that trainers, and stock DCP, can open. Every byte is verified.

    Raises:
        CheckpointExistsError: the folder holds something that is not a store of ours.
        CheckpointNotFoundError: no such run or step.
        ConfigError: nothing to restore from.
    """
    sources = tiers.remotes
    if not sources:
        raise ConfigError("restore needs a remote to take the bytes from", hint="ckptctl restore s3://... --to DIR")
    target = LocalTier(folder.absolute())
    if not target.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointExistsError(
                f"{folder} is not empty and not a store", hint="restore into a new folder, or into an existing store"
            )
        target.create()
    record: Record = Catalog.read(None, sources, tiers.run).resolve(step)
    was_there = any(
        save.save_id == record.summary.save_id and save.state == "complete" for save in target.saves(tiers.run)
    )
    path = pull(sources, record.summary.save_id, target, part=part, progress=progress)
    found = Catalog.read(target, sources, tiers.run)
    infos = [r.info() for r in found.records if r.summary.save_id == record.summary.save_id]
    if not infos:
        raise CheckpointNotFoundError(f"save {record.summary.save_id} is not in {folder} after the restore")
    info = replace(infos[0], stored_bytes=stored_bytes(sources, record))
    return Restored(info, path, was_there)


def stored_bytes(remotes: Sequence[RemoteTier], record: Record) -> int | None:
    """Bytes this save added to the first of these remotes that has it; None if none has."""
    for remote in remotes:
        if remote.name in record.remote:
            root = remote.root_manifest(record.remote[remote.name])
            return sum(remote.remote_shard(record.save_id, ref).stored_bytes for ref in root.shards)
    return None


__all__ = ["Pushed", "Restored", "push_checkpoints", "restore"]
