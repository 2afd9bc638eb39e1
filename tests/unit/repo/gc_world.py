"""A bucket in memory, clients that can be stopped at any request, and what must always hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.clock import ManualClock, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError
from ckptstore.repo import gc
from ckptstore.repo.gc_mark import Marks
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import pack_owner, placed
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import new_save_id, write_checkpoint
from ckptstore.testing.watched import Request, WatchedBlobStore

CONFIG = StoreConfig(upload_concurrency=1)
RULES = gc.Rules(grace_seconds=24 * 3600.0, intent_seconds=7 * 24 * 3600.0)
RUN = "run"


class Crash(BaseException):
    """The process is dead: not an Exception, so that nothing in it can tidy up."""


@dataclass
class Interruption:
    """At the ``at``-th request of a client, or the first one like that, before or after it reached the server."""

    at: int | Callable[[Request], bool]
    what: Callable[[], None]
    is_after: bool = False


class Client(WatchedBlobStore):
    """One process's way to the bucket. Dead after a crash."""

    def __init__(self, inner: MemoryBlobStore, plan: Sequence[Interruption]) -> None:
        super().__init__(inner, before=self._before, after=self._after)
        self._plan = list(plan)
        self._count = 0
        self._turn = threading.RLock()
        self.is_dead = False

    def _before(self, request: Request) -> None:
        with self._turn:
            if self.is_dead:
                raise Crash
            self._count += 1
            self._happen(request, False)

    def _after(self, request: Request) -> None:
        with self._turn:
            self._happen(request, True)

    def _happen(self, request: Request, is_after: bool) -> None:
        for one in self._plan:
            is_here = one.at == self._count if isinstance(one.at, int) else one.at(request)
            if is_here and one.is_after == is_after:
                break
        else:
            return
        self._plan.remove(one)
        try:
            one.what()
        except Crash:
            self.is_dead = True
            raise


def crash() -> None:
    raise Crash


class Paused:
    """An operation in another process that has come to its ``at``-th request and waits there until it is resumed."""

    def __init__(
        self, operation: Callable[[Sequence[Interruption]], object], at: int | Callable[[Request], bool], is_after: bool
    ) -> None:
        self._reached = threading.Event()
        self._go_on = threading.Event()
        plan = [Interruption(at, self._wait, is_after)]
        self._thread = threading.Thread(target=self._run, args=(operation, plan))
        self._thread.start()
        assert self._reached.wait(60), "the other process neither ends nor comes to that request"

    def _run(self, operation: Callable[[Sequence[Interruption]], object], plan: Sequence[Interruption]) -> None:
        try:
            operation(plan)
        finally:
            self._reached.set()

    def _wait(self) -> None:
        self._reached.set()
        self._go_on.wait(60)

    def resume(self) -> None:
        self._go_on.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@dataclass
