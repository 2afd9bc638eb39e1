"""The saving side of one job: its ranks, their agents, and one small agreement per save."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptstore.agent.protocol import SealRequest
from ckptstore.clock import SYSTEM_CLOCK, new_nonce, rfc3339
from ckptstore.config import StoreConfig
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.device_copy import streams_of
from ckptstore.dcp.prepare import Prepared, Preparer
from ckptstore.errors import (
    CkptError,
    ConfigError,
    NoSpaceError,
    SaveFailedError,
    StorageError,
    TransientError,
)
from ckptstore.format.manifest import Parent, Summary
from ckptstore.store.facts import check_arguments, read_metrics, versions
from ckptstore.store.fence import Fence
from ckptstore.store.handle import SaveHandle
from ckptstore.store.lease import Lease, as_ckpt_error
from ckptstore.store.link import AgentLink
from ckptstore.store.timeline import TimelineKeeper
from ckptstore.types import CheckpointInfo

log = logging.getLogger("ckptstore")

#: What ranks that only prepare agree on.
NOT_A_STEP = -1
#: What may be over by the next save, so that it stops no training. A root that can't be used is told at once.
_PASSING = (NoSpaceError, TransientError)
#: However many cores a host has, a save takes no more of them.
MAX_COPY_THREADS = 4


@dataclass
class _Call:
    """One ``save`` call on this rank."""

    step: int
    save_id: str
    epoch: int | None
    summary: Summary | None = None
    spans: dict[str, Any] = field(default_factory=dict)


class Session:
    """Everything ``save`` needs beyond its arguments. Creating one is Collective; so is :meth:`save`."""

    def __init__(
        self,
        root: Path,
        *,
        run: str,
        remotes: Mapping[str, str],
        config: StoreConfig,
        agreement: Agreement,
        timeline: TimelineKeeper,
        fence: Fence,
        committed: Callable[[], Mapping[str, set[str]]],
    ) -> None:
        self.root, self.run, self.remotes = root, run, dict(remotes)
        self.agreement = agreement
        self.rank, self.world_size = self.agreement.rank, self.agreement.world_size
        mine = {"job": new_nonce(), "begun": SYSTEM_CLOCK.now().timestamp(), "config": config.model_dump()}
        terms: dict[str, Any] = self.agreement.broadcast(
            {**mine, "run": run, "remotes": sorted(remotes)}, what="starting to save"
        )
        self.config = StoreConfig(**terms["config"])
        self.job: str = terms["job"]
        self._timeline = timeline
        self.fence = fence
        self._preparer = Preparer(agreement, check_replicas=self.config.check_replicas)
        self._counter = 0
        self.link = AgentLink(
            root,
            run=run,
            rank=self.rank,
            remotes=self.remotes,
            config=self.config,
            committed=committed,
            begun=terms["begun"],
        )
        self._lease = Lease(self.link, agreement, self.config)
        error: CkptError | None = None
        if terms["run"] != run:
            error = ConfigError(f"rank 0 saves run {terms['run']!r}, this rank {run!r}")
        elif terms["remotes"] != sorted(remotes):
            error = ConfigError(
                f"rank 0 has the remotes {terms['remotes']}, this rank {sorted(remotes)}",
                hint="give every rank the same remote=, $CKPTSTORE_REMOTE or ckptstore.toml",
            )
        self._trouble: StorageError | None = None
        try:
            self._attach(error)
        except _PASSING as failure:
            self._trouble = failure  # the first save's
        except BaseException:
            self.link.close()  # the next call makes another session
            raise

    def _attach(self, error: CkptError | None = None) -> None:
        """Collective, until it has succeeded. Attach to the agents, and learn which ranks share one."""
        if self.link.has_met:
            return
        try:
            if error is None:
                self.link.reconnect()
        except Exception as failure:
            error = as_ckpt_error(failure)
        self.agreement.together(error, what="attaching to the node agents")
        self.link.meet(self.agreement, job=self.job)

    def _attached(self) -> StorageError | None:
        """Collective. What keeps the ranks from saving now, if anything does; told once."""
        trouble, self._trouble = self._trouble, None
        if trouble is None:
            try:
                self._attach()
            except _PASSING as failure:
                trouble = failure
        return trouble

    # -- one save -------------------------------------------------------------------------------------------------

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Collective. All of a save but the copy: plan and arena, whose pages then come in the background.

        Raises:
            CkptError: as :meth:`save`; the next save begins anew.
        """
        call = _Call(NOT_A_STEP, f"{self.job}-0", None)
        if (trouble := self._attached()) is not None:
            raise trouble
        error: CkptError | None = None
        try:
            self.link.reconnect()
        except Exception as failure:
            error = as_ckpt_error(failure)
        try:
            self._agree(call, state, error)
        finally:
            self._lease.release()
        self.link.bring_pages()

    def save(
        self,
        state: Mapping[str, Any],
        step: int,
        *,
        epoch: int | None,
        metrics: Mapping[str, Any] | None,
        tags: Sequence[str],
        emergency: bool,
    ) -> SaveHandle:
        """Collective. Copy this rank's part into its arena and seal it."""
        self._counter += 1
        call = _Call(step, f"{self.job}-{self._counter}", epoch)
        if (trouble := self._attached()) is not None:
            return self._failed(call, trouble)
        error: CkptError | None = None
        try:
            with _timed(call.spans, "reserve"):
                self.fence.wait()
                self._raise_earlier_failure()
                self.link.reconnect()
                call.summary = self._summary(call, metrics, tags, emergency)
                self._lease.ask(call.save_id)
        except Exception as failure:
            error = as_ckpt_error(failure)
            self._lease.plan = None  # it may be what can't be laid out; another may
        try:
            prepared = self._agree(call, state, error)
            return self._skipped(call) if prepared is None else self._copy_and_seal(call, prepared)
        except StorageError as failure:
            # Disk, memory or agent trouble, on some rank and told to all: training goes on, the handle says it.
            return self._failed(call, failure)
        finally:
            self._lease.release()

    def _agree(self, call: _Call, state: Mapping[str, Any], error: CkptError | None) -> Prepared | None:
        """Collective. Plan the state and have memory for it; None if some rank got none in time."""
        with _timed(call.spans, "plan"):
            prepared = self._preparer.prepare(
                state,
                step=call.step if error is None else NOT_A_STEP,
                counter=self._counter,
                flags={"busy": self._lease.is_busy},
                error=error,
            )
        with _timed(call.spans, "reserve"):
            try:
                is_ready = self._lease.settle(prepared.plan, call.save_id, is_busy="busy" in prepared.flags)
            except BaseException:
                self._preparer.forget()
                raise
        return prepared if is_ready else None

    def _raise_earlier_failure(self) -> None:
        """With ``on_failure="raise"``: an earlier save's failure, once."""
        if self.config.on_failure != "raise":
            return
        for save_id, handle in list(self.link.handles.items()):
            if (failure := handle.failure()) is not None:
                del self.link.handles[save_id]
                raise failure

    def _copy_and_seal(self, call: _Call, prepared: Prepared) -> SaveHandle:
        """Local. From here on this rank waits for nobody."""
        generation, image, pages, stage, layout_id = self._lease.take()
        handle = SaveHandle(self._info(call), self.remotes, self.config.remote_quorum)
        self.link.remember(handle)
        binding = prepared.binding
        is_first = self.rank == 0
        request = SealRequest(
            save_id=call.save_id,
            step=call.step,
            rank=self.rank,
            world_size=self.world_size,
            node=self.link.topology.node,
            num_nodes=self.link.topology.num_nodes,
            local_ranks=self.link.topology.local_ranks,
            layout_id=layout_id,
            summary=call.summary,
            tree=binding.tree if is_first else None,
            aliases=binding.aliases if is_first else {},
            per_rank=binding.per_rank,
        )
        if self.link.relay is not None:
            self.link.relay.watch(call.save_id)
        spans = call.spans
        if binding.slow_path is not None:
            spans["slow_path"] = binding.slow_path

        def copy(only: Collection[int] | None, *, is_last: bool) -> bool:
            """Whether all is well so far."""
            try:
                with _timed(spans, "copy"):
                    stage.copy(binding, image, threads, only, streams, pages)
                if is_last:
                    self.link.client.seal(generation, replace(request, spans=spans))
            except BaseException as error:
                # Peers learn it from their agent, or through the relay; this rank trains on, unless it is told to stop.
                failure = error if isinstance(error, CkptError) else SaveFailedError(f"copying failed: {error!r}")
                handle.fail(failure)
                self.link.discard(call.save_id, str(failure))
                self.link.release(generation)
                if not isinstance(error, Exception):
                    raise
                return False
            return True

        streams = streams_of(binding)
        threads = _copy_threads(len(self.link.topology.local_ranks), beside_training=self.fence.is_on)
        held = self.fence.held(binding.locals)
        if not held:
            copy(None, is_last=True)
        elif copy(frozenset(range(len(binding.locals))) - held, is_last=False):
            # What may change at any time is copied by now; what only optimizer.step changes is copied meanwhile, and
            # the fence holds the next step until that is done.
            self.fence.run(lambda: copy(held, is_last=True))
        return handle

    def _info(self, call: _Call, *, skipped: bool = False) -> CheckpointInfo:
        """What this rank knows of the save before any word from the agent."""
        summary = call.summary
        return CheckpointInfo(
            run=self.run,
            step=call.step,
            save_id=call.save_id,
            created_at=SYSTEM_CLOCK.now(),
            epoch=call.epoch,
            metrics={name: float(value) for name, value in summary.metrics.items()} if summary else {},
            tags=summary.tags if summary else (),
            emergency=bool(summary and summary.emergency),
            timeline=summary.timeline if summary else 0,
            world_size=self.world_size,
            job=self.job,
            skipped=skipped,
        )

    def _skipped(self, call: _Call) -> SaveHandle:
        """Both generations are busy on some rank: skip on all, or fail on all. Only ``fail`` raises for it."""
        if self.config.back_pressure != "skip":
            error = SaveFailedError(
                f"step {call.step} was not saved: the previous saves are still being written",
                hint="save less often, use a faster disk, or set StoreConfig(back_pressure='skip')",
                step=call.step,
            )
            if self.config.back_pressure == "wait":
                return self._failed(call, error)
            self.link.missed(call.save_id, call.step, error)
            raise error
        log.warning("step %s was skipped: the previous saves are still being written", call.step)
        self.link.missed(call.save_id, call.step, None)
        handle = SaveHandle(self._info(call, skipped=True), self.remotes, self.config.remote_quorum)
        handle.reach("staged")
        handle.reach("local")
        for name in self.remotes:
            handle.reach("remote", name)
        return handle

    def _failed(self, call: _Call, error: CkptError) -> SaveHandle:
        handle = SaveHandle(self._info(call), self.remotes, self.config.remote_quorum)
        self.link.remember(handle)
        handle.fail(error)
        self.link.missed(call.save_id, call.step, error)
        return handle

    def _summary(
        self,
        call: _Call,
        metrics: Mapping[str, Any] | None,
        tags: Sequence[str],
        emergency: bool,
    ) -> Summary | None:
        """Rank 0's word on the save; the other ranks only have their arguments checked."""
        checked = read_metrics(metrics)
        check_arguments(call.step, call.epoch, tags)
        if self.rank != 0:
            return None
        number, parent = self._timeline.at(call.step, self.link.client, job=self.job)
        self._timeline.note(Parent(save_id=call.save_id, timeline=number, step=call.step))
        return Summary(
            run=self.run,
            save_id=call.save_id,
            timeline=number,
            parent=parent,
            step=call.step,
            epoch=call.epoch,
            created_at=rfc3339(SYSTEM_CLOCK.now()),
            job=self.job,
            world_size=self.world_size,
            num_nodes=self.link.topology.num_nodes,
            metrics=checked,
            tags=tuple(tags),
            emergency=emergency,
            versions=versions(),
        )

    def close(self) -> None:
        """Detach; the agent goes on with what it holds."""
        self.fence.close()
        self.link.close()


@contextmanager
def _timed(spans: dict[str, Any], name: str) -> Iterator[None]:
    """Note the seconds of the body under ``name``."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spans[name] = spans.get(name, 0.0) + time.perf_counter() - began


def _copy_threads(local_ranks: int, *, beside_training: bool) -> int:
    """How many threads copy: torch's, or where training waits for them this rank's share of the cores, if that is more.

    Torchrun gives each rank one thread, however many cores there are.
    """
    import torch

    count = torch.get_num_threads()
    if not beside_training:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(count, cores // local_ranks)
    return max(1, min(MAX_COPY_THREADS, count))
