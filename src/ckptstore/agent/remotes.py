"""One run's remotes, as its agent serves them: an uploader each, and the way back for files that the disk has lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptstore.agent.protocol import Event
from ckptstore.agent.uploader import Uploader
from ckptstore.clock import Clock, parse_rfc3339
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, SaveFailedError
from ckptstore.format.manifest import RootManifest
from ckptstore.repo import names, timings
from ckptstore.repo.local import LocalSave, LocalTier

if TYPE_CHECKING:
    from ckptstore.blob.retry import Retry
    from ckptstore.repo.remote import RemoteTier

log = logging.getLogger("ckptstore.agent")

#: What the notes beside a checkpoint tell of its upload.
SENT_NOTES = ("sent_bytes", "stored_bytes", "reused_bytes", "by_codec", "rests_on", "encode_seconds")


class RunRemotes:
    """Thread-safe.

    Args:
        condition: the agent's.
        tier: of the agent's root.
        run: the run.
        emit: tells every rank.
        completed: hears of saves that an uploader found whole.
        retried: hears of each request that is tried again.
    """

    def __init__(
        self,
        condition: threading.Condition,
        tier: LocalTier,
        run: str,
        emit: Callable[[Event], None],
        completed: Callable[[RootManifest], None],
        retried: Callable[[Retry], None],
        clock: Clock,
    ) -> None:
        self.uploaders: dict[str, Uploader] = {}
        self._condition = condition
        self._tier, self._run, self._clock = tier, run, clock
        self._emit, self._completed, self._retried = emit, completed, retried
        self._mending: set[str] = set()

    def refresh(self, remotes: Mapping[str, str], environ: Mapping[str, str], config: StoreConfig) -> None:
        """From now on these, with these credentials: remotes that are not named, or are elsewhere now, are left."""
        with self._condition:
            for name in [n for n, u in self.uploaders.items() if remotes.get(n) != u.url]:
                uploader = self.uploaders.pop(name)
                uploader.stop()
                self._leave(name, uploader.waiting())
            for name, url in remotes.items():
                if name in self.uploaders:
                    self.uploaders[name].refresh(environ, config)
                    continue
                uploader = self.uploaders[name] = Uploader(
                    self._tier, self._run, name, url, dict(environ), config, self._emit, self._completed, self._clock
                )
                uploader.on_retry = self._retried

    def _leave(self, name: str, saves: Sequence[LocalSave]) -> None:
        """Tell those who wait for these saves to come to a remote that nobody sends them there any more."""
        if not saves:
            return
        log.warning("%d saves of %s are not sent to %s: the newest job has it no more", len(saves), self._run, name)
        reason = f"a newer job of this run doesn't send to remote {name}"
        hint = "give all jobs of a run the same remotes; `ckptctl push` sends what was left"
        for save in saves:
            error = SaveFailedError(reason, hint=hint)
            self._emit(Event.failure(error, save_id=save.save_id, step=save.step, level="remote", remote=name))

    def mend(self, save_id: str) -> None:
        """Bring files that this node's copy of a save has lost back from the remotes, in a thread; once at a time."""
        names.check_save_id(save_id)
        with self._condition:
            if save_id in self._mending:
                return
            self._mending.add(save_id)
        threading.Thread(target=self._mend, args=(save_id,), name=f"mend-{save_id}", daemon=True).start()

    def _mend(self, save_id: str) -> None:
        from ckptstore.repo.fetch import pull

        remotes: list[RemoteTier] = []
        try:
            remotes += [uploader.apart() for uploader in list(self.uploaders.values())]
            if remotes:
                path = pull(remotes, save_id, self._tier, parts_of_node=True)
                log.info("the local copy of save %s is whole again: %s", save_id, path)
        except CkptError as error:
            log.warning("the local copy of save %s stays as it is: %s", save_id, error)
        finally:
            for remote in remotes:
                remote.blob.close()
            with self._condition:
                self._mending.discard(save_id)

    def note(self, event: Event) -> None:
        """Write down beside the checkpoint what its upload took."""
        data = event.data
        lag = (self._clock.now() - parse_rfc3339(data["summary"]["created_at"])).total_seconds()
        spans = {"lag": lag, **{name: data[name] for name in SENT_NOTES if name in data}}
        timings.note(self._tier, self._run, event.save_id, {f"remote {data['remote']}": spans})

    def notify(self) -> None:
        """There may be something to upload."""
        for uploader in list(self.uploaders.values()):
            uploader.notify()

    def hurry(self, deadline: float | None) -> None:
        """Uploads end by then, on the monotonic clock."""
        for uploader in list(self.uploaders.values()):
            uploader.hurry(deadline)

    def is_busy(self) -> bool:
        """Whether anything can be uploaded now, or is being mended. Hold the condition."""
        return bool(self._mending) or any(uploader.has_work() for uploader in self.uploaders.values())

    def is_settled(self) -> bool:
        """Whether every remote has everything. Hold the condition."""
        return all(uploader.is_settled() for uploader in self.uploaders.values())

    def describe(self) -> dict[str, Any]:
        """For ``status``, by name. Hold the condition."""
        return {name: uploader.describe() for name, uploader in self.uploaders.items()}
