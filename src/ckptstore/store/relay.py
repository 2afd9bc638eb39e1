"""Carries the agents' word between nodes, through the job's own key-value store.

With one node the agent is the coordinator and none of this runs. With several, one rank per node (the leader) relays:

    sealed/<node>      all ranks of the node have sealed their part
    prepared/<node>    the node's part is fsynced; the value is its shard references (and the summary, from rank 0's)
    end                what becomes of the save, decided once: the root manifest, which node 0's leader makes when every
                       node is prepared, or the first failure anywhere, upon which every leader drops the save
    local/<node>       the node has written its COMPLETE record (the root manifest beside its part)

The leader has a client of its own to that store, so that a blocked rank never holds up the word of another. If the
trainers die, nothing is lost: each agent uploads its part by itself, and parts that are all durable are rolled forward
at the next start. Once there is a root manifest nobody drops the save any more; an agent that was lost meanwhile is
replaced, and a node that can't be reached is waited for no longer than the deadline.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ckptstore.errors import CkptError
from ckptstore.format.manifest import ShardManifest, ShardRef, Summary, ref_of, root_from

log = logging.getLogger("ckptstore")

POLL_SECONDS = 0.02
#: How soon an agent that could not do its part is asked again.
RETRY_SECONDS = 0.5
#: Longest time from the first seal of a save to its last prepared part, in deadlines.
PREPARE_DEADLINES = 20.0
_ROOT, _FAILED = "root", "failed"


class JobStore(Protocol):
    """What the relay uses of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class RelayClient(Protocol):
    """What the relay uses of an agent client."""

    def announce(self, save_id: str, level: str, failure: str | None = None) -> None: ...
    def complete(self, save_id: str, root: bytes) -> None: ...
    def discard(self, save_id: str, reason: str) -> bool: ...


@dataclass
class _Progress:
    """How far one save has come, as this leader knows it.

    Attributes:
        began: when this stage of it began: it was made, or its end was decided.
        retry: when the agent is asked again.
        done: what was told to the agent.
    """

    began: float
    retry: float = 0.0
    done: set[str] = field(default_factory=set)


