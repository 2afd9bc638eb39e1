"""From committed local files to one remote, newest first, for as long as it takes.

There is no queue on disk: what is pending is every local save of the run that the remote has no commit of, so an agent
that starts after a crash goes on where the last one stopped. What a policy leaves out follows from the local tier as
well. With a deadline, when the agent was told to leave, the newest save that can still be finished goes first.

A remote that is away is tried again at a bounded rate, for ever while trainers are there; one that refuses us is
reported once per save and tried again slowly, or when a trainer brings new credentials.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ckptstore.agent.line import RemoteLine
from ckptstore.agent.pending import Upload, dropped_there, left_out, may_leave_out, remote_rules
from ckptstore.agent.protocol import Event
from ckptstore.agent.sending import order, send, trim_memory, uploaded
from ckptstore.agent.trouble import REFUSED_PAUSE_SECONDS, Trouble
from ckptstore.clock import Clock, parse_rfc3339
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, ConfigError, CredentialsError, NoStoreError, TransientError
from ckptstore.format.manifest import RootManifest, Summary
from ckptstore.repo import commit
from ckptstore.repo.local import LocalSave, LocalTier

if TYPE_CHECKING:
    from ckptstore.blob.retry import Retry
    from ckptstore.repo.remote import RemoteTier

log = logging.getLogger("ckptstore.agent")

MAX_POLL_SECONDS = 15.0


class Uploader:
    """The queue of one remote and the thread that works on it.

    Args:
        tier: where saves come from.
        run, name, url: which remote of which run.
        environ: credentials; kept in memory, never shown.
        config: of the newest attachment.
        emit: tells the trainers.
        completed: told when a prepared local part became complete because the remote has all the others.
    """

    def __init__(
        self,
        tier: LocalTier,
        run: str,
        name: str,
        url: str,
        environ: dict[str, str],
        config: StoreConfig,
        emit: Callable[[Event], None],
        completed: Callable[[RootManifest], None],
        clock: Clock,
    ) -> None:
        self.run = run
        self.name = name
        self.url = url
        self.last_remote: Summary | None = None
        self._tier = tier
        self._line = RemoteLine(tier, run, name, url, environ, clock)
        self._config = config
        self._emit = emit
        self._completed = completed
        self._clock = clock
        self._condition = threading.Condition()
        self._uploads: dict[str, Upload] = {}
        self._committed: set[str] | None = None
        self._skipped: set[str] = set()
        self._deadline: float | None = None
        self._news = 1
        """Counts the reasons to look at the local tier; ``_seen`` of them have led to ``_uploads``."""
        self._seen = 0
        self._begun = 0
        self._is_reopened = False
        self._is_stopping = False
        self._trouble = Trouble()
        self._thread = threading.Thread(target=self._loop, name=f"upload-{run}-{name}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ called by others

    @property
    def on_retry(self) -> Callable[[Retry], None] | None:
        """Hears of requests that are tried again, for metrics."""
        return self._line.on_retry

    @on_retry.setter
    def on_retry(self, hears: Callable[[Retry], None] | None) -> None:
        self._line.on_retry = hears

    def notify(self) -> None:
        """The local tier has a new save."""
        with self._condition:
            self._news += 1
            if self._trouble.is_refused:
                self._trouble.pause_until = 0.0  # one try for each new save, so that its trainer hears of the refusal
            self._condition.notify_all()

    def refresh(self, environ: Mapping[str, str], config: StoreConfig) -> None:
        """A trainer attached: use its credentials, also in requests under way, and try everything again now."""
        with self._condition:
            self._line.replace_environ(environ)
            self._config = config
            self._news += 1
            self._is_reopened = True
            self._trouble.try_again()
            for upload in self._uploads.values():
                upload.due, upload.is_reported = 0.0, False
            self._condition.notify_all()

    def apart(self) -> RemoteTier:
        """The remote on a connection of its own; close its ``blob``."""
        return self._line.apart()

    def hurry(self, deadline: float | None) -> None:
        """By then (on the monotonic clock) everything ends: do what can be finished; None: there is time."""
        with self._condition:
            self._deadline = deadline

    def stop(self) -> None:
        """Stop after the chunk at hand. What is pending stays pending."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def has_work(self) -> bool:
        """Whether waiting can help: not so after a refusal, while other nodes' parts don't come, or when the remote has
        been away for too long."""
        with self._condition:
            now = self._clock.monotonic()
            if self._trouble.is_refused or self._trouble.has_lasted(now, self._config.upload_give_up_seconds):
                return False
            return self._seen < self._news or any(upload.is_workable(now) for upload in self._uploads.values())

    def waiting(self) -> list[LocalSave]:
        """The saves that are not there yet."""
        with self._condition:
            return [upload.save for upload in self._uploads.values()]

    def pending(self) -> int:
        """How many saves wait."""
        return len(self._uploads)

    def is_settled(self) -> bool:
        """Whether the remote has everything the local tier has."""
        with self._condition:
            return self._seen == self._news and not self._uploads

    def describe(self) -> dict[str, Any]:
        """For ``status``: nothing secret."""
        with self._condition:
            now = self._clock.now()
            queue = sorted(self._uploads.values(), key=attrgetter("age"), reverse=True)
            created = [u.save.summary.created_at for u in queue if u.save.summary is not None]
            ages = [(now - parse_rfc3339(text)).total_seconds() for text in created]
            error = self._trouble.error
            rate = self._line.pace.sent_bytes_per_s
            cap = self._line.cap(self._config)
            plain_left, waiting = sum(u.plain_left for u in queue), sum(u.waiting_bytes for u in queue)
            seconds_left = self._line.pace.seconds_for(plain_left, waiting, cap)
            return {
                "rate_bytes_per_s": None if rate is None else round(rate),
                "cap_bytes_per_s": cap,
                "eta_seconds": 0.0 if not queue else None if seconds_left is None else round(seconds_left, 3),
                "skipped": len(self._skipped),
                "lag_seconds": round(max(ages, default=0.0), 3),
                "is_refused": self._trouble.is_refused,
                "error": None if error is None else {"class": type(error).__name__, "message": error.message},
                "last_remote": brief(self.last_remote),
                "queue": [upload.describe() for upload in queue],
            }

    # ------------------------------------------------------------------ the thread

    def _loop(self) -> None:
        while True:
            with self._condition:
                while not self._is_stopping and (wait := self._seconds_to_wait()) > 0:
                    self._condition.wait(min(wait, 3600.0))
                if self._is_stopping:
                    return
            try:
                self._round()
                self._trouble.is_over()
            except CkptError as error:
                self._pause(error)
            except Exception as error:
                log.exception("uploading %s to %s", self.run, self.name)
                self._pause(CkptError(f"unexpected {type(error).__name__}: {error}"))

    def _seconds_to_wait(self) -> float:
        now = self._clock.monotonic()
        if self._trouble.pause_until > now:
            return self._trouble.pause_until - now
        if self._seen < self._news:
            return 0.0
        return min((upload.due - now for upload in self._uploads.values()), default=3600.0)

    def _pause(self, error: CkptError) -> None:
        """The remote as a whole can't be used now."""
        is_refused = not isinstance(error, TransientError)
        with self._condition:
            # What came while we were failing has the last word: credentials that may be right, or a save whose trainer
            # wants to hear of the refusal.
            has_news = self._is_reopened or (is_refused and self._news > self._begun)
            pause = self._trouble.note(error, self._clock.monotonic(), has_news=has_news)
            waiting = list(self._uploads.values())
        if self._trouble.failures == 1 or is_refused:
            log.warning("remote %s of %s: %s; again in %.0f s", self.name, self.run, error, pause)
        if is_refused:
            for upload in waiting:
                self._report(upload, error)

    def _report(self, upload: Upload, error: CkptError) -> None:
        upload.error = error
        if not upload.is_reported:
            upload.is_reported = True
            save = upload.save
            told = {"level": "remote", "remote": self.name}
            self._emit(Event.failure(error, save_id=save.save_id, step=save.step, **told))

    def _round(self) -> None:
        """Look once at what is pending, and work on the newest save that is due."""
        with self._condition:
            self._begun = self._news
            is_reopened, self._is_reopened = self._is_reopened, False
        if is_reopened:
            self._line.hang_up()
            self._committed = None
            self._skipped.clear()
        if self._seen < self._begun:
            self._derive_local()
        if self._uploads and self._committed is None:
            self._ask_remote(self._line.remote(self._config))
        self._leave_out()
        now = self._clock.monotonic()
        due = [upload for upload in self._uploads.values() if upload.due <= now]
        if due:
            self._work_on(
                self._line.remote(self._config), max([u for u in due if self._fits(u)] or due, key=attrgetter("age"))
            )

    def _fits(self, upload: Upload) -> bool:
        """Whether this save can be finished before the deadline, if there is one and the pace is known."""
        if self._deadline is None:
            return True
        cap = self._line.cap(self._config)
        seconds = self._line.pace.seconds_for(upload.plain_left, upload.waiting_bytes, cap)
        return seconds is None or self._clock.monotonic() + seconds <= self._deadline

    def _is_cut_short(self, upload: Upload) -> bool:
        """Whether to leave this save for now: we are stopping, or it won't be finished in time and another one will."""
        if self._is_stopping:
            return True
        if self._deadline is None or self._fits(upload):
            return False
        with self._condition:
            others = [u for u in self._uploads.values() if u is not upload and u.state == "queued"]
        return any(self._fits(other) for other in others)

    def _leave_out(self) -> None:
        """Drop from the queue what the configuration says need not be sent."""
        if not self._uploads or not may_leave_out(self._config):
            return
        complete = [s.summary for s in self._tier.saves(self.run) if s.state == "complete" and s.summary is not None]
        pinned = self._tier.pins(self.run)
        for upload, reason in list(left_out(self._uploads.values(), complete, pinned, self._config)):
            self._skip(upload, reason)

    def _skip(self, upload: Upload, reason: str) -> None:
        save = upload.save
        if upload.attempts:
            with suppress(CkptError):
                self._line.remote(self._config).forget_intent(save.save_id)
        with self._condition:
            del self._uploads[save.save_id]
            self._skipped.add(save.save_id)
        log.info("save %s of %s, step %d, is not sent to %s: %s", save.save_id, self.run, save.step, self.name, reason)
        self._emit(Event("skipped", save.save_id, save.step, {"remote": self.name, "reason": reason}))

    def _derive_local(self) -> None:
        """Pending is what the local tier has and the remote hasn't; nothing else is remembered."""
        here = {s.save_id: s for s in self._tier.saves(self.run) if s.damaged is None}
        with self._condition:
            for save_id in set(self._uploads) - set(here):
                del self._uploads[save_id]
            self._skipped &= set(here)
            for save_id, save in here.items():
                if save_id in self._uploads:
                    self._uploads[save_id].save = save
                elif save_id not in self._skipped and (self._committed is None or save_id not in self._committed):
                    self._uploads[save_id] = Upload(save)
            self._seen = self._begun

    def _ask_remote(self, remote: RemoteTier) -> None:
        """Leave out what the remote has; a part whose save is committed there is complete: all of it is durable."""
        saves = remote.saves()
        with self._condition:
            self._committed = {save.save_id for save in saves}
            there = [(save, self._uploads.pop(save.save_id)) for save in saves if save.save_id in self._uploads]
        for save, upload in there:
            if upload.save.state == "prepared":
                self._complete(upload.save, remote.root_manifest(save))
        if saves and self._uploads and (rules := remote_rules(self._tier, self.run)) is not None:
            for upload, reason in list(dropped_there(self._uploads.values(), self._tier, self.run, saves[-1], rules)):
                self._skip(upload, reason)

    def _complete(self, save: LocalSave, root: RootManifest) -> None:
        now = self._tier.find(self.run, save.save_id)
        if now is not None and now.state == "prepared":
            commit.complete(now.path, root)
            self._completed(root)

    def _work_on(self, remote: RemoteTier, upload: Upload) -> None:
        """Push one save, or ask whether the other nodes' parts have come."""
        save = upload.save
        try:
            if upload.pushed_at is None:
                self._line.claim_timeline(save.summary)
                self._line.learn_timelines()
                root = self._push(upload)
            else:
                root = remote.try_commit(save.save_id, upload.shards or ())
                self._poll_later(upload)
            if root is not None:
                self._committed_now(upload, root)
        except (TransientError, CredentialsError, NoStoreError, ConfigError):
            upload.state = "queued"
            raise
        except CkptError as error:
            if self._tier.find(self.run, save.save_id) is None:
                self.notify()  # deleted while it was being read
                return
            log.error("save %s of %s to %s: %s", save.save_id, self.run, self.name, error)
            upload.state = "failed"
            upload.pushed_at = None  # the next attempt looks at everything again
            upload.due = self._clock.monotonic() + REFUSED_PAUSE_SECONDS
            self._report(upload, error)

    def _push(self, upload: Upload) -> RootManifest | None:
        def going() -> None:
            self._trouble.away_since = None

        is_cut_short = partial(self._is_cut_short, upload)
        root = send(
            upload, self._tier, self._line, lambda: self._config, self._clock, is_cut_short=is_cut_short, going=going
        )
        if upload.state == "waiting":
            self._poll_later(upload)
        return root

    def _poll_later(self, upload: Upload) -> None:
        upload.due = self._clock.monotonic() + upload.poll_seconds
        upload.poll_seconds = min(MAX_POLL_SECONDS, upload.poll_seconds * 1.5)

    def _committed_now(self, upload: Upload, root: RootManifest) -> None:
        if upload.save.state == "prepared":
            # Every rank's part is durable in the remote: the save exists, whatever became of its trainers.
            self._complete(upload.save, root)
        summary = root.summary
        with self._condition:
            if self._committed is not None:
                self._committed.add(summary.save_id)
            self._uploads.pop(summary.save_id, None)
            if self.last_remote is None or order(self.last_remote) <= order(summary):
                self.last_remote = summary
        self._emit(uploaded(upload, summary, self.run, self.name))
        if not self._uploads:
            trim_memory()


def brief(summary: Summary | None) -> dict[str, Any] | None:
    """Which save, for ``status``."""
    if summary is None:
        return None
    return {"save_id": summary.save_id, "step": summary.step, "created_at": summary.created_at}
