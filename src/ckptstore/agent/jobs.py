"""The saves of one run as this node's agent sees them: gathered, written, committed, or dropped.

A save begins with the first rank's seal. Once every local rank has sealed it is safe from the trainers; until then a
rank that is lost, or too late, drops it for all. Nothing here blocks on a disk while it holds the agent's condition.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ckptstore.agent.arena import State
from ckptstore.agent.job import Part, SaveJob, Stage, Watcher, check_seal
from ckptstore.agent.protocol import Event, SealRequest
from ckptstore.agent.remotes import RunRemotes
from ckptstore.agent.runtime import RuntimeDir
from ckptstore.agent.slots import Attachment, Leaving, Slots
from ckptstore.agent.uploader import brief
from ckptstore.agent.writer import Written
from ckptstore.agent.writing import Writing
from ckptstore.clock import Clock, rfc3339
from ckptstore.config import StoreConfig
from ckptstore.errors import CheckpointNotFoundError, CkptError, ConfigError, SaveFailedError
from ckptstore.format.manifest import RootManifest, Summary, canonical
from ckptstore.repo import commit, journal, names, timings
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.blob.retry import Retry

log = logging.getLogger("ckptstore.agent")

#: Dropped saves remembered, so that a rank that seals late is told why.
_REMEMBERED = 256


class RunJobs:
    """Everything the agent does for one run. Thread-safe.

    Args:
        condition: the agent's.
        tier: of the agent's root.
        directory: the agent's.
        run: the run.
        config: of the newest attachment.
    """

    def __init__(
        self,
        condition: threading.Condition,
        tier: LocalTier,
        directory: RuntimeDir,
        run: str,
        config: StoreConfig,
        clock: Clock,
    ) -> None:
        self.run = run
        self.config = config
        self.slots = Slots(condition, run, self._left, clock)
        self.last_local: Summary | None = None
        self.failures = 0
        self.watchers: list[Watcher] = []
        self._condition = condition
        self._tier = tier
        self._clock = clock
        self._jobs: dict[str, SaveJob] = {}
        self._dropped: dict[str, CkptError] = {}
        self._dead_jobs: set[str] = set()
        self._writing = Writing(
            condition, tier, directory, run, clock, chunk_elements=lambda: self.config.chunk_elements, ended=self._ended
        )
        self.remotes = RunRemotes(condition, tier, run, self.emit, self.completed, self._retried, clock)

    # ------------------------------------------------------------------ attachments

    def attach(
        self,
        slot: int,
        send: Callable[[Event], None],
        is_gone: Callable[[], bool],
        *,
        rank: int | None,
        config: StoreConfig,
        remotes: Mapping[str, str],
        environ: Mapping[str, str],
        begun: float = 0.0,
    ) -> Attachment:
        """Make a connection the owner of a slot. Newest wins: slot, configuration, remotes and credentials.

        Raises:
            LockedError: a job that began later is here.
        """
        with self._condition:
            folder = self._tier.root if config.stage_on_disk else None
            attachment = self.slots.attach(slot, send, is_gone, rank=rank, folder=folder, begun=begun)
            self.config = config
            self._condition.notify_all()
        self.remotes.refresh(remotes, environ, config)
        return attachment

    def detach(self, attachment: Attachment, *, is_gone: bool, was_closed: bool) -> None:
        """A connection has ended.

        Args:
            is_gone: nobody can write into its memory any more: it said so, or its process is dead.
            was_closed: it said goodbye.
        """
        with self._condition:
            self.slots.detach(attachment, is_gone=is_gone, was_closed=was_closed)
            self._condition.notify_all()
        if is_gone and not was_closed and attachment.last is not None:
            self._note_death(attachment.rank, *attachment.last)

    def _note_death(self, rank: int | None, save_id: str, step: int) -> None:
        """For people: this job ended without a goodbye. Its first rank speaks for it."""
        nonce, _ = names.split_save_id(save_id)
        with self._condition:
            if nonce in self._dead_jobs:
                return
            self._dead_jobs.add(nonce)
        record = {"time": rfc3339(self._clock.now()), "ended": "lost", "job": nonce, "rank": rank, "step": step}
        journal.append(self._tier, self.run, "jobs", [record])

    def _left(self, leaving: Leaving) -> None:
        """What a rank has not sealed when it leaves comes to nothing, for all."""
        error = SaveFailedError("its process was lost before every rank had sealed", rank=leaving.who.rank)
        for save_id in leaving.unsealed:
            if save_id not in self._jobs:
                self._remember(save_id, error)
        for job in list(self._jobs.values()):
            rank = self.slots.rank_of(leaving.who, job.local_ranks)
            if job.stage is not Stage.GATHERING or rank is None or (leaving.was_closed and rank in job.parts):
                continue
            what = "closed its store" if leaving.was_closed else "was lost"
            self._drop(job, SaveFailedError(f"rank {rank} {what} before every rank had sealed", rank=rank))

    def emit(self, event: Event) -> None:
        """Tell every attached rank. Never blocks."""
        if event.kind == "remote":
            self.remotes.note(event)
        with self._condition:
            if event.kind == "failed":
                self.failures += 1
            for attachment in self.slots.attached:
                attachment.send(event)
        for watcher in self.watchers:
            watcher.event(self.run, event)

    # ------------------------------------------------------------------ sealing

    def held(self, save_id: str) -> list[tuple[int, int, int]]:
        """What dead trainers left of a save; see :meth:`Slots.held`."""
        with self._condition:
            return self.slots.held(save_id)

    def seal(self, who: Attachment, index: int, request: SealRequest) -> None:
        """Take a filled generation into its save.

        Raises:
            ConfigError: the request contradicts itself, the layout, or what other ranks said.
            SaveFailedError: the save was dropped meanwhile; the generation is free again.
        """
        check_seal(self.run, request)
        with self._condition:
            who.slot.check_owner(who)
            generation = who.slot.filling(index)
            layout = who.slot.layout
            if layout is None or who.slot.layout_id != request.layout_id:
                raise ConfigError(f"save {request.save_id} was copied into another layout than the arena has")
            if (error := self._dropped.get(request.save_id)) is not None:
                generation.free()
                self._condition.notify_all()
                raise error
            shape = (request.step, request.world_size, request.num_nodes, request.node, request.local_ranks)
            job = self._jobs.get(request.save_id)
            if job is None:
                now = self._clock.monotonic()
                job = SaveJob(request.save_id, request.step, shape, request.local_ranks, now)
                self._jobs[request.save_id] = job
            if job.shape != shape or request.rank in job.parts:
                raise ConfigError(f"rank {request.rank}'s seal of save {request.save_id} contradicts earlier ones")
            generation.state, generation.save_id = State.SEALED, request.save_id
            generation.holds = request.save_id, request.rank
            job.parts[request.rank] = Part(request, generation, layout, who.slot.pieces)
            who.rank = who.slot.rank = request.rank
            who.last = request.save_id, request.step
            if job.missing:
                lost = [r for r in job.missing if self.slots.is_lost(r, job.local_ranks)]
                if lost:
                    raise self._drop(
                        job, SaveFailedError(f"rank {lost[0]} was lost before it had sealed", rank=lost[0])
                    )
                return
            job.stage = Stage.WRITING
            self.emit(Event("sealed", job.save_id, job.step))
        try:
            self._writing.begin(job)
        except SaveFailedError as failure:
            with self._condition:
                raise self._drop(job, failure) from None

    def _drop(self, job: SaveJob, error: CkptError) -> CkptError:
        """Forget a save that isn't durable, and say so. Hold the condition. Returns the error."""
        self._jobs.pop(job.save_id, None)
        for part in job.parts.values():
            part.generation.free()
        self._remember(job.save_id, error)
        self._condition.notify_all()
        said = {"run": self.run, "step": job.step, "save_id": job.save_id, "event": "dropped"}
        log.warning("save %s of %s, step %d, dropped: %s", job.save_id, self.run, job.step, error.message, extra=said)
        self.emit(Event.failure(error, save_id=job.save_id, step=job.step, level="staged"))
        return error

    def _remember(self, save_id: str, error: CkptError) -> None:
        self._dropped[save_id] = error
        while len(self._dropped) > _REMEMBERED:
            del self._dropped[next(iter(self._dropped))]

    def discard(self, save_id: str, reason: str) -> bool:
        """Drop a save that isn't complete; False if it is, and stays.

        A part that is prepared is deleted. One that is being written stops, or is complete after all: the events tell.
        """
        names.check_save_id(save_id)
        with self._condition:
            job = self._jobs.get(save_id)
            if job is not None and job.stage is Stage.WRITING:
                job.abandoned = reason
                self._condition.notify_all()
                return True
            if job is not None:
                self._drop(job, SaveFailedError(reason))
                return True
            self._remember(save_id, SaveFailedError(reason))
        save = self._tier.find(self.run, save_id)
        if save is None:
            return True
        if save.state == "complete":
            return False
        self._tier.delete(self.run, save_id)
        self.emit(Event.failure(SaveFailedError(reason), save_id=save_id, step=save.step, level="staged"))
        return True

    def missed(self, save_id: str, step: int, error: CkptError | None) -> None:
        """No rank has copied this save: there was no memory for it in time. ``error`` None: it was left out by choice.

        Its trainers know already; this is for the log, metrics and hooks.
        """
        if error is None:
            event = Event("left_out", save_id, step)
        else:
            event = Event.failure(error, save_id=save_id, step=step, level="staged")
            said = {"run": self.run, "step": step, "save_id": save_id, "event": "failed"}
            log.error("save %s of %s, step %d, failed: %s", save_id, self.run, step, error, extra=said)
        with self._condition:
            self.failures += error is not None
        for watcher in self.watchers:
            watcher.event(self.run, event)

    def check_deadlines(self) -> None:
        """Drop saves whose other ranks don't come; give back memory whose rank doesn't come back."""
        with self._condition:
            now = self._clock.monotonic()
            for index in self.slots.give_back(self.config.agent_idle_exit_seconds):
                log.info("gave back the memory of slot %d of %s", index, self.run)
            for job in list(self._jobs.values()):
                if job.stage is Stage.GATHERING and now - job.begun > self.config.deadline_s:
                    ranks = ", ".join(str(rank) for rank in job.missing)
                    error = SaveFailedError(
                        f"rank {ranks} did not seal within {self.config.deadline_s} s", rank=job.missing[0]
                    )
                    self._drop(job, error)

    # ------------------------------------------------------------------ what comes of it

    def _ended(self, job: SaveJob, outcome: Written | CkptError, *, level: str) -> None:
        """A save is on disk, or failed short of ``level``: its memory is free."""
        if isinstance(outcome, Written):
            # Before the job is forgotten: at no moment may all look settled.
            self.remotes.notify()
        with self._condition:
            self._jobs.pop(job.save_id, None)
            for part in job.parts.values():
                part.generation.free()
            self._condition.notify_all()
        if isinstance(outcome, Written):
            self._written(job, outcome)
            return
        said = {"run": self.run, "step": job.step, "save_id": job.save_id, "event": "failed"}
        log.error("save %s of %s, step %d, failed: %s", job.save_id, self.run, job.step, outcome, extra=said)
        self.emit(Event.failure(outcome, save_id=job.save_id, step=job.step, level=level))

    def _written(self, job: SaveJob, written: Written) -> None:
        size = sum(shard.file_bytes for shard in written.shards)
        log.info(
            "%s save %s of %s, step %d: %d bytes, written in %.3f s, committed in %.3f s",
            "prepared" if written.root is None else "committed",
            *(job.save_id, self.run, job.step, size, written.timing["write"], written.timing["commit"]),
            extra={
                "run": self.run,
                "step": job.step,
                "save_id": job.save_id,
                "event": "prepared" if written.root is None else "committed",
                "bytes": size,
            },
        )
        ranks = {str(rank): dict(part.request.spans) for rank, part in job.parts.items()}
        # Before anybody hears of it: whoever has waited may take the directory away.
        timings.note(self._tier, self.run, job.save_id, {"ranks": ranks, **written.timing})
        if written.root is not None:
            self.completed(written.root)
        else:
            shards = [shard.model_dump(mode="json") for shard in written.shards]
            self.emit(Event("prepared", job.save_id, job.step, {"shards": shards}))
        seconds = {
            rank: {stage: value for stage, value in spans.items() if isinstance(value, float)}
            for rank, spans in ranks.items()
        }
        for watcher in self.watchers:
            watcher.written(self.run, seconds, written.timing)

    def completed(self, root: RootManifest) -> None:
        """A save became complete in the local tier."""
        summary = root.summary
        with self._condition:
            newest = self.last_local
            if newest is None or (newest.timeline, newest.step) <= (summary.timeline, summary.step):
                self.last_local = summary
        self.emit(Event("local", summary.save_id, summary.step, {"summary": summary.model_dump(mode="json")}))

    def complete(self, save_id: str, root_bytes: bytes) -> None:
        """Make a prepared part complete; fine if it is.

        Raises:
            CheckpointNotFoundError: this node has no part of it.
            CkptError: as :func:`ckptstore.repo.commit.complete`.
        """
        root = RootManifest.decode(root_bytes, what=f"root manifest of save {save_id}")
        save = self._tier.find(self.run, names.check_save_id(save_id))
        if save is None:
            raise CheckpointNotFoundError(f"this node has no part of save {save_id}", run=self.run)
        commit.complete(save.path, root)
        self.completed(root)
        self.remotes.notify()

    def claim_timeline(self, at_least: int, record: Mapping[str, Any] | bytes) -> int:
        """Take the first free timeline number from ``at_least`` on, durably, for this tier."""
        number = max(1, at_least)
        while True:
            data = record if isinstance(record, bytes) else canonical({**record, "timeline": number})
            if self._tier.claim_timeline(self.run, number, data):
                return number
            number += 1

    def _retried(self, retry: Retry) -> None:
        for watcher in self.watchers:
            watcher.retried(retry.op, retry.reason)

    # ------------------------------------------------------------------ looking at it

    def live(self) -> set[str]:
        """Saves whose staging directories are in use."""
        with self._condition:
            return set(self._jobs)

    def is_busy(self) -> bool:
        """Whether anything is staged, or can be uploaded now."""
        with self._condition:
            return self.slots.is_filling() or bool(self._jobs) or self.remotes.is_busy()

    def is_staging(self) -> bool:
        """Whether a save has a seal and no end yet."""
        with self._condition:
            return bool(self._jobs)

    def is_settled(self) -> bool:
        """Whether nothing is staged and every remote has everything."""
        with self._condition:
            return not self._jobs and self.remotes.is_settled()

    def describe(self) -> dict[str, Any]:
        """For ``status``."""
        with self._condition:
            return {
                "ranks_attached": self.slots.owners(),
                "saves": [
                    {"save_id": j.save_id, "step": j.step, "stage": j.stage.value, "ranks_missing": j.missing}
                    for j in self._jobs.values()
                ],
                "last_local": brief(self.last_local),
                "failures": self.failures,
                "remotes": self.remotes.describe(),
                "now": rfc3339(self._clock.now()),
            }