class NodeRelay:
    """The leader's side of a several-node job; owns one thread.

    Args:
        store: the job's; a client of our own.
        client: gives the node's agent, a new one if it was lost; raises CkptError where there is none.
        ended: hears how a save ended for this rank, with the reason if it failed, in case no agent can tell it.
        job, node, num_nodes, deadline_s: of the store.
    """

    def __init__(
        self,
        store: JobStore,
        client: Callable[[], RelayClient],
        ended: Callable[[str, str | None], None],
        *,
        job: str,
        node: int,
        num_nodes: int,
        deadline_s: float,
    ) -> None:
        self._store, self._client, self._ended = store, client, ended
        self._job, self._node, self._num_nodes = job, node, num_nodes
        self._deadline_s = deadline_s
        self._saves: dict[str, _Progress] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ckptstore-relay", daemon=True)
        self._thread.start()

    def watch(self, save_id: str) -> None:
        """Relay for this save until it is local everywhere or has failed."""
        with self._wake:
            self._saves[save_id] = _Progress(time.monotonic())
            self._wake.notify()

    def sealed(self, save_id: str) -> None:
        """This node's ranks have all sealed."""
        self._set(save_id, f"sealed/{self._node}", "1")

    def prepared(self, save_id: str, shards: list[ShardManifest]) -> None:
        """This node's part is durable."""
        summary = next((s.summary for s in shards if s.rank == 0), None)
        word = {
            "refs": [ref_of(s).model_dump(mode="json") for s in shards],
            "summary": summary.model_dump(mode="json") if summary else None,
        }
        self._set(save_id, f"prepared/{self._node}", json.dumps(word))

    def local(self, save_id: str) -> None:
        """This node has its COMPLETE record."""
        self._set(save_id, f"local/{self._node}", "1")

    def failed(self, save_id: str, reason: str) -> None:
        """This node can't keep its part; of no consequence once all nodes are prepared."""
        try:
            self._decide(save_id, _FAILED, reason)
        except Exception as error:
            log.warning("the job's store does not answer (%s); save %s is left to the agents", error, save_id)

    def close(self) -> None:
        """Stop relaying; saves that are not local everywhere are left to the next start."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(self._deadline_s)

    @property
    def busy(self) -> bool:
        """Whether a save is still on its way to ``local``."""
        return bool(self._saves)

    def _key(self, save_id: str, name: str) -> str:
        return f"ckptstore/{self._job}/{save_id}/{name}"

    def _set(self, save_id: str, name: str, value: str) -> None:
        try:
            self._store.set(self._key(save_id, name), value)
        except Exception as error:
            log.warning("the job's store does not answer (%s); save %s is left to the agents", error, save_id)

    def _all(self, save_id: str, kind: str) -> bool:
        return self._store.check([self._key(save_id, f"{kind}/{node}") for node in range(self._num_nodes)])

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._saves and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                saves = dict(self._saves)
            for save_id, progress in saves.items():
                if self._advance_if_possible(save_id, progress):
                    with self._wake:
                        self._saves.pop(save_id, None)
            time.sleep(POLL_SECONDS)

    def _advance_if_possible(self, save_id: str, progress: _Progress) -> bool:
        if time.monotonic() < progress.retry:
            return False
        try:
            return self._advance(save_id, progress)
        except CkptError as error:  # of this node's agent; it or the next one may do better
            log.debug("relay of save %s: %s", save_id, error)
            progress.retry = time.monotonic() + RETRY_SECONDS
            if (time.monotonic() - progress.began) <= self._deadline_s or "decided" not in progress.done:
                return False
            self._end(save_id, f"this node's agent could not finish it: {error.message}")
        except Exception as error:  # the job's store is gone: the job is ending
            log.debug("relay of save %s stopped: %s", save_id, error)
            # With our own mark every part is known to be durable.
            is_safe = "complete" in progress.done
            self._end(
                save_id, None if is_safe else "the job's store is gone; a save that is whole is found at the start"
            )
        return True

    def _advance(self, save_id: str, progress: _Progress) -> bool:
        """Do what has become possible for this save; True when there is nothing left to do."""
        done = progress.done
        decision = self._decided(save_id)
        if decision is None and "staged" not in done and self._all(save_id, "sealed"):
            done.add("staged")
            self._client().announce(save_id, "staged")
        if decision is None and self._node == 0 and self._all(save_id, "prepared"):
            decision = self._decide(save_id, _ROOT, self._root(save_id).decode())
        if decision is None:
            self._check_deadline(save_id, progress)
            return False
        if "decided" not in done:
            done.add("decided")
            progress.began = time.monotonic()
        outcome, text = decision
        if outcome == _FAILED:
            self._ended(save_id, text)
            self._client().discard(save_id, text)
            return True
        if "complete" not in done:
            self._client().complete(save_id, text.encode())
            done.add("complete")
        is_overdue = time.monotonic() - progress.began > self._deadline_s
        if self._all(save_id, "local"):
            self._end(save_id, None)
            return True
        if is_overdue and (late := self._late(save_id, "local")):
            self._end(save_id, f"{late} did not mark it complete; the next start does")
            return True
        return False

    def _decided(self, save_id: str) -> tuple[str, str] | None:
        key = self._key(save_id, "end")
        if not self._store.check([key]):
            return None
        outcome, text = json.loads(self._store.get(key))
        return outcome, text

    def _decide(self, save_id: str, outcome: str, text: str) -> tuple[str, str]:
        """What becomes of the save: this, unless it was decided before."""
        said = self._store.compare_set(self._key(save_id, "end"), "", json.dumps([outcome, text]))
        outcome, text = json.loads(said)
        return outcome, text

    def _end(self, save_id: str, failure: str | None) -> None:
        """Tell the ranks of this node that the save is local everywhere, or why nobody knows."""
        try:
            self._client().announce(save_id, "local", failure)
        except CkptError as error:
            log.debug("announcing save %s failed: %s", save_id, error)
        self._ended(save_id, failure)

    def _check_deadline(self, save_id: str, progress: _Progress) -> None:
        kind, limit = "sealed", self._deadline_s
        if "staged" in progress.done:
            kind, limit = "prepared", self._deadline_s * PREPARE_DEADLINES
        if time.monotonic() - progress.began > limit and (late := self._late(save_id, kind)):
            self.failed(save_id, f"{late} has not {kind} its part within {limit:.0f} s")

    def _late(self, save_id: str, kind: str) -> str:
        """The nodes whose word is missing, in words; empty if none is."""
        late = [n for n in range(self._num_nodes) if not self._store.check([self._key(save_id, f"{kind}/{n}")])]
        return f"node {', '.join(map(str, late))}" if late else ""

    def _root(self, save_id: str) -> bytes:
        words = [json.loads(self._store.get(self._key(save_id, f"prepared/{n}"))) for n in range(self._num_nodes)]
        summary = next(Summary.model_validate(w["summary"]) for w in words if w["summary"])
        refs = [ShardRef.model_validate(ref) for w in words for ref in w["refs"]]
        return root_from(summary, refs).encode()
