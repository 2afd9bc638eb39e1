"""How a save becomes complete on the local disk: one rename, or one manifest.

One node::

    .staging-<save_id>/   every file written and fsynced, the manifests too
    fsync(directory)
    rename -> step-<step>-<save_id>/
    fsync(parent)         committed: from here a power cut can't take it

Several nodes: the same without ``manifest.json`` (*prepared*), and once all are prepared :func:`complete` adds it in
each. Either way ``manifest.json`` appears whole, after everything it vouches for, and that is the commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from types import TracebackType

from ckptstore.errors import CheckpointExistsError, ConfigError, ConflictError, IntegrityError, StorageError
from ckptstore.format.manifest import MAX_MANIFEST_BYTES, RootManifest, ShardManifest, root_of
from ckptstore.repo import directory, durable, names
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.local import LocalTier

__all__ = ["StagingDir", "complete", "raise_for_errno", "roll_forward"]


class StagingDir:
    """One node's part of one save while it is written.

    Any file system error spoils it for good (an fsync that failed once can lie the second time): discard it and
    write the part again into a new one. Thread-safe; one object per part. As a context manager it creates the
    directory, and discards it unless it was committed.

    Args:
        tier: Where; its store must exist.
        run: Name of the run.
        step: Step of the save.
        save_id: Identity of the save, never used before.
    """

    def __init__(self, tier: LocalTier, run: str, step: int, save_id: str) -> None:
        if step < 0:
            raise ConfigError(f"step {step} is negative")
        self.tier = tier
        self.run = run
        self.step = step
        self.save_id = names.check_save_id(save_id)
        self.path = tier.run_path(run) / names.staging_dir(save_id)
        self.final_path = tier.run_path(run) / names.checkpoint_dir(step, save_id)
        self._open: dict[int, str] = {}
        self._spoiled = False
        self._lock = Lock()

    def __enter__(self) -> StagingDir:
        self.create()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def create(self, *, keep: bool = False) -> None:
        """Make the directory, empty: what an earlier attempt at this save left is removed.

        Args:
            keep: Leave what is there: another node's files on a shared file system, or a download to be resumed.

        Raises:
            NoStoreError: the tier is gone.
            CheckpointExistsError: this save is committed or prepared already.
            NoSpaceError, StorageError: as the disk said.
        """
        self.tier.make_run(self.run)
        with self.deed("make the directory of"):
            if os.path.lexists(self.final_path):
                raise CheckpointExistsError(
                    f"step {self.step}, save {self.save_id} is there already", path=str(self.final_path)
                )
            if not keep:
                durable.remove_tree(self.path)
            durable.make_dir(self.path)

    @contextmanager
    def deed(self, what: str) -> Iterator[None]:
        """Wrap writes to a descriptor of :meth:`open_file` in this, so that errors become ours and spoil the save.

        Args:
            what: The deed, as "write __0_0.distcp of".

        Raises:
            NoSpaceError, StorageError: in place of the OSError, naming errno, run, step and save_id.
        """
        try:
            yield
        except OSError as error:
            self._spoiled = True
            raise_for_errno(error, f"can't {what} step {self.step}", run=self.run, step=self.step, save_id=self.save_id)

    def open_file(self, name: str, flags: int = 0) -> int:
        """A read-write descriptor of a new file; give it back to :meth:`close_file`.

        Args:
            name: A file name of a checkpoint directory.
            flags: More open flags, such as ``os.O_DIRECT``.

        Raises:
            ConfigError: not a name a checkpoint directory may hold.
            NoSpaceError, StorageError: as the disk said; EEXIST means the file was begun before.
        """
        if not names.is_checkpoint_file(name):
            raise ConfigError(f"{name!r} is not a file of a checkpoint directory")
        with self.deed(f"create {name} of"):
            fd = durable.create_file(self.path / name, flags)
        with self._lock:
            self._open[fd] = name
        return fd

    def close_file(self, fd: int) -> None:
        """Make the file's bytes durable and close it. It is closed even after an error.

        Raises:
            NoSpaceError, StorageError: the bytes may be lost; the directory is spoiled.
        """
        with self._lock:
            name = self._open.pop(fd)
        with self.deed(f"write {name} of"):
            try:
                durable.fsync_file(fd)
            finally:
                os.close(fd)

    def write_file(self, name: str, data: bytes) -> None:
        """One whole small file, fsynced."""
        fd = self.open_file(name)
        try:
            with self.deed(f"write {name} of"):
                durable.write_all(fd, data)
        except BaseException:
            self._abandon(fd)
            raise
        self.close_file(fd)

    def complete(self, root: RootManifest, stock_metadata: bytes | None = None) -> None:
        """Add what makes the directory a whole save once it is committed; all shards must be here.

        The order doesn't matter, since nothing in here exists for anybody before :meth:`commit`.

        Args:
            root: made of the manifests of all shards.
            stock_metadata: for stock PyTorch.
        """
        if stock_metadata is not None:
            self.write_file(names.STOCK_METADATA, stock_metadata)
        self.write_file(names.SUMMARY, root.summary.encode())
        self.write_file(names.MANIFEST, root.encode())

    def commit(self) -> Path:
        """Give the directory its final name, durably: complete if it holds ``manifest.json``, else prepared.

        Returns:
            The final path, once a power cut can't take it any more.

        Raises:
            StorageError: a file is still open, an earlier step failed, or the disk said so now. The save is not
                acknowledged: discard it.
            CheckpointExistsError: somebody committed this save before.
        """
        if self._open:
            raise StorageError(f"can't commit {self.path}: {', '.join(sorted(self._open.values()))} not closed")
        if self._spoiled:
            raise StorageError(
                f"can't commit {self.path}: an earlier write failed", hint="write the part again into a new directory"
            )
        with self.deed("commit"):
            durable.fsync_dir(self.path)
            if os.path.lexists(self.final_path):
                raise CheckpointExistsError(
                    f"step {self.step}, save {self.save_id} is there already", path=str(self.final_path)
                )
            os.rename(self.path, self.final_path)
            try:
                durable.fsync_parent(self.final_path)
            except OSError:
                # Nobody was told of it yet, so it may leave again; then the part can be written anew.
                with suppress(OSError):
                    os.rename(self.final_path, self.path)
                raise
        return self.final_path

    def discard(self) -> None:
        """Close and remove everything, once no thread writes any more; idempotent, and nothing after a commit.

        What can't be removed now is left to the tier's sweep.
        """
        self._spoiled = True
        for fd in list(self._open):
            self._abandon(fd)
        with suppress(OSError):
            durable.remove_tree(self.path)

    def _abandon(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
        self._spoiled = True
        with suppress(OSError):
            os.close(fd)


def complete(path: Path, root: RootManifest) -> None:
    """Make a prepared part complete: ``manifest.json`` is the last thing to appear.

    Also writes ``summary.json``, and ``.metadata`` for stock PyTorch if the parts of all ranks are here. Repeating it
    is fine: the same root gives the same bytes.

    Args:
        path: A directory of this save.
        root: The root manifest, computed from the shard manifests of all ranks, all of them durable somewhere.

    Raises:
        ConflictError: another root is here. Nothing was written.
        IntegrityError: a part here is not the one the root names, or not whole. Nothing was written.
        FormatError: the root is of another save, or malformed. Nothing was written.
        NoSpaceError, StorageError: as the disk said; the save is as before, trying again is safe.
    """
    step, save_id = directory.identity(path)
    directory.check_summary(root.summary, run=None, step=step, save_id=save_id, what="root manifest")
    directory.check_root(root, what="root manifest")
    data = root.encode()
    shards = _parts_here(path, root)
    try:
        with suppress(FileNotFoundError):
            if durable.read_bounded(path / names.MANIFEST, MAX_MANIFEST_BYTES) == data:
                return
            raise ConflictError(f"{path} is committed with another root manifest", path=str(path), save_id=save_id)
        if len(shards) == len(root.shards):
            from ckptstore.format import stock

            durable.write_replacing(path / names.STOCK_METADATA, stock.metadata(root, shards))
        durable.write_replacing(path / names.SUMMARY, root.summary.encode())
        durable.fsync_dir(path)  # the summary's name before the manifest's, on file systems that keep no order
        durable.write_replacing(path / names.MANIFEST, data)
        durable.fsync_dir(path)
    except OSError as error:
        raise_for_errno(error, f"can't complete {path}", save_id=save_id)


def _parts_here(path: Path, root: RootManifest) -> list[ShardManifest]:
    """Manifests of the parts in this directory, each the one that the root names, each with its whole shard file."""
    here = set(directory.present_ranks(path))
    shards = []
    for ref in root.shards:
        if ref.rank not in here:
            continue
        shard = directory.read_shard_manifest(path, ref)
        if directory.file_bytes(path / ref.file) != ref.file_bytes:
            raise IntegrityError(f"{path / ref.file} is not whole", path=str(path / ref.file), rank=ref.rank)
        shards.append(shard)
    return shards


def roll_forward(
    tier: LocalTier, run: str, save_id: str, elsewhere: Iterable[ShardManifest] = ()
) -> RootManifest | None:
    """Complete a prepared save if every rank's part is durable somewhere.

    After a crash between *prepared* and *complete* nobody was told that the save exists, yet all of it does.

    Args:
        tier: Has the prepared part.
        run: Name of the run.
        save_id: The save.
        elsewhere: Shard manifests of parts that the caller knows to be durable in other tiers or on other nodes.

    Returns:
        The root manifest, complete here once this returns; None if some rank's part is nowhere.

    Raises:
        ConflictError: two parts of one rank differ.
        CkptError: as :func:`complete`.
    """
    save = tier.find(run, save_id)
    if save is None:
        return None
    parts: dict[int, ShardManifest] = {}
    for shard in (*tier.shard_manifests_present(save.path), *elsewhere):
        if parts.setdefault(shard.rank, shard) != shard:
            raise ConflictError(f"rank {shard.rank} has two different parts of save {save_id}", save_id=save_id)
    if not parts or len(parts) < next(iter(parts.values())).world_size:
        return None
    root = root_of(list(parts.values()))
    complete(save.path, root)
    return root
