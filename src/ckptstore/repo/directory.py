"""Reading one checkpoint directory: its manifests, bounded and checked.

The root manifest is trusted as far as it is well-formed; a shard manifest is trusted only when its blake3 is the one
the root names. Names found in documents are compared with the grammar, never joined to a path as they are.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ckptstore.errors import FormatError, IntegrityError, NotFoundError
from ckptstore.format.manifest import MAX_MANIFEST_BYTES, RootManifest, ShardManifest, ShardRef, Summary, strong_digest
from ckptstore.repo import names
from ckptstore.repo.durable import raise_for_errno, read_bounded
from ckptstore.repo.timelines import created_at


def identity(path: Path) -> tuple[int | None, str]:
    """Step (None while staging) and save_id that the directory's name states.

    Raises:
        FormatError: not a directory name of ours.
    """
    if (parsed := names.parse_checkpoint_dir(path.name)) is not None:
        return parsed
    if (save_id := names.parse_staging_dir(path.name)) is not None:
        return None, save_id
    raise FormatError(f"{path} is not a checkpoint directory", path=str(path))


def check_summary(summary: Summary, *, run: str | None, step: int | None, save_id: str, what: str) -> Summary:
    """The summary itself, if it describes the save it was found with and its values can be told.

    Raises:
        FormatError: it describes another save (a file that was moved, swapped or replayed), or holds a value that
            isn't one.
    """
    if summary.save_id != save_id or (step is not None and summary.step != step):
        raise FormatError(f"{what} belongs to step {summary.step}, save {summary.save_id}", key=what)
    if run is not None and summary.run != run:
        raise FormatError(f"{what} belongs to run {summary.run!r}", key=what)
    created_at(summary)
    for name, value in summary.metrics.items():
        if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
            raise FormatError(f"{what} has metric {name!r} = {value!r}, which is not a number", key=what)
    return summary


def check_root(root: RootManifest, *, what: str) -> RootManifest:
    """The root manifest itself, if its shards are those of one save.

    Raises:
        FormatError: ranks are missing, repeated or out of order, or a shard's file name is not that of its rank.
    """
    if [ref.rank for ref in root.shards] != list(range(root.summary.world_size)):
        raise FormatError(f"{what} does not list ranks 0..{root.summary.world_size - 1} in order", key=what)
    for ref in root.shards:
        if ref.file != names.shard_file(ref.rank):
            raise FormatError(f"{what} names {ref.file!r} as the file of rank {ref.rank}", key=what)
    return root


def read_root_manifest(path: Path, *, run: str | None = None) -> RootManifest:
    """The commit point of this directory.

    Raises:
        NotFoundError: there is none: the save is not complete here.
        FormatError: damaged, of a newer version, or of another save.
        StorageError: it can't be read.
    """
    step, save_id = identity(path)
    file = path / names.MANIFEST
    root = RootManifest.decode(_read(file), what=str(file))
    check_summary(root.summary, run=run, step=step, save_id=save_id, what=str(file))
    return check_root(root, what=str(file))


def read_shard_manifest(path: Path, shard: int | ShardRef) -> ShardManifest:
    """One rank's manifest; with a ``ShardRef`` its bytes are those that the root manifest pins.

    Raises:
        NotFoundError: this rank's part is not in this directory.
        IntegrityError: the bytes differ from the digest in the root manifest.
        FormatError: malformed, of a newer version, or of another save or rank.
        StorageError: it can't be read.
    """
    rank = shard if isinstance(shard, int) else shard.rank
    step, save_id = identity(path)
    file = path / names.shard_manifest_file(rank)
    data = _read(file)
    if isinstance(shard, ShardRef) and strong_digest(data) != shard.manifest_digest:
        raise IntegrityError(
            f"{file} differs from the digest in the root manifest",
            hint="`ckptctl verify --repair` takes it from another tier",
            path=str(file),
            rank=rank,
        )
    manifest = ShardManifest.decode(data, what=str(file))
    if (manifest.rank, manifest.save_id) != (rank, save_id) or (step is not None and manifest.step != step):
        raise FormatError(f"{file} belongs to rank {manifest.rank} of save {manifest.save_id}", key=str(file))
    if manifest.file != names.shard_file(rank):
        raise FormatError(f"{file} names {manifest.file!r} as the file of rank {rank}", key=str(file))
    return manifest


def present_ranks(path: Path) -> list[int]:
    """Ranks that have a shard manifest in this directory, ascending.

    Raises:
        StorageError: the directory can't be listed.
    """
    try:
        with os.scandir(path) as entries:
            ranks = [names.parse_shard_manifest_file(entry.name) for entry in entries]
    except OSError as error:
        raise_for_errno(error, f"can't list {path}")
    return sorted(rank for rank in ranks if rank is not None)


def read_shard_manifests_present(path: Path) -> list[ShardManifest]:
    """Manifests of the parts that are here: those whose shard file stands beside them in full length, by rank.

    Raises:
        FormatError: one of them is damaged or foreign. It is not left out in silence.
        StorageError: the directory or a file can't be read.
    """
    present = []
    for rank in present_ranks(path):
        manifest = read_shard_manifest(path, rank)
        if file_bytes(path / manifest.file) == manifest.file_bytes:
            present.append(manifest)
    return present


def parts_of_node(path: Path, root: RootManifest) -> list[ShardRef]:
    """The parts that belong in this directory: of a save of several nodes those of each node that has something here.

    A part that has lost its shard file or its manifest is known by the other one, or by the other parts of its node.

    Raises:
        StorageError: a file can't be looked at.
    """
    if root.summary.num_nodes == 1:
        return list(root.shards)
    nodes = {
        ref.node
        for ref in root.shards
        if file_bytes(path / ref.file) is not None or file_bytes(path / names.shard_manifest_file(ref.rank)) is not None
    }
    return [ref for ref in root.shards if ref.node in nodes]


def file_bytes(path: Path) -> int | None:
    """Size of a regular file; None when there is none under this name.

    Raises:
        StorageError: it can't be looked at.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise_for_errno(error, f"can't look at {path}")
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read(file: Path) -> bytes:
    try:
        return read_bounded(file, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}", path=str(file)) from None
    except OSError as error:
        raise_for_errno(error, f"can't read {file}")
