"""A rank's line to its node agent, and the handles that follow what the agent says."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptstore.agent.client import AgentClient
from ckptstore.agent.protocol import Event
from ckptstore.blob import between_processes
from ckptstore.config import StoreConfig
from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import CkptError, SaveFailedError, SaveTimeoutError, TransientError
from ckptstore.format.manifest import ShardManifest
from ckptstore.store.handle import SaveHandle
from ckptstore.store.relay import NodeRelay
from ckptstore.store.shared_root import refuse_shared_root
from ckptstore.store.tally import LoadTally
from ckptstore.types import CheckpointInfo

log = logging.getLogger("ckptstore")

#: What an agent needs from a trainer's environment to reach the buckets; nothing else is passed on.
CREDENTIAL_PREFIXES = (
    "AWS_", "OSS_", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
KEPT_HANDLES = 256
#: How often a waiting store looks whether its agent is still there.
FOLLOW_SECONDS = 1.0
#: How often it says what it waits for.
TELL_SECONDS = 30.0


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


class AgentLink:
    """This rank's connection to its agent; a lost agent is replaced by the next :meth:`reconnect`.

    Args:
        root, run, remotes, config: of the store.
        committed: remote name -> save_ids it holds, looked up after an agent was lost.
        begun: when the job began, in seconds since 1970.

    Attributes:
        handles: save_id -> handle of the saves that are followed, oldest first.
        topology: which ranks share an agent; one node until :meth:`meet`.
        has_met: whether that has succeeded.
    """

    def __init__(
        self,
        root: Path,
        *,
        run: str,
        rank: int,
        remotes: Mapping[str, str],
        config: StoreConfig,
        committed: Callable[[], Mapping[str, set[str]]],
        begun: float = 0.0,
    ) -> None:
        self.handles: dict[str, SaveHandle] = {}
        self.topology = Topology(0, 1, (rank,))  # until the agents are known; events may come before
        self.has_met = False
        self.relay: NodeRelay | None = None
        self._root, self._run, self._rank = root, run, rank
        self._remotes, self._config, self._committed = remotes, config, committed
        self._begun = begun
        self._client: AgentClient | None = None
        self._line: object | None = None  # stands for one connection; a handle waits for the word of one
        self._unsure: set[str] = set()
        self._lock, self._connecting = threading.Lock(), threading.Lock()

    @property
    def client(self) -> AgentClient:
        """The connected agent, or TransientError."""
        if self._client is None:
            raise TransientError("the node agent is not running", hint="the next save starts one")
        return self._client

    def reconnect(self) -> None:
        """Local. Attach if there is no connection. What an earlier agent has lent went with it."""
        with self._connecting:
            if self._client is not None and not self._client.is_lost:
                return
            line = object()
            client = AgentClient.connect(
                self._root,
                run=self._run,
                slot=int(os.environ.get("LOCAL_RANK", self._rank)),
                remotes={name: between_processes(url) for name, url in self._remotes.items()},
                environ={k: v for k, v in os.environ.items() if k.startswith(CREDENTIAL_PREFIXES)},
                config=self._config,
                on_event=lambda event: self._on_event(event, line),
                rank=self._rank,
                begun=self._begun,
            )
            self._client, self._line = client, line

    def _reconnected(self) -> AgentClient:
        self.reconnect()
        return self.client

    def meet(self, agreement: Agreement, *, job: str) -> None:
        """Collective. Learn which ranks share an agent; each node's first rank speaks for it.

        Raises:
            TransientError: an agent was lost meanwhile; on all ranks.
        """
        client = self._client
        agent_ids = agreement.gather(client.agent_id if client is not None else "", what="counting the nodes")
        if "" in agent_ids:
            rank = agent_ids.index("")
            raise TransientError(f"the node agent of rank {rank} ended right after its start", rank=rank)
        self.topology = Topology.of(agent_ids, self._rank)
        if self.topology.num_nodes == 1:
            self.has_met = True
            return
        is_leader = self._rank == self.topology.local_ranks[0]
        refuse_shared_root(self._root, self.topology.node, is_leader=is_leader, agreement=agreement)
        self.has_met = True
        if is_leader:
            self.relay = NodeRelay(
                agreement.job_store(),
                self._reconnected,
                self._ended,
                job=job,
                node=self.topology.node,
                num_nodes=self.topology.num_nodes,
                deadline_s=self._config.deadline_s,
            )

    def remember(self, handle: SaveHandle) -> None:
        """Follow this save from now on; of finished ones only the newest are kept."""
        handle.because, handle.line = self._because, self._line
        with self._lock:
            self.handles[handle.save_id] = handle
            for save_id in list(self.handles)[:-KEPT_HANDLES]:
                old = self.handles[save_id]
                if old.done("local") and (not self._remotes or old.done("remote")):
                    del self.handles[save_id]

    def release(self, generation: int) -> None:
        """Give an arena generation back unused, as far as that is possible."""
        if self._client is not None:
            try:
                self._client.release(generation)
            except CkptError as error:
                log.debug("releasing an arena generation failed: %s", error)

    def bring_pages(self) -> None:
        """Have the arena's memory made ready in the background."""
        if self._client is not None:
            self._client.bring_pages()

    def missed(self, save_id: str, step: int, error: CkptError | None) -> None:
        """Have the agent count a save that was not taken; the first rank speaks for all."""
        if self._client is not None and self._rank == 0:
            try:
                self._client.missed(save_id, step, error)
            except CkptError as failure:
                log.debug("telling of the missed save %s failed: %s", save_id, failure)

    def mend(self, save_id: str) -> None:
        """Have the local copy of a save made whole from the remotes meanwhile, as far as that is possible."""
        if self._client is not None:
            try:
                self._client.mend(save_id)
            except CkptError as error:
                log.debug("mending save %s failed: %s", save_id, error)

    def tell_loads(self, tally: LoadTally) -> None:
        """Have the agent count what was loaded before it was there."""
        tally.tell(self._client)

    def discard(self, save_id: str, reason: str) -> None:
        """Tell everybody that this rank's part of a save will not come."""
        said = f"rank {self._rank}: {reason}"
        if self._client is not None:
            try:
                self._client.discard(save_id, said)
            except CkptError as error:
                log.debug("discarding save %s failed: %s", save_id, error)
        if self.relay is not None:
            self.relay.failed(save_id, said)

    def close(self) -> None:
        """Detach; the agent goes on with what it holds."""
        if self.relay is not None:
            self.relay.close()
        if self._client is not None:
            self._client.close()
            self._client = None

    def wait(self, level: str, timeout_s: float | None) -> None:
        """Local. Wait until every followed save has ``level``; a long wait is logged, with what the agent says of it.

        Raises:
            SaveFailedError: one of them failed, each once.
            SaveTimeoutError: not there in ``timeout_s`` seconds; says why, if the agent knows.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        failures: dict[str, SaveFailedError] = {}
        for handle in list(self.handles.values()):
            try:
                self._follow(handle, level, deadline)
            except SaveFailedError as error:
                failures[handle.save_id] = error
            except SaveTimeoutError:
                raise handle.late(level, timeout_s or 0.0) from None
        for save_id in failures:
            self.handles.pop(save_id, None)
        if failures:
            raise next(iter(failures.values()))

    def _follow(self, handle: SaveHandle, level: str, deadline: float) -> CheckpointInfo:
        """Local. Wait for a level; if the agent is lost meanwhile, attach to a new one, which finishes its uploads."""
        told = time.monotonic()
        while True:
            left = deadline - time.monotonic()
            try:
                return handle.wait(level, min(max(left, 0.0), FOLLOW_SECONDS))
            except SaveTimeoutError:
                if left <= 0:
                    raise
            if time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                why = self._because(level)
                log.log(logging.WARNING if why else logging.INFO, "waiting for step %s: %s%s", handle.step, level, why)
            try:
                self.reconnect()  # a new agent goes on with uploads
            except TransientError as error:
                log.debug("no agent for step %s so far: %s", handle.step, error)
                continue
            except CkptError as error:
                reason = f"the node agent ended, and there can be no other: {error.message}"
                handle.fail(SaveFailedError(reason, hint=error.hint), "remote" if handle.done("local") else "staged")
                continue
            if handle.save_id in self._unsure:
                self._find_out(handle)

    def _find_out(self, handle: SaveHandle) -> None:
        """What became of a save whose agent was lost, as the tiers tell: its last words were perhaps not heard."""
        there = self._committed()
        for name, save_ids in there.items():
            if handle.save_id in save_ids:
                handle.reach("remote", name)
        state = self._local_states().get(handle.save_id, "absent")
        if state == "complete":
            handle.reach("local")
        elif state == "absent" and set(there) >= set(self._remotes):
            reason = "the node agent ended, and its part is not on the disk any more"
            handle.fail(SaveFailedError(reason), "remote" if handle.done("local") else "local")
        if state == "complete" or handle.done("local"):
            self._unsure.discard(handle.save_id)

    def _local_states(self) -> dict[str, str]:
        """save_id -> state of the local tier's saves; empty where it can't be read."""
        from ckptstore.repo.local import LocalTier

        try:
            return {save.save_id: save.state for save in LocalTier(self._root).saves(self._run)}
        except CkptError as error:
            log.debug("the local tier can't be read: %s", error)
            return {}

    def _ended(self, save_id: str, failure: str | None) -> None:
        """The relay's word on a save, should no agent bring it."""
        handle = self.handles.get(save_id)
        if handle is not None and failure is None:
            handle.reach("local")
        elif handle is not None and not handle.done("local"):
            handle.fail(SaveFailedError(str(failure)), "staged" if not handle.done("staged") else "local")

    def _because(self, level: str, waited_s: float = math.inf) -> str:
        """What keeps uploads from getting on, as the agent tells it; empty if it knows of nothing."""
        # Who waits in short slices, as the manager does for signals, is not kept longer by an agent that hangs.
        if level != "remote" or waited_s <= FOLLOW_SECONDS:
            return ""
        try:
            remotes = self.client.status()["runs"].get(self._run, {}).get("remotes", {})
        except CkptError:
            return ""
        troubles = [f"; {name}: {said['error']['message']}" for name, said in remotes.items() if said["error"]]
        return "".join(troubles)

    def _on_event(self, event: Event, line: object = None) -> None:
        """Runs on the client's reader thread."""
        if event.kind == "lost":
            if self._line is line:
                self._client = None
            self._agent_lost(line)
            return
        if self.relay is not None:
            self._tell_relay(self.relay, event)
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

    def _agent_lost(self, line: object) -> None:
        """What isn't on disk went with the agent's memory: say so to whoever waited for its word."""
        waiting = [handle for handle in list(self.handles.values()) if handle.line is line]
        self._unsure.update(handle.save_id for handle in waiting if self._remotes and not handle.done("remote"))
        waiting = [handle for handle in waiting if not handle.done("local")]
        states = self._local_states() if waiting else {}
        for handle in waiting:
            state = states.get(handle.save_id)
            if state == "complete":
                handle.reach("local")
            elif state == "prepared":  # the other nodes may be so too: then the relay has a new agent complete it
                self._unsure.add(handle.save_id)
            else:
                reason = f"the node agent ended before step {handle.step} was on disk"
                hint = "the next save starts a new agent; earlier checkpoints are untouched"
                handle.fail(SaveFailedError(reason, hint=hint, step=handle.step, save_id=handle.save_id))
                if self.relay is not None:
                    self.relay.failed(handle.save_id, f"rank {self._rank}: {reason}")
