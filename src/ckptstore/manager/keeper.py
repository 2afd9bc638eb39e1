"""Carries retention out: looks at a tier after each save that reached it, and removes what no rule speaks for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from ckptstore.clock import SYSTEM_CLOCK, rfc3339
from ckptstore.errors import CkptError, LockedError, NotFoundError
from ckptstore.manager.voice import Voice
from ckptstore.policy.retention import Decision, Retention
from ckptstore.repo import journal
from ckptstore.repo.catalog import LOCAL, Catalog
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.types import CheckpointInfo

log = logging.getLogger("ckptstore")


class Keeper:
    """Retention of one job. Runs in the thread that brings the word of a save; safe for several threads.

    Args:
        root: the local tier.
        remotes: name -> URL.
        forget: told of each save removed locally that was still to be uploaded.
    """

    def __init__(
        self,
        root: Path,
        remotes: Mapping[str, str],
        run: str,
        *,
        local: Retention,
        remote: Retention,
        voice: Voice,
        forget: Callable[[str, str], None],
    ) -> None:
        self._tier, self._remotes, self._run = LocalTier(root), dict(remotes), run
        self._local, self._remote = local, remote
        self._voice, self._forget = voice, forget
        self._lock = threading.Lock()
        #: remote's name -> saves known to be there
        self._there: dict[str, set[str]] = {name: set() for name in remotes}
        self._has_told = False
        self.verified: set[str] = set()
        self.save_bytes = 0
        self.kept = 0

    def learn(self, catalog: Catalog) -> None:
        """Take note of where saves are, so that nothing is removed here that has still to go there."""
        with self._lock:
            for name, known in self._there.items():
                known.update(r.save_id for r in catalog.records if r.tiers.get(name) == "complete")
            here = [r for r in catalog.records if r.tiers.get(LOCAL) == "complete"]
            self.kept = len(here)
            if here:
                self.save_bytes = here[-1].summary.size_bytes

    def after_local(self, info: CheckpointInfo) -> None:
        """A save is complete on this node: older ones may go. Never raises."""
        with self._lock:
            self.save_bytes = max(info.size_bytes, 0) or self.save_bytes
            self._prune_local()

    def after_remote(self, name: str, info: CheckpointInfo, *, is_first_rank: bool, is_leader: bool) -> None:
        """A save is complete on a remote: older ones may go there, and here what waited for it. Never raises."""
        with self._lock:
            self._there[name].add(info.save_id)
            if is_first_rank:
                self._prune_remote(name)
            if is_leader:
                self._prune_local()

    def make_room(self) -> None:
        """Remove now what no rule speaks for, should anything have been left. Never raises."""
        with self._lock:
            self._prune_local()

    # -- inner ----------------------------------------------------------------------------------------------------

    def _prune_local(self) -> None:
        try:
            infos = [record.info() for record in Catalog.read(self._tier, (), self._run).records]
            decision = self._local.decide(infos, LOCAL, verified=self.verified, busy=self._awaited(infos))
        except CkptError as error:
            self._voice.warn(f"retention could not look at the local tier: {error}")
            return
        self._note(decision)
        self._tell()
        self.kept = len(decision.keep)
        for info in decision.drop:
            try:
                self._tier.delete(self._run, info.save_id)
                log.debug("removed step %d (save %s) from the local tier", info.step, info.save_id)
            except NotFoundError:
                pass  # another node's rank on a shared file system was faster
            except LockedError:
                log.debug("step %d is being read; it goes after a later save", info.step)
                continue
            except CkptError as error:
                self._voice.warn(f"step {info.step} could not be removed from the local tier: {error}")
                continue
            if any(info.save_id not in known for known in self._there.values()):
                self._forget(info.save_id, "newer checkpoints came before its turn")

    def _awaited(self, infos: list[CheckpointInfo]) -> set[str]:
        """Saves that a remote does not have yet and would keep."""
        awaited: set[str] = set()
        for name, known in self._there.items():
            awaited |= self._remote.awaited(infos, name, known)
        return awaited

    def _prune_remote(self, name: str) -> None:
        from ckptstore.blob import open_blob_store

        blob = open_blob_store(self._remotes[name])
        try:
            remote = RemoteTier(blob, self._run, name)
            catalog = Catalog.read(None, (remote,), self._run)
            self._there[name] |= {record.save_id for record in catalog.records}
            decision = self._remote.decide([record.info() for record in catalog.records], name, verified=self.verified)
            places = {record.save_id: record.remote[name] for record in catalog.records if name in record.remote}
            for info in decision.drop:
                remote.delete(places[info.save_id])
                self._there[name].add(info.save_id)  # it was there: nobody has to upload it again
        except CkptError as error:
            self._voice.warn(f"retention on {name} failed, and is tried again after the next save: {error}")
        finally:
            blob.close()

    def _tell(self) -> None:
        """Put the rules into the journal, where whoever looks at the run finds the reasons."""
        if not self._has_told:
            self._has_told = True
            rules = {"local": asdict(self._local), "remote": asdict(self._remote), "remotes": sorted(self._remotes)}
            journal.append(self._tier, self._run, "rules", [{"time": rfc3339(SYSTEM_CLOCK.now()), **rules}])

    def _note(self, decision: Decision) -> None:
        if decision.note is not None:
            self._voice.warn(decision.note)
