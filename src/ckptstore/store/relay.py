"""Carries the agents' word between nodes, through the job's own key-value store.

With one node the agent is the coordinator and none of this runs. With several, one rank per node (the leader) relays:

    sealed/<node>      all ranks of the node have sealed their part
    prepared/<node>    the node's part is fsynced; the value is its shard references (and the summary, from rank 0's)
    root               the root manifest, made by node 0's leader once every node is prepared
    local/<node>       the node has written its COMPLETE record (the root manifest beside its part)
    failed             the first failure anywhere; every leader drops the save

The leader has a client of its own to that store, so that a blocked rank never holds up the word of another. If the
trainers die, nothing is lost: each agent uploads its part by itself, and parts that are all durable are rolled forward
at the next start.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ckptstore.errors import CkptError, TransientError
from ckptstore.format.manifest import ShardManifest, ShardRef, Summary, ref_of, root_from

log = logging.getLogger("ckptstore")

POLL_SECONDS = 0.02
#: Longest time from the first seal of a save to its last prepared part, in deadlines.
PREPARE_DEADLINES = 20.0


class JobStore(Protocol):
    """What the relay uses of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class RelayClient(Protocol):
    """What the relay uses of an agent client."""

    def announce(self, save_id: str, level: str) -> None: ...
    def complete(self, save_id: str, root: bytes) -> None: ...
    def discard(self, save_id: str, reason: str) -> bool: ...


@dataclass
class _Progress:
    """How far one save has come, as this leader knows it."""

    began: float
    done: set[str] = field(default_factory=set)


class NodeRelay:
    """The leader's side of a several-node job; owns one thread."""

    def __init__(
        self,
        store: JobStore,
        client: Callable[[], RelayClient],
        *,
        job: str,
        node: int,
        num_nodes: int,
        deadline_s: float,
    ) -> None:
        self._store, self._client = store, client
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
        """This node can't keep its part."""
        self._set(save_id, "failed", reason)

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
                try:
                    ended = self._advance(save_id, progress)
                except TransientError as error:  # the agent is gone, and this node's part with it unless it was durable
                    log.debug("relay of save %s stopped: %s", save_id, error)
                    ended = True
                except CkptError as error:
                    log.warning("save %s: %s", save_id, error)
                    self.failed(save_id, error.message)
                    ended = False
                except Exception as error:  # the job's store is gone: the job is ending
                    log.debug("relay of save %s stopped: %s", save_id, error)
                    ended = True
                if ended:
                    with self._wake:
                        self._saves.pop(save_id, None)
            time.sleep(POLL_SECONDS)

    def _advance(self, save_id: str, progress: _Progress) -> bool:
        """Do what has become possible for this save; True when there is nothing left to do."""
        client, done = self._client(), progress.done
        if self._store.check([self._key(save_id, "failed")]):
            client.discard(save_id, self._store.get(self._key(save_id, "failed")).decode())
            return True
        if "staged" not in done and self._all(save_id, "sealed"):
            client.announce(save_id, "staged")
            done.add("staged")
        if self._node == 0 and "root" not in done and self._all(save_id, "prepared"):
            self._store.set(self._key(save_id, "root"), self._root(save_id).decode())
            done.add("root")
        if "complete" not in done and self._store.check([self._key(save_id, "root")]):
            client.complete(save_id, self._store.get(self._key(save_id, "root")))
            done.add("complete")
        if "complete" in done and self._all(save_id, "local"):
            client.announce(save_id, "local")
            return True
        self._check_deadline(save_id, progress)
        return False

    def _check_deadline(self, save_id: str, progress: _Progress) -> None:
        waited = time.monotonic() - progress.began
        if "staged" not in progress.done:
            kind, limit = "sealed", self._deadline_s
        elif "complete" not in progress.done:
            kind, limit = "prepared", self._deadline_s * PREPARE_DEADLINES
        else:
            return
        if waited > limit:
            late = [n for n in range(self._num_nodes) if not self._store.check([self._key(save_id, f"{kind}/{n}")])]
            if late:
                self.failed(save_id, f"node {', '.join(map(str, late))} has not {kind} its part within {limit:.0f} s")

    def _root(self, save_id: str) -> bytes:
        words = [json.loads(self._store.get(self._key(save_id, f"prepared/{n}"))) for n in range(self._num_nodes)]
        summary = next(Summary.model_validate(w["summary"]) for w in words if w["summary"])
        refs = [ShardRef.model_validate(ref) for w in words for ref in w["refs"]]
        return root_from(summary, refs).encode()
