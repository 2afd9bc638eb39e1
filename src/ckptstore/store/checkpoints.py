"""What one process can do with a run's checkpoints by itself: look at them, read them, keep or remove them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptstore.errors import ConfigError, NoStoreError
from ckptstore.format.manifest import check_run_name
from ckptstore.store.eager import eager, need_torch
from ckptstore.store.remotes import RemoteArgument, name_remotes
from ckptstore.store.tiers import StoreTiers
from ckptstore.types import CheckpointInfo, StepLike

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

    from ckptstore.repo.catalog import Catalog
    from ckptstore.repo.reader import CheckpointReader


class RunCheckpoints:
    """The checkpoints of one run, in the local tier and the remotes. Everything here is Local.

    Args:
        local, remote, run: as for :class:`ckptstore.CheckpointStore`.

    Raises:
        ConfigError: a run name, URL or combination that can't be right.
    """

    def __init__(self, local: str | os.PathLike[str] | None, remote: RemoteArgument, run: str | None) -> None:
        if local is not None and "://" in str(local):
            raise ConfigError(
                f"the local tier is a folder, and {str(local)!r} a URL",
                hint="CheckpointStore('/data/ckpt', remote=URL), or CheckpointStore(None, remote=URL) only to read",
            )
        self.local = Path(local).absolute() if local is not None else None
        self.remotes = name_remotes(remote)
        self.run = check_run_name(run if run is not None else "default")
        if self.local is None and not self.remotes:
            raise ConfigError("a store needs a local root or a remote", hint="CheckpointStore('/data/ckpt')")
        self._tiers = StoreTiers(self.local, self.remotes, self.run)
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        local = str(self.local) if self.local else None
        return f"{type(self).__name__}({local!r}, remote={self.remotes!r}, run={self.run!r})"

    def checkpoints(self, *, include_superseded: bool = False) -> list[CheckpointInfo]:
        """The checkpoints of this run, oldest first. Local; needs no torch. An absent store or run is []."""
        try:
            catalog = self.catalog()
        except NoStoreError as error:
            if "bucket" in error.context:
                raise
            return []
        records = catalog.records if include_superseded else catalog.line()
        return [record.info() for record in records]

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint of the current line, or None. Local."""
        infos = self.checkpoints()
        return infos[-1] if infos else None

    def best(self, monitor: str | None = None, mode: str | None = None) -> CheckpointInfo | None:
        """The checkpoint with the lowest metric ``monitor`` (the highest with ``mode="max"``), or None. Local.

        Args:
            monitor: Name of a metric; None: the one metric of the run whose name ends in "loss".
            mode: "min" (default) or "max".

        Raises:
            ConfigError: no or several metrics end in "loss" and none was named.
        """
        catalog = self.catalog()
        record = catalog.best(monitor or catalog.only_loss(), mode or "min") if catalog.line() else None
        return record.info() if record else None

    def pin(self, step: StepLike) -> None:
        """Keep this checkpoint whatever retention says, in every tier that has it. Local.

        Raises:
            CheckpointNotFoundError: there is none.
            TransientError: a remote can't be reached; nothing was changed.
        """
        self._tiers.change(step, "pin")

    def unpin(self, step: StepLike) -> None:
        """Undo :meth:`pin`. Local; raises what it raises."""
        self._tiers.change(step, "unpin")

    def delete(self, step: StepLike) -> None:
        """Remove one checkpoint from every tier, manifest first. Local.

        Raises:
            CheckpointNotFoundError: there is none.
            ConfigError: it is pinned.
            TransientError: a remote can't be reached; nothing was deleted.
        """
        self._tiers.change(step, "delete")

    @property
    def push_command(self) -> str:
        """What to type where this store lies, to finish its uploads; of several remotes one is to be named."""
        urls = list(self.remotes.values())
        place = ["--remote", urls[0] if len(urls) == 1 else "URL"]
        return shlex.join(["ckptctl", "push", str(self.local), *place, "--run", self.run])

    def catalog(self) -> Catalog:
        """Every save of the run in all tiers, damaged and superseded ones included. Local; needs no torch.

        A remote that can't be reached now is passed over if another tier has something.

        Raises:
            StorageError: a tier can't be listed.
        """
        return self._tiers.catalog()

    @eager
    def read(self, step: StepLike = "latest", *, only: Sequence[str] = ()) -> Any:
        """The stored state without a target: nested containers of CPU tensors. Local.

        Each module comes as one flat dict of names, without wrapper prefixes.

        Raises:
            CheckpointNotFoundError, IntegrityError: as for ``load``.
        """
        from ckptstore.dcp.reading import read_state
        from ckptstore.store.loading import choose

        _, reader, _ = choose(self._tiers.sources(), step)
        with reader:
            return read_state(reader, only=only)

    def reader(self, step: StepLike = "latest") -> StorageReader:
        """A ``StorageReader`` for ``torch.distributed.checkpoint.load(state, storage_reader=...)``. Local.

        Nothing is opened before the load; each load looks anew which checkpoint ``step`` means.

        Raises (in the load, as causes of DCP's own error):
            CheckpointNotFoundError, IntegrityError: as for :meth:`load`.
        """
        need_torch("reader")
        from ckptstore.dcp.storage_reader import CheckpointStorageReader
        from ckptstore.store.loading import choose

        def opened(save_id: str | None) -> CheckpointReader:
            self._check_open()
            return choose(self._tiers.sources(), step if save_id is None else save_id)[1]

        return CheckpointStorageReader(opened)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this store is closed", hint="open a new CheckpointStore")
        if os.getpid() != self._pid:
            raise ConfigError("this process was forked from the one that opened the store", hint="open it here")
