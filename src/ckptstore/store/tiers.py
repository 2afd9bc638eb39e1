"""The tiers of a store: opened at their first use, and asked and changed together."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore.errors import CkptError, ConfigError, NoStoreError, SaveTimeoutError, StorageError, TransientError
from ckptstore.ops.open import RunTiers
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.store.timeline import newest_claim
from ckptstore.types import StepLike

if TYPE_CHECKING:
    from ckptstore.agent.client import AgentClient
    from ckptstore.dcp.agreement import Agreement
    from ckptstore.repo.catalog import Catalog
    from ckptstore.store.loading import Tiers

log = logging.getLogger("ckptstore")


class StoreTiers:
    """One run in a local root and in remotes. Thread-safe; needs no torch, but for :meth:`sources`.

    Args:
        local: root of the local tier, or None.
        remotes: name -> URL.
        run: the run.
    """

    def __init__(self, local: Path | None, remotes: Mapping[str, str], run: str) -> None:
        self._local, self._remotes, self._run = local, remotes, run
        self._lock = threading.Lock()  # of its own: looking never waits for a save that waits
        self._opened: RunTiers | None = None

    def open(self) -> RunTiers:
        """The tiers, opened once."""
        with self._lock:
            if self._opened is None:
                from ckptstore.blob import between_processes, open_blob_store

                remotes = tuple(
                    RemoteTier(open_blob_store(between_processes(url)), self._run, name)
                    for name, url in self._remotes.items()
                )
                self._opened = RunTiers(self._run, LocalTier(self._local) if self._local else None, remotes)
            return self._opened

    def close(self) -> None:
        """Let go of connections; the next use opens them again."""
        with self._lock:
            opened, self._opened = self._opened, None
        for remote in opened.remotes if opened is not None else ():
            remote.blob.close()

    def sources(self) -> Tiers:
        """The tiers, as a load takes them."""
        from ckptstore.store.loading import Tiers

        opened = self.open()
        return Tiers(opened.run, opened.local, opened.remotes)

    def catalog(self) -> Catalog:
        """The union of what they hold; a remote that can't be reached now is passed over if another has something."""
        return self.open().catalog(tolerate_unreachable=True)

    def catalog_for_saving(self) -> Catalog:
        """What a new timeline is to continue from. A bucket that refuses never keeps a save from the local disk."""
        from ckptstore.repo.catalog import Catalog

        try:
            return self.catalog()
        except StorageError as error:
            log.warning("a remote can't be listed, the save goes by the local tier alone: %s", error)
            opened = self.open()
            unreachable = {remote.name: TransientError(str(error)) for remote in opened.remotes}
            return dataclasses.replace(Catalog.read(opened.local, (), self._run), unreachable=unreachable)

    def newest_claim(self, above: int) -> tuple[int, str] | None:
        """The newest claim above this number that this node knows of; its agent brings those of other machines here."""
        local = self.open().local
        return newest_claim(local, self._run, above) if local is not None else None

    def committed(self) -> dict[str, set[str]]:
        """Remote's name -> the saves it holds, as far as it can be asked now."""
        found: dict[str, set[str]] = {}
        for remote in self.open().remotes:
            try:
                found[remote.name] = {save.save_id for save in remote.saves()}
            except (TransientError, NoStoreError) as error:
                log.debug("remote %s not asked: %s", remote.name, error)
        return found

    def change(self, step: StepLike, action: str) -> None:
        """``pin``, ``unpin`` or ``delete`` one save in every tier that has it.

        Raises:
            CheckpointNotFoundError: there is none.
            ConfigError: it is pinned and was to be deleted.
            TransientError: a remote can't be reached, so what it holds would be left as it is; nothing was changed.
        """
        opened = self.open()
        record = opened.catalog().resolve(step)
        if action == "delete" and record.pinned:
            raise ConfigError(f"step {record.summary.step} is pinned", hint="unpin it first")
        save_id = record.summary.save_id
        if opened.local is not None and record.local is not None:
            getattr(opened.local, action)(self._run, save_id)
        for remote in opened.remotes:
            if remote.name in record.remote:
                getattr(remote, action)(record.remote[remote.name] if action == "delete" else save_id)

    @contextmanager
    def settled(self, agreement: Agreement, *, deadline_s: float) -> Iterator[AgentClient | None]:
        """Collective. Let a running agent put on disk what earlier trainers have sealed, before anyone looks.

        Gives that agent, to be looked at and spoken to; None if there is none.
        """
        agent: AgentClient | None = None
        refused: CkptError | None = None
        if self._local is not None:
            from ckptstore.agent.client import AgentClient

            try:
                agent = AgentClient.observe(self._local)
                if agent is not None:
                    agent.settle(self._run, timeout_s=deadline_s)
            except (TransientError, SaveTimeoutError) as error:
                log.warning("the node agent is still writing earlier saves: %s", error)
            except CkptError as error:
                refused = error
        try:
            agreement.together(refused, what="waiting for earlier saves")
            yield agent
        finally:
            if agent is not None:
                agent.close()