class World:
    """A run in a bucket, its local checkpoints, and what was promised."""

    folder: Path
    clock: ManualClock = field(default_factory=ManualClock)
    paths: list[Path] = field(default_factory=list)
    promised: set[str] = field(default_factory=set)
    paused: list[Paused] = field(default_factory=list)
    agents: list[RemoteTier] = field(default_factory=list)
    """Long-lived processes that push, and remember what they have seen of the bucket."""

    def __post_init__(self) -> None:
        self.server = MemoryBlobStore(new_nonce(), clock=self.clock)
        self.tier = LocalTier(self.folder / "local", self.clock)

    def tier_of(self, client: WatchedBlobStore | MemoryBlobStore) -> RemoteTier:
        return RemoteTier(client, RUN, "r", self.clock)

    def save(self, seeds: Sequence[int]) -> None:
        """A local checkpoint whose tensors are drawn from a small pool, so that saves share chunks."""
        state = {f"t{n}": np.random.default_rng(seed).normal(size=64) for n, seed in enumerate(seeds)}
        step = len(self.paths) + 1
        self.paths.append(write_checkpoint(self.tier, state, run=RUN, step=step, save_id=new_save_id(step)))

    def push(self, number: int, plan: Sequence[Interruption] = ()) -> None:
        path = self.paths[number % len(self.paths)]
        agent = self.agents.pop() if self.agents else self.tier_of(self.server)
        agent.blob = Client(self.server, plan)
        try:
            result = push(self.tier, path, RUN, agent, config=CONFIG)
        except Crash:
            return
        except CkptError:
            self.agents.append(agent)
            return
        self.agents.append(agent)
        if result.committed is not None:
            save_id = result.committed.summary.save_id
            if any(save.save_id == save_id for save in self.tier_of(self.server).saves()):
                self.promised.add(save_id)  # else it was deleted while this push looked it over

    def collect(self, plan: Sequence[Interruption] = (), part: tuple[int, int] = (0, 1)) -> list[gc.Collected]:
        try:
            return gc.collect(Client(self.server, plan), "r", [RUN], rules=RULES, part=part, clock=self.clock)
        except (Crash, CkptError):
            return []

    def delete(self, number: int, plan: Sequence[Interruption] = ()) -> None:
        saves = self.tier_of(self.server).saves()
        if not saves:
            return
        save = saves[number % len(saves)]
        self.promised.discard(save.save_id)
        try:
            self.tier_of(Client(self.server, plan)).delete(save)
        except (Crash, CkptError):
            return
        finally:
            self.promised.discard(save.save_id)  # whoever pushed it meanwhile wanted the opposite

    def pause(
        self,
        operation: Callable[[Sequence[Interruption]], object],
        at: int | Callable[[Request], bool],
        is_after: bool = False,
    ) -> None:
        """Begin an operation that stops at one of its requests."""
        if len(self.paused) < 2:
            self.paused.append(Paused(operation, at, is_after))

    def resume(self) -> None:
        """Let the oldest of those that wait go on, to its end."""
        if self.paused:
            self.paused.pop(0).resume()

    def wait(self, hours: float) -> None:
        self.clock.sleep(timedelta(hours=hours).total_seconds())

    def check(self) -> None:
        """Nothing promised is lost, and whatever is visible is whole."""
        remote = self.tier_of(self.server)
        saves = {save.save_id: save for save in remote.saves()}
        assert self.promised <= set(saves), "a committed save is gone"
        for save in saves.values():
            self._check_whole(remote, save)

    def _check_whole(self, remote: RemoteTier, save: RemoteSave) -> None:
        for ref in remote.root_manifest(save).shards:
            document = remote.remote_shard(save.save_id, ref)
            for frame in (placed(document, one) for one in document.frames):
                for part in (frame, frame.base) if frame.base is not None else (frame,):
                    info = remote.head_pack(part.pack)
                    assert info is not None, f"{part.pack}, which save {save.save_id} needs, was deleted"
                    assert info.size_bytes >= part.offset + part.length

    def needed(self) -> set[str]:
        remote = self.tier_of(self.server)
        found: set[str] = set()
        for save in remote.saves():
            for ref in remote.root_manifest(save).shards:
                found.update(remote.remote_shard(save.save_id, ref).packs)
        return found

    def packs(self) -> set[str]:
        return {key for key in self.tier_of(self.server).list_keys("packs") if pack_owner(key)}

    def collect_all(self) -> None:
        """Collect until everything dead is gone."""
        while self.paused:
            self.resume()
        for _ in range(6):
            self.wait(8 * 24)
            self.collect()


# --- guards taken out


def blind_to_intents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that doesn't know that a save is under way."""
    monkeypatch.setattr(Marks, "is_live", lambda self, save_id: save_id in self.commits)
    monkeypatch.setattr(Marks, "is_needed", _without_owners)


def _without_owners(marks: Marks, key: str) -> bool:
    return key in marks.needed if pack_owner(key) is not None else _IS_NEEDED(marks, key)


def blind_to_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A committer that doesn't look what is condemned."""
    monkeypatch.setattr(RemoteTier, "condemned", lambda self: frozenset())


def deaf_to_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """A committer that believes for ever that the lists are what they were."""
    condemned = RemoteTier.condemned

    def remembered(self: RemoteTier) -> frozenset[str]:
        return condemned(self) if self._lists is None else frozenset[str]().union(*self._lists[1].values())

    monkeypatch.setattr(RemoteTier, "condemned", remembered)


def without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that deletes what it condemns at once."""
    condemn = gc._Collector._condemn

    def now(self: Any, announced: Any, finished: Any, lists: Any, marks: Marks) -> set[str]:
        garbage = marks.garbage()
        self._delete(sorted(garbage), garbage)
        return condemn(self, announced, finished, lists, marks)

    monkeypatch.setattr(gc._Collector, "_condemn", now)


def without_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that carries its list out whatever has come to need what is on it."""
    condemned: set[str] = set()
    lists = gc._Collector._lists

    def remembering(self: Any) -> Any:
        found = lists(self)
        condemned.update(key for _, one in found[0].values() for key in one.keys)
        return found

    monkeypatch.setattr(gc._Collector, "_lists", remembering)
    monkeypatch.setattr(Marks, "is_needed", lambda self, key: key not in condemned and _IS_NEEDED(self, key))


_IS_NEEDED = Marks.is_needed
