"""The saving side of one job: its ranks, their agents, and one small agreement per save."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptstore.agent.arena import Arena
from ckptstore.agent.client import AgentClient
from ckptstore.agent.protocol import Event, SealRequest
from ckptstore.blob import between_processes
from ckptstore.clock import SYSTEM_CLOCK, new_nonce, rfc3339
from ckptstore.config import StoreConfig
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.planner import Plan
from ckptstore.dcp.prepare import Prepared, Preparer
from ckptstore.dcp.stage import Stage
from ckptstore.dcp.walk import Kind
from ckptstore.errors import (
    CkptError,
    ConfigError,
    SaveFailedError,
    SaveTimeoutError,
    StateError,
    StorageError,
    TransientError,
)
from ckptstore.format.manifest import Parent, ShardManifest, Summary
from ckptstore.store.fence import Fence
from ckptstore.store.handle import SaveHandle
from ckptstore.store.relay import NodeRelay
from ckptstore.store.timeline import TimelineKeeper
from ckptstore.types import CheckpointInfo, json_number

log = logging.getLogger("ckptstore")

#: What an agent needs from a trainer's environment to reach the buckets; nothing else is passed on.
CREDENTIAL_PREFIXES = ("AWS_", "OSS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
KEPT_HANDLES = 256
_CHANGING: frozenset[Kind] = frozenset({"buffer", "plain", "per_rank"})
_FENCED: frozenset[Kind] = frozenset({"param", "optim"})
#: How often a waiting store looks whether its agent is still there.
FOLLOW_SECONDS = 1.0


@dataclass
class _Call:
    """One ``save`` call on this rank."""

    step: int
    save_id: str
    epoch: int | None
    summary: Summary | None = None
    generation: int | None = None
    spans: dict[str, Any] = field(default_factory=dict)


@dataclass
class Topology:
    """Which ranks share an agent."""

    node: int
    num_nodes: int
    local_ranks: tuple[int, ...]

    @classmethod
    def of(cls, agent_ids: Sequence[str], rank: int) -> Topology:
        """Nodes are numbered by their lowest rank."""
        nodes = list(dict.fromkeys(agent_ids))
        mine = agent_ids[rank]
        local = tuple(r for r, agent_id in enumerate(agent_ids) if agent_id == mine)
        return cls(nodes.index(mine), len(nodes), local)


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
        self.agreement, self._committed = agreement, committed
        self.rank, self.world_size = self.agreement.rank, self.agreement.world_size
        terms: dict[str, Any] = self.agreement.broadcast(
            {"job": new_nonce(), "config": config.model_dump(), "run": run}, what="starting to save"
        )
        self.config = StoreConfig(**terms["config"])
        self.job: str = terms["job"]
        self.handles: dict[str, SaveHandle] = {}
        self._timeline = timeline
        self.fence = fence
        self._preparer = Preparer(agreement, check_replicas=self.config.check_replicas)
        self._plan: Plan | None = None
        self._stage: Stage | None = None
        self._arena: Arena | None = None
        self._counter = 0
        self._lock = threading.Lock()
        self._client: AgentClient | None = None
        self._relay: NodeRelay | None = None
        self.topology = Topology(0, 1, (self.rank,))  # until the agents are known; events may come before
        error: CkptError | None = (
            None if terms["run"] == run else ConfigError(f"rank 0 saves run {terms['run']!r}, this rank {run!r}")
        )
        try:
            if error is None:
                self._connect()
        except CkptError as failure:
            error = failure
        self.agreement.together(error, what="attaching to the node agents")
        agent_ids = self.agreement.gather(self.client.agent_id, what="counting the nodes")
        self.topology = Topology.of(agent_ids, self.rank)
        if self.topology.num_nodes > 1 and self.rank == self.topology.local_ranks[0]:
            self._relay = NodeRelay(
                self.agreement.job_store(),
                lambda: self.client,
                job=self.job,
                node=self.topology.node,
                num_nodes=self.topology.num_nodes,
                deadline_s=self.config.deadline_s,
            )

    # -- the agent ------------------------------------------------------------------------------------------------

    @property
    def client(self) -> AgentClient:
        """The connected agent, or TransientError."""
        if self._client is None:
            raise TransientError("the node agent is not running", hint="the next save starts one")
        return self._client

    def _connect(self) -> None:
        self._client = AgentClient.connect(
            self.root,
            run=self.run,
            slot=int(os.environ.get("LOCAL_RANK", self.rank)),
            remotes={name: between_processes(url) for name, url in self.remotes.items()},
            environ={k: v for k, v in os.environ.items() if k.startswith(CREDENTIAL_PREFIXES)},
            config=self.config,
            on_event=self._on_event,
            rank=self.rank,
        )

    def reconnect(self) -> None:
        """Local. Attach again if the agent was lost; its arenas went with it, its uploads go on from the disk."""
        if self._client is None:
            self._connect()
            self._forget_arena()

    def follow(self, handle: SaveHandle, level: str, timeout_s: float | None) -> CheckpointInfo:
        """Local. Wait for a level; if the agent is lost meanwhile, attach to a new one, which finishes its uploads.

        Raises:
            SaveFailedError, SaveTimeoutError: as ``SaveHandle.wait``.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                return handle.wait(level, min(max(left, 0.0), FOLLOW_SECONDS))
            except SaveTimeoutError:
                if left <= 0:
                    raise
            if self._client is None:
                self.reconnect()
                # What the lost agent committed just before its end was never told.
                for name, save_ids in self._committed().items():
                    if handle.save_id in save_ids:
                        handle.reach("remote", name)

    def _on_event(self, event: Event) -> None:
        """Runs on the client's reader thread."""
        if event.kind == "lost":
            self._client = None
            self._agent_lost()
            return
        if self._relay is not None:
            self._tell_relay(self._relay, event)
        handle = self.handles.get(event.save_id)
        if handle is None:
            return
        several = self.topology.num_nodes > 1
        data = event.data
        if event.kind == "failed":
            handle.fail(event.exception(), data.get("level", "staged"), data.get("remote"))
        elif event.kind == "remote":
            summary, stored_bytes = data["summary"], data["stored_bytes"]
            handle.reach("remote", data["remote"], size_bytes=summary["size_bytes"], stored_bytes=stored_bytes)
        elif event.kind == "skipped":
            handle.pass_over(data["remote"])
        elif event.kind == "announced":
            handle.reach(data["level"])
        elif event.kind == "sealed" and not several:
            handle.reach("staged")
        elif event.kind == "local" and not several:
            handle.reach("local", size_bytes=data["summary"]["size_bytes"])

    @staticmethod
    def _tell_relay(relay: NodeRelay, event: Event) -> None:
        if event.kind == "sealed":
            relay.sealed(event.save_id)
        elif event.kind == "prepared":
            relay.prepared(event.save_id, [ShardManifest.model_validate(shard) for shard in event.data["shards"]])
        elif event.kind == "local":
            relay.local(event.save_id)
        elif event.kind == "failed" and event.data.get("level") != "remote":
            relay.failed(event.save_id, str(event.data.get("message", "failed")))

    def _agent_lost(self) -> None:
        """Saves that are not committed went with the agent's memory; say so."""
        from ckptstore.repo.local import LocalTier

        waiting = [h for h in self.handles.values() if not h.done("local")]
        if not waiting:
            return
        try:
            complete = {s.save_id for s in LocalTier(self.root).saves(self.run) if s.state == "complete"}
        except CkptError:
            complete = set()
        for handle in waiting:
            if handle.save_id in complete:
                handle.reach("local")
            else:
                handle.fail(
                    SaveFailedError(
                        f"the node agent ended before step {handle.step} was on disk",
                        hint="the next save starts a new agent; earlier checkpoints are untouched",
                        step=handle.step,
                        save_id=handle.save_id,
                    )
                )

    # -- one save -------------------------------------------------------------------------------------------------

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
        error: CkptError | None = None
        try:
            with _timed(call.spans, "reserve"):
                self.fence.wait()
                self._raise_earlier_failure()
                self.reconnect()
                call.summary = self._summary(call, metrics, tags, emergency)
                if self._plan is not None:
                    self._reserve(call, self._plan)
        except CkptError as failure:
            error = failure
        try:
            with _timed(call.spans, "plan"):
                prepared = self._preparer.prepare(
                    state,
                    step=step if isinstance(step, int) else -1,
                    counter=self._counter,
                    flags={"busy": self._plan is not None and call.generation is None},
                    error=error,
                )
                is_busy = self._lay_out(call, prepared.plan) if prepared.is_new_plan else "busy" in prepared.flags
            if is_busy:
                self._release(call)
                return self._skipped(call)
            return self._copy_and_seal(call, prepared)
        except StorageError as failure:
            # Disk, memory or agent trouble, on some rank and told to all: training goes on, the handle says it.
            return self._failed(call, failure)
        finally:
            self._release(call)

    def _raise_earlier_failure(self) -> None:
        """With ``on_failure="raise"``: an earlier save's failure, once."""
        if self.config.on_failure != "raise":
            return
        for save_id, handle in list(self.handles.items()):
            if (failure := handle.failure()) is not None:
                del self.handles[save_id]
                raise failure

    def _reserve(self, call: _Call, plan: Plan) -> None:
        """Local. Take a free arena generation; bounded by the back-pressure policy."""
        timeout = self.config.back_pressure_timeout_s if self.config.back_pressure == "wait" else 0.0
        if self._arena is None:
            self._arena = self.client.layout(plan.pieces, timeout_s=self.config.back_pressure_timeout_s)
            self._stage = Stage(plan, self._arena.starts)
            if self._arena.is_on_disk:
                log.warning("memory is short: saves are staged through the disk and hold training up meanwhile")
        call.generation = self.client.reserve(timeout, save_id=call.save_id)

    def _lay_out(self, call: _Call, plan: Plan) -> bool:
        """Collective. A new structure needs a new arena image on every rank; True if none was free in time."""
        self._release(call)
        self._forget_arena()
        self._plan = plan
        error: CkptError | None = None
        try:
            self._reserve(call, plan)
        except CkptError as failure:
            error = failure
        busy = call.generation is None
        outcome = self.agreement.agree(same={}, flags={"failed": error is not None, "busy": busy})
        if "failed" in outcome.raised:
            self.agreement.raise_together(error, what="laying out the arena")
        return "busy" in outcome.raised

    def _forget_arena(self) -> None:
        if self._stage is not None:
            self._stage.forget()
        self._arena = self._stage = None

    def _copy_and_seal(self, call: _Call, prepared: Prepared) -> SaveHandle:
        """Local. From here on this rank waits for nobody."""
        if self._arena is None or self._stage is None or call.generation is None:
            raise AssertionError("agreed to copy without an arena")
        handle = SaveHandle(self._info(call), self.remotes, self.config.remote_quorum)
        self._remember(handle)
        binding = prepared.binding
        is_first = self.rank == 0
        request = SealRequest(
            save_id=call.save_id,
            step=call.step,
            rank=self.rank,
            world_size=self.world_size,
            node=self.topology.node,
            num_nodes=self.topology.num_nodes,
            local_ranks=self.topology.local_ranks,
            layout_id=self._arena.layout_id,
            summary=call.summary,
            tree=binding.tree if is_first else None,
            aliases=binding.aliases if is_first else {},
            per_rank=binding.per_rank,
        )
        if self._relay is not None:
            self._relay.watch(call.save_id)
        spans = call.spans
        if binding.slow_path is not None:
            spans["slow_path"] = binding.slow_path
        generation, call.generation = call.generation, None
        image = self._arena.generations[generation]

        def finish(kinds: frozenset[Kind] | None) -> None:
            try:
                with _timed(spans, "copy"):
                    stage.copy(binding, image, threads, kinds)
                self.client.seal(generation, replace(request, spans=spans))
            except (CkptError, RuntimeError, MemoryError) as error:
                # Peers learn it from their agent, or through the relay; this rank trains on.
                failure = error if isinstance(error, CkptError) else SaveFailedError(f"copying failed: {error}")
                handle.fail(failure)
                self._discard(call, str(failure))

        stage, threads = self._stage, _copy_threads()
        if self.fence.is_on:
            # What forward and backward change, or the user at any time, is copied now; what only optimizer.step
            # changes is copied meanwhile, and the fence holds the next step until that is done.
            stage.copy(binding, image, threads, _CHANGING)
            self.fence.run(lambda: finish(_FENCED))
        else:
            finish(None)
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
        """Both generations are busy on some rank: skip on all, or fail on all."""
        if self.config.back_pressure != "skip":
            raise SaveFailedError(
                f"step {call.step} was not saved: the previous saves are still being written",
                hint="save less often, use a faster disk, or set StoreConfig(back_pressure='skip')",
                step=call.step,
            )
        log.warning("step %s was skipped: the previous saves are still being written", call.step)
        handle = SaveHandle(self._info(call, skipped=True), self.remotes, self.config.remote_quorum)
        handle.reach("staged")
        handle.reach("local")
        for name in self.remotes:
            handle.reach("remote", name)
        return handle

    def _failed(self, call: _Call, error: CkptError) -> SaveHandle:
        handle = SaveHandle(self._info(call), self.remotes, self.config.remote_quorum)
        self._remember(handle)
        handle.fail(error)
        return handle

    def _release(self, call: _Call) -> None:
        generation, call.generation = call.generation, None
        if generation is not None and self._client is not None:
            try:
                self._client.release(generation)
            except CkptError as error:
                log.debug("releasing an arena generation failed: %s", error)

    def _discard(self, call: _Call, reason: str) -> None:
        if self._client is not None:
            try:
                self._client.discard(call.save_id, f"rank {self.rank}: {reason}")
            except CkptError as error:
                log.debug("discarding save %s failed: %s", call.save_id, error)
        if self._relay is not None:
            self._relay.failed(call.save_id, f"rank {self.rank}: {reason}")

    def _remember(self, handle: SaveHandle) -> None:
        with self._lock:
            self.handles[handle.save_id] = handle
            for save_id in list(self.handles)[:-KEPT_HANDLES]:
                old = self.handles[save_id]
                if old.done("local") and (not self.remotes or old.done("remote")):
                    del self.handles[save_id]

    def _summary(
        self,
        call: _Call,
        metrics: Mapping[str, Any] | None,
        tags: Sequence[str],
        emergency: bool,
    ) -> Summary | None:
        """Rank 0's word on the save; the other ranks only have their arguments checked."""
        checked = read_metrics(metrics)
        if not isinstance(call.step, int) or isinstance(call.step, bool) or call.step < 0:
            raise ConfigError(f"step must be an int >= 0, not {call.step!r}")
        if self.rank != 0:
            return None
        number, parent = self._timeline.at(call.step, self.client, job=self.job)
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
            num_nodes=self.topology.num_nodes,
            metrics=checked,
            tags=tuple(tags),
            emergency=emergency,
            versions=_versions(),
        )

    def close(self) -> None:
        """Detach; the agent goes on with what it holds."""
        self.fence.close()
        if self._relay is not None:
            self._relay.close()
        if self._client is not None:
            self._client.close()
            self._client = None


def read_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | str]:
    """Metric values as floats (or "nan", "inf", "-inf"): read on the host, detached from any graph.

    Raises:
        StateError: a value that is not one number.
    """
    result: dict[str, float | str] = {}
    for name, value in (metrics or {}).items():
        try:
            number = value.detach().item() if hasattr(value, "detach") else float(value)
            result[str(name)] = json_number(float(number))
        except (TypeError, ValueError, RuntimeError):
            raise StateError(
                f"metric {name!r} is not one number but {type(value).__name__}", hint="pass a float", key=str(name)
            ) from None
    return result


@contextmanager
def _timed(spans: dict[str, Any], name: str) -> Iterator[None]:
    """Note the seconds of the body under ``name``."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spans[name] = spans.get(name, 0.0) + time.perf_counter() - began


def _copy_threads() -> int:
    import torch

    return max(1, min(4, torch.get_num_threads()))


def _versions() -> dict[str, str]:
    import torch

    from ckptstore._version import __version__

    return {"ckptstore": __version__, "torch": torch.__version__}
