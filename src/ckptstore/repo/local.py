"""The local tier: one directory tree, readable by looking at it.

A save is complete when its directory holds ``manifest.json``, prepared when it does not. Listing reads one small file
per save (``summary.json``), falls back to the manifest, and reports what it can't read as damaged instead of leaving
it out. Names outside the grammar of :mod:`ckptstore.repo.names` are foreign: never read, never deleted. Symbolic
links below the root are never followed; the root itself may be one.

Safe for several processes and threads: every change is one atomic step of the file system.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import CheckpointNotFoundError, FormatError, NoStoreError
from ckptstore.format.manifest import (
    RootManifest,
    ShardManifest,
    ShardRef,
    check_run_name,
)
from ckptstore.repo import directory, durable, holding, marker, names
from ckptstore.repo.durable import raise_for_errno, read_bounded
from ckptstore.repo.local_save import LocalSave, look_at, remove_checkpoint

__all__ = ["LocalSave", "LocalTier"]

_MAX_RECORD_BYTES = 64 * 1024


class LocalTier:
    """The tree below ``root``. Opening it touches nothing.

    Args:
        root: Directory of the tier; made by :meth:`create` only.
        clock: Time, for tests.
    """

    def __init__(self, root: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self.root = Path(root)
        self.clock = clock

    # ------------------------------------------------------------------ the store

    def exists(self) -> bool:
        """Whether the root carries our marker.

        Raises:
            FormatError: the marker is damaged, or of a newer version than this ckptstore reads.
            StorageError: it can't be told.
        """
        return marker.is_there(self.root)

    def create(self) -> None:
        """Make the root and its marker, durably; fine if they are there. What else lies there stays untouched.

        Raises:
            FormatError: the root belongs to a newer version, or isn't a directory; nothing was written.
            NoSpaceError, StorageError: as the disk said; trying again is safe.
        """
        if self.exists():
            return
        marker.leave(self.root)
        self.require()

    def require(self) -> None:
        """Nothing if the store is there. Writers call this first, so that a removed root is not raised from the dead.

        Raises:
            NoStoreError: there is no store at the root.
            FormatError, StorageError: as :meth:`exists`.
        """
        if not self.exists():
            raise NoStoreError(f"there is no store in {self.root}", hint="check the path", path=str(self.root))

    def run_path(self, run: str) -> Path:
        """Where this run lives, whether or not it exists.

        Raises:
            ConfigError: the name is not allowed.
        """
        return self.root / check_run_name(run)

    def make_run(self, run: str) -> Path:
        """Make the run's directory durably and return it; fine if it is there.

        Raises:
            ConfigError, NoStoreError, FormatError, NoSpaceError, StorageError
        """
        path = self.run_path(run)
        self.require()
        try:
            durable.make_dir(path)
        except OSError as error:
            raise_for_errno(error, f"can't make {path}", run=run)
        return path

    def runs(self) -> list[str]:
        """Names of the runs that hold anything of ours, sorted; other folders beside them are not runs.

        Raises:
            StorageError: the root can't be listed. An absent root has no runs.
        """
        try:
            with os.scandir(self.root) as entries:
                found = [e.name for e in entries if names.is_run(e.name) and e.is_dir(follow_symlinks=False)]
            return sorted(name for name in found if self._holds_ours(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise_for_errno(error, f"can't list {self.root}")

    def _holds_ours(self, run: str) -> bool:
        with self._scan(run) as entries:
            return any(_is_ours(e.name) and e.is_dir(follow_symlinks=False) for e in entries)

    # ------------------------------------------------------------------ saves

    def saves(self, run: str) -> list[LocalSave]:
        """Every save of the run in this tier, prepared and damaged ones too, by step, then save_id.

        Reads one small file per complete save. An absent run has none.

        Raises:
            FormatError: the run is a symbolic link or a file.
            StorageError: the run can't be listed.
        """
        with self._scan(run) as entries:
            found = [
                (*parsed, Path(entry.path))
                for entry in entries
                if (parsed := names.parse_checkpoint_dir(entry.name)) and entry.is_dir(follow_symlinks=False)
            ]
        found.sort(key=lambda item: (item[0], names.split_save_id(item[1])))
        saves = (look_at(run, step, save_id, path) for step, save_id, path in found)
        return [save for save in saves if save is not None]

    def find(self, run: str, save_id: str) -> LocalSave | None:
        """One save by its save_id; None when this tier does not have it.

        Raises:
            ConfigError: not a save_id.
            FormatError, StorageError: as :meth:`saves`.
        """
        path = self._find_path(run, names.check_save_id(save_id))
        parsed = names.parse_checkpoint_dir(path.name) if path else None
        return look_at(run, *parsed, path) if path and parsed else None

    def root_manifest(self, run: str, save: LocalSave) -> RootManifest:
        """The commit point of a complete save, checked against its place.

        Raises:
            NotFoundError: the save is not complete here (any more).
            FormatError: damaged, of a newer version, or of another save or run.
            StorageError: it can't be read.
        """
        return directory.read_root_manifest(save.path, run=run)

    def shard_manifest(self, path: Path, shard: int | ShardRef) -> ShardManifest:
        """One rank's manifest; see :func:`ckptstore.repo.directory.read_shard_manifest` for what is checked."""
        return directory.read_shard_manifest(path, shard)

    def shard_manifests_present(self, path: Path) -> list[ShardManifest]:
        """Manifests of the parts that are here, by rank; a damaged one raises FormatError."""
        return directory.read_shard_manifests_present(path)

    def delete(self, run: str, save_id: str) -> None:
        """Remove one save. Once this has begun the save is gone or whole, whatever happens next.

        The directory is renamed out of the grammar of saves, durably, before its first file goes; :meth:`sweep`
        finishes what a crash left. Files that aren't ours are moved to ``kept-<save_id>`` beside it. Pins and
        retention are the caller's business.

        Raises:
            ConfigError: not a run name or not a save_id.
            CheckpointNotFoundError: this tier does not have it.
            LockedError: somebody reads it.
            StorageError: as the disk said; the save may be gone already.
        """
        path = self._find_path(run, names.check_save_id(save_id))
        if path is None:
            raise CheckpointNotFoundError(f"run {run!r} has no save {save_id} in {self.root}", run=run, save_id=save_id)
        condemned = path.with_name(names.deleting_dir(save_id))
        try:
            with holding.alone(path):
                remove_checkpoint(condemned)
                os.rename(path, condemned)
                durable.fsync_parent(condemned)
            remove_checkpoint(condemned)
            (self.run_path(run) / names.TIMINGS / f"{save_id}.json").unlink(missing_ok=True)
        except OSError as error:
            raise_for_errno(error, f"can't delete save {save_id}", run=run, save_id=save_id)

    def sweep(self, run: str, live: Collection[str] = ()) -> list[str]:
        """Remove what crashes left: staging and half-deleted directories of saves that aren't in ``live``.

        The caller answers for ``live``: on a shared file system it names the saves of every node.

        Returns:
            The names removed, sorted.

        Raises:
            StorageError: as the disk said; trying again is safe.
        """
        with self._scan(run) as entries:
            found = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        removed = []
        try:
            for name in found:
                path = self.run_path(run) / name
                if (save_id := names.parse_staging_dir(name)) is not None and save_id not in live:
                    durable.remove_tree(path)
                elif (save_id := names.parse_deleting_dir(name)) is not None and save_id not in live:
                    remove_checkpoint(path)
                else:
                    continue
                removed.append(name)
        except OSError as error:
            raise_for_errno(error, f"can't sweep {self.run_path(run)}", run=run)
        return removed

    # ------------------------------------------------------------------ timelines and pins

    def claim_timeline(self, run: str, number: int, record: bytes) -> bool:
        """Claim a timeline durably; False if it is taken. Whoever gets True owns the number for good.

        Raises:
            ConfigError, NoStoreError, NoSpaceError, StorageError
        """
        folder = self.make_run(run) / names.TIMELINES
        try:
            durable.make_dir(folder)
            path = folder / names.timeline_file(number)
            durable.write_new(path, record)
            durable.fsync_parent(path)
        except FileExistsError:
            return False
        except OSError as error:
            raise_for_errno(error, f"can't claim timeline {number}", run=run)
        return True

    def timelines(self, run: str) -> list[int]:
        """Numbers claimed in this tier, ascending."""
        with self._scan(run, names.TIMELINES) as entries:
            numbers = [names.parse_timeline_file(entry.name) for entry in entries]
        return sorted(number for number in numbers if number is not None)

    def timeline_record(self, run: str, number: int) -> bytes | None:
        """What the claimer wrote, torn if a crash tore it; None when the number is not claimed here."""
        path = self.run_path(run) / names.TIMELINES / names.timeline_file(number)
        try:
            return read_bounded(path, _MAX_RECORD_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise_for_errno(error, f"can't read {path}", run=run)

    def pin(self, run: str, save_id: str) -> None:
        """Pin a save durably; fine if it is pinned. The save need not be in this tier.

        Raises:
            ConfigError, NoStoreError, NoSpaceError, StorageError
        """
        names.check_save_id(save_id)
        folder = self.make_run(run) / names.PINS
        try:
            durable.make_dir(folder)
            with suppress(FileExistsError):
                durable.write_new(folder / save_id, b"")
            durable.fsync_dir(folder)
        except OSError as error:
            raise_for_errno(error, f"can't pin save {save_id}", run=run, save_id=save_id)

    def unpin(self, run: str, save_id: str) -> None:
        """Take a pin away durably; fine if there is none."""
        path = self.run_path(run) / names.PINS / names.check_save_id(save_id)
        try:
            os.unlink(path)
            durable.fsync_parent(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise_for_errno(error, f"can't unpin save {save_id}", run=run, save_id=save_id)

    def pins(self, run: str) -> set[str]:
        """The save_ids pinned in this tier."""
        with self._scan(run, names.PINS) as entries:
            return {entry.name for entry in entries if names.is_save_id(entry.name)}

    # ------------------------------------------------------------------ inside

    def _find_path(self, run: str, save_id: str) -> Path | None:
        with self._scan(run) as entries:
            found = [
                Path(entry.path)
                for entry in entries
                if (parsed := names.parse_checkpoint_dir(entry.name))
                and parsed[1] == save_id
                and entry.is_dir(follow_symlinks=False)
            ]
        if len(found) > 1:
            listed = ", ".join(sorted(path.name for path in found))
            raise FormatError(f"save {save_id} is there more than once: {listed}", run=run, save_id=save_id)
        return found[0] if found else None

    @contextmanager
    def _scan(self, run: str, *below: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """Entries of a directory of ours; none when it is absent. Refuses to walk through a symbolic link."""
        path = self.run_path(run)
        try:
            for part in ("", *below):
                path = path / part
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    raise FormatError(f"{path} is not a directory", path=str(path), run=run)
            entries = os.scandir(path)
        except FileNotFoundError:
            yield iter(())
            return
        except OSError as error:
            raise_for_errno(error, f"can't list {path}", run=run)
        with entries:
            try:
                yield entries
            except OSError as error:
                raise_for_errno(error, f"can't list {path}", run=run)


def _is_ours(name: str) -> bool:
    return (
        name in (names.TIMELINES, names.PINS)
        or names.parse_checkpoint_dir(name) is not None
        or names.parse_staging_dir(name) is not None
        or names.parse_deleting_dir(name) is not None
    )
