"""The store a training script holds."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, ConfigError, SaveTimeoutError, StorageError
from ckptstore.format.manifest import Parent
from ckptstore.store.checkpoints import RunCheckpoints
from ckptstore.store.eager import eager, need_torch
from ckptstore.store.fence import Fence
from ckptstore.store.handle import SaveHandle
from ckptstore.store.remotes import RemoteArgument, check_level
from ckptstore.store.tally import LoadTally
from ckptstore.store.timeline import TimelineKeeper
from ckptstore.types import CheckpointInfo, StepLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.storage import StorageWriter
    from torch.optim import Optimizer

    from ckptstore.dcp.agreement import Agreement
    from ckptstore.store.session import Session

log = logging.getLogger("ckptstore")


class CheckpointStore(RunCheckpoints):
    """Keeps training state safe: on the local disk at once, in buckets soon after.

    Opening is free: no lock, agent, network or process group until the first save or load. Safe to share between
    threads; the order of collective calls is yours. A forked child does nothing by itself. Pickles as its arguments.

    Args:
        local: Root of the local tier, one per node. None: read-only from the remote, without an agent.
        remote: URL, several URLs, or name -> URL: ``s3://bucket/prefix?endpoint=http://..&region=..``, ``oss://..``,
            ``file:///abs``, ``mem://name``. Credentials are never part of a URL.
        run: Names what outlives jobs. Never a torchrun or scheduler id: those are fresh at each start.
        config: Settings; rank 0's are used by all ranks.
        process_group: Ranks that save and load together; None: all of them, or this process alone.

    Raises:
        ConfigError: a run name, URL or combination that can't be right.
    """

    def __init__(
        self,
        local: str | os.PathLike[str] | None,
        remote: RemoteArgument = None,
        *,
        run: str | None = None,
        config: StoreConfig | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(local, remote, run)
        self.config = config if config is not None else StoreConfig()
        if self.config.remote_quorum is not None and self.config.remote_quorum > len(self.remotes):
            raise ConfigError(
                f"remote_quorum={self.config.remote_quorum} but the store has {len(self.remotes)} remotes",
                hint="lower StoreConfig.remote_quorum or add remotes",
            )
        if "torch" in sys.modules:
            import ckptstore.store.loading  # noqa: F401  # whoever trains pays for this now, not in the first save
        self._group = process_group
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._torn: str | None = None  # the save that was loaded, if its local copy has lost files
        self._agreement: Agreement | None = None
        self._tally = LoadTally(self.run)
        self._fence = Fence()
        self._fence.is_wanted = self.config.overlap
        self._timeline = TimelineKeeper(self._tiers.catalog_for_saving, self._tiers.newest_claim)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(CheckpointStore, run=self.run, config=self.config), (
            str(self.local) if self.local else None,
            self.remotes or None,
        )

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except (CkptError, KeyboardInterrupt) as failure:
            if error is None:
                raise
            log.error("closing the store failed: %s", failure)

    # -- saving ---------------------------------------------------------------------------------------------------

    @eager
    def prepare(self, state: Mapping[str, Any]) -> None:
        """Do most of what a first save costs beyond its copy ahead, so that it takes little longer than others.

        Collective, optional, and best called when the first optimizer step has made the optimizer's state. Starts the
        agent, looks at the state, and has memory for it made ready in the background; nothing is written.

        Args:
            state: as it will be saved.

        Raises:
            StateError: something can't be stored, as :meth:`save` would say.
            SaveFailedError: a peer was lost.
            ConfigError: the store is read-only or closed.
        """
        from ckptstore.dcp.pause import no_collections

        with self._lock, no_collections():
            root = self._saving_root()
            try:
                self._open_session(root).prepare(state)
            except StorageError as error:
                log.warning("preparing to save failed, the first save tries again: %s", error)

    @eager
    def save(
        self,
        state: Mapping[str, Any],
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        emergency: bool = False,
        wait: str | None = None,
    ) -> SaveHandle:
        """Save the state as it is now; returns once this rank's part is sealed in the agent's memory.

        Collective: every rank calls it in the same order. The training state is read, never changed: no optimizer
        step, no hook.

        Args:
            state: Nested mapping of modules, optimizers, schedulers, anything with state_dict, tensors, plain Python
                values, NumPy.
            step: Optimizer steps done.
            epoch: Kept with the checkpoint.
            metrics: Name -> one number; rank 0's are kept.
            tags: Free words, kept with the checkpoint.
            emergency: Marks a save made because the job is ending.
            wait: None, or block until "staged", "local" or "remote".

        Raises:
            StateError: something can't be stored; names the key, on all ranks, before anything is written.
            SaveFailedError: a peer was lost, or an earlier save failed and ``on_failure="raise"``.
            ConfigError: the store is read-only or closed, or ``wait`` names a level it doesn't have.
        """
        with self._lock:
            root = self._saving_root()
            if wait is not None:
                check_level(wait, self.remotes)
            from ckptstore.dcp.pause import no_collections

            with no_collections():
                session = self._open_session(root)
                torn, self._torn = self._torn, None
                if torn is not None and self.is_node_leader:
                    session.link.mend(torn)
                handle = session.save(state, step, epoch=epoch, metrics=metrics, tags=tags, emergency=emergency)
        if wait is not None:
            handle.wait(wait)
        return handle

    def wait(self, level: str | None = None, timeout_s: float | None = None) -> None:
        """Block until every save of this store has ``level``; None: the highest configured one. Local.

        Raises:
            SaveFailedError: one of them failed (each failure is raised once).
            SaveTimeoutError: not there in ``timeout_s`` seconds.
        """
        level = level or ("remote" if self.remotes else "local")
        check_level(level, self.remotes)
        if self._session is not None:
            self._session.link.wait(level, timeout_s)

    def close(self, timeout_s: float = 600) -> None:
        """Wait for the highest level and detach; idempotent. Local: the ranks need not call it together.

        Raises:
            SaveFailedError: a save failed.
            SaveTimeoutError: uploads are not finished; the agent goes on, ``ckptctl push`` completes them.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        session = self._session
        try:
            if session is not None:
                self.wait(timeout_s=timeout_s)
        except SaveTimeoutError as error:
            raise SaveTimeoutError(
                f"uploads were not finished: {error.message}",
                hint="the agent goes on" + (f"; to finish later run `{self.push_command}`" if self.remotes else ""),
                run=self.run,
            ) from None
        finally:
            if session is not None:
                session.close()
            self._tiers.close()
            if (agreement := session.agreement if session is not None else self._agreement) is not None:
                agreement.close()
            self._session = None

    def guard(self, optimizer: Optimizer) -> None:
        """With ``StoreConfig(overlap=True)``: let each step of this optimizer wait until the last save's copy is done.

        Local, and once per optimizer, before the first save. What guarded optimizers step and keep must only be changed
        by their steps between a save and the next step. Everything else (buffers, plain tensors, frozen parameters, an
        EMA copy, what an optimizer that isn't guarded steps) is copied before ``save`` returns.

        Raises:
            ConfigError: ``overlap`` is off.
        """
        if not self.config.overlap:
            raise ConfigError("guard needs overlapping copies", hint="open the store with StoreConfig(overlap=True)")
        from ckptstore.dcp.optimizers import unwrapped

        self._fence.guard(unwrapped(optimizer))

    # -- loading --------------------------------------------------------------------------------------------------

    @eager
    def load(
        self,
        state: Mapping[str, Any],
        step: StepLike = "latest",
        *,
        only: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
        missing_ok: bool = False,
    ) -> CheckpointInfo | None:
        """Fill ``state`` in place. Collective. Every byte is verified before this returns.

        Modules, optimizers, schedulers and tensors keep their storages; any other leaf is replaced in its nearest
        mutable container. Top-level keys that ``state`` doesn't name are not read. Each byte comes from the nearest
        copy that verifies; damaged local bytes are replaced from a remote.

        Args:
            state: What to fill, shaped as it was saved.
            step: An int, "latest", "latest~2", "best" or a save_id.
            only: Patterns of names to load (``model.*``); empty: all.
            rename: Stored prefix -> target prefix.
            strict: Missing, unexpected and differently typed names are errors.
            missing_ok: Return None when the run is empty.

        Raises:
            CheckpointNotFoundError: the run is empty or has no such checkpoint.
            LoadMismatchError: the target doesn't fit; nothing was changed.
            IntegrityError: damaged everywhere; names the parameter.
        """
        with self._lock:
            self._check_open()
            self._fence.wait()
            from ckptstore.store import loading

            agreement = self._open_agreement()
            tiers = self._tiers.sources()
            with self._tiers.settled(agreement, deadline_s=self.config.deadline_s) as agent:
                loading.roll_forward(tiers, agreement)
                loaded = loading.load(
                    tiers,
                    agreement,
                    state,
                    step,
                    only=only,
                    rename=rename,
                    strict=strict,
                    missing_ok=missing_ok,
                    once_per_job=self.config.fetch_once == "per_job",
                )
                if loaded is None:
                    return None
                self._tally.add(loaded.report)
                self._tally.tell(agent)
            summary = loaded.record.summary
            if loaded.is_torn_here:
                self._torn = summary.save_id
            self._timeline.resumed(Parent(save_id=summary.save_id, timeline=summary.timeline, step=summary.step))
            return loaded.info

    # -- for people who own their dcp.save (`reader`, for their dcp.load, is inherited) -------------------------------

    def writer(
        self,
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        wait: str = "local",
    ) -> StorageWriter:
        """A ``StorageWriter`` for ``torch.distributed.checkpoint.save`` and ``async_save(state, storage_writer=...)``.

        Local; the save itself is Collective, and returns when it has the level ``wait``. With ``async_save`` it runs in
        DCP's thread: until it is done no rank may call another collective method of this store.

        Args:
            step, epoch, metrics, tags: as for :meth:`save`.
            wait: "staged", "local" or "remote".
        """
        need_torch("writer")
        from ckptstore.dcp.storage_writer import CheckpointStorageWriter

        check_level(wait, self.remotes)

        def save(state: Mapping[str, Any]) -> None:
            self.save(state, step, epoch=epoch, metrics=metrics, tags=tags, wait=wait)

        return CheckpointStorageWriter(save)

    # -- for what is built on top, such as the manager --------------------------------------------------------------

    @property
    def agreement(self) -> Agreement:
        """How this store's ranks talk; made at the first use, after ``torch.distributed`` is initialised. Local."""
        with self._lock:
            self._check_open()
            return self._open_agreement()

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank answers for its node's local tier; known once something was saved."""
        session = self._session
        return session is not None and session.rank == session.link.topology.local_ranks[0]

    def settle(self) -> None:
        """Let what earlier trainers staged reach the disk, and complete what is durable in parts. Collective."""
        with self._lock:
            self._check_open()
            self._fence.wait()
            from ckptstore.store.loading import roll_forward

            agreement = self._open_agreement()
            with self._tiers.settled(agreement, deadline_s=self.config.deadline_s):
                roll_forward(self._tiers.sources(), agreement)

    def start_over(self) -> None:
        """The next save starts a timeline that continues from nothing; older saves stay until it has its own N."""
        self._timeline.fresh()

    def forget(self, save_id: str, reason: str) -> None:
        """Wait no more for the upload of a save that was removed from the local tier. Local."""
        session = self._session
        handle = session.link.handles.pop(save_id, None) if session is not None else None
        if handle is not None:
            handle.abandon(reason)

    # -- inner ----------------------------------------------------------------------------------------------------

    def _saving_root(self) -> Path:
        self._check_open()
        if self.local is None:
            raise ConfigError(
                "this store is read-only: it was opened without a local root",
                hint="CheckpointStore('/data/ckpt', remote=...)",
            )
        return self.local

    def _open_agreement(self) -> Agreement:
        if self._session is not None:
            return self._session.agreement
        if self._agreement is None:
            from ckptstore.dcp.agreement import Agreement

            self._agreement = Agreement(self._group, deadline_s=self.config.deadline_s)
        return self._agreement

    def _open_session(self, root: Path) -> Session:
        if self._session is None:
            from ckptstore.agent.runtime import prestart

            prestart(root, self.config)  # it gets up while we import and bind
            from ckptstore.store.session import Session

            self._session = Session(
                root,
                run=self.run,
                remotes=self.remotes,
                config=self.config,
                agreement=self._open_agreement(),
                timeline=self._timeline,
                fence=self._fence,
                committed=self._tiers.committed,
            )
            self._session.link.tell_loads(self._tally)
        return self._session
