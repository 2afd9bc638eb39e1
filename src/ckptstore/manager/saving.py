"""Taking one save: the whole state, looked over, handed to the store, and followed on its way."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckptstore.dcp.markers import PerRank
from ckptstore.errors import CkptError, Preempted, SaveFailedError, SaveTimeoutError, StateError, StorageError
from ckptstore.manager import health, rng
from ckptstore.manager.parts import Parts
from ckptstore.manager.tracking import OWN_KEY
from ckptstore.policy.retention import SUSPECT
from ckptstore.policy.space import forecast
from ckptstore.store import SaveHandle
from ckptstore.store.facts import read_metrics
from ckptstore.types import CheckpointInfo

OWN_VERSION = 1
#: Saves in quick succession are not a remote that falls behind.
LAG_SECONDS = 10.0
#: What a disk or a lost peer can do to a save; anything else is a mistake in the program and is raised at once.
_RECOVERABLE = (SaveFailedError, SaveTimeoutError, StorageError)

OnFailure = Literal["warn", "raise", "stop"]


@dataclass(frozen=True)
class Occasion:
    """Why and of what a save is taken."""

    step: int
    epoch: int | None = None
    metrics: Mapping[str, Any] | None = None
    tags: tuple[str, ...] = ()
    is_emergency: bool = False
    is_epoch_end: bool = False
    reason: str = ""


class Saver:
    """Takes the saves of one job. Its :meth:`save` is Collective.

    Args:
        on_failure: after a save that failed: go on, raise, or stop the job in order.
        max_failures: with "warn": raise after this many in a row.
    """

    def __init__(self, parts: Parts, *, on_failure: OnFailure, max_failures: int) -> None:
        self._store, self._tracked, self._progress = parts.store, parts.tracked, parts.progress
        self._keeper, self._retention = parts.keeper, parts.retention
        self._safety, self._scalars, self._voice = parts.safety, parts.scalars, parts.voice
        self._proof = parts.proof
        self._on_failure, self._max_failures = on_failure, max_failures
        self.is_ready = False
        """Whether a save or a rehearsal was tried."""
        self._warned_room: int | None = None
        self._lagging: set[str] = set()

    def save(self, occasion: Occasion) -> SaveHandle | None:
        """Save all that is tracked; None if that failed and training should go on. Collective.

        Raises:
            StateError: something tracked can't be stored.
            SaveFailedError: it failed, and the policy says so, or it has failed too often.
        """
        if not self._tracked:
            raise StateError("nothing is tracked, so there is nothing to save", hint="manager.track(model=model, ...)")
        begun = time.perf_counter()
        self.is_ready = True
        try:
            self._look_around(occasion)
            state, metrics, tags = self._prepare(occasion)
            handle = self._store.save(
                state,
                occasion.step,
                epoch=occasion.epoch,
                metrics=metrics,
                tags=tags,
                emergency=occasion.is_emergency,
            )
        except _RECOVERABLE as error:
            self._progress.missed(error, occasion.step)
            self._voice.say(f"save failed: {error}", logging.ERROR)
            if not occasion.is_emergency:
                self._react(error)
            return None
        if handle.done("local") and handle.local.exception() is None and handle.local.result().skipped:
            self._progress.last_step, self._progress.saved_at = occasion.step, self._progress.clock()
            self._voice.say(f"step {occasion.step} was skipped: earlier saves are still being written", logging.WARNING)
            return handle
        self._progress.saved(handle, is_epoch_end=occasion.is_epoch_end)
        self._follow(handle, time.perf_counter() - begun)
        return handle

    def rehearse(self, occasion: Occasion) -> None:
        """All of a save but the copy, so that the first one waits for little more. Collective.

        Raises:
            StateError: something tracked can't be stored.
        """
        self.is_ready = True
        if not self._tracked or self._store.local is None:
            return
        values: dict[str, Any] = {}
        files: dict[str, Any] = {}
        with suppress(Exception):  # the save will say it
            values, files = self._tracked.values(), self._tracked.filed()
        try:
            self._store.prepare(self._state(occasion, values, files))
        except _RECOVERABLE as error:
            self._voice.warn(f"getting ready to save failed, the first save tries again: {error}")

    # -- before ---------------------------------------------------------------------------------------------------

    def _prepare(self, occasion: Occasion) -> tuple[dict[str, Any], dict[str, float], tuple[str, ...]]:
        """The state, its metrics and tags; settled among the ranks."""
        error: CkptError | None = None
        metrics: dict[str, float] = {}
        values: dict[str, Any] = {}
        files: dict[str, Any] = {}
        is_suspect = False
        try:
            metrics = {name: float(value) for name, value in read_metrics(occasion.metrics).items()}
            values, files = self._tracked.values(), self._tracked.filed()
            is_suspect = health.has_bad_values(
                self._tracked.modules,
                turn=self._progress.saves,
                is_thorough=occasion.is_emergency or health.has_bad_metrics(metrics),
            )
        except CkptError as failure:
            error = failure
        except Exception as failure:
            error = StateError(f"asking for a tracked value failed: {type(failure).__name__}: {failure}")
        agreement = self._store.agreement
        outcome = agreement.agree(
            same={},
            flags={
                "failed": error is not None,
                "suspect": is_suspect,
                "exhausted": self._on_failure == "warn" and self._progress.failures >= self._max_failures,
            },
        )
        if "failed" in outcome.raised:
            agreement.raise_together(error, what="preparing the save")
        if "exhausted" in outcome.raised and not occasion.is_emergency:
            self._progress.failures = 0
            handle = self._progress.handle
            last = self._progress.failure or (handle.failure() if handle is not None else None)
            raise SaveFailedError(
                f"{self._max_failures} saves in a row have failed; the last: {last.message if last else 'see above'}",
                hint="earlier checkpoints are untouched; make room or fix the disk, then start again",
                step=occasion.step,
            ) from last
        tags = occasion.tags + ((SUSPECT,) if "suspect" in outcome.raised else ())
        if "suspect" in outcome.raised:
            self._voice.warn(f"step {occasion.step}: the model has values that are not finite; saved as {SUSPECT!r}")
        self._progress.note(occasion.step, occasion.epoch, metrics)
        return self._state(occasion, values, files), metrics, tags

    def _state(self, occasion: Occasion, values: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
        """What is handed to the store: all that is tracked, and what a manager needs to go on from there."""
        own = {
            "version": OWN_VERSION,
            "step": occasion.step,
            "epoch": occasion.epoch,
            "epoch_finished": occasion.is_epoch_end,
            "epochs_since_save": 0 if occasion.is_epoch_end else self._progress.epochs_since_save,
            "history": list(self._progress.history),
            "names": self._tracked.names,
            "values": values,
            "rng": rng.capture(),
        }
        return {**self._tracked.in_place, OWN_KEY: {"own": PerRank(own), "files": files}}

    def _look_around(self, occasion: Occasion) -> None:
        """Say in time what will become a problem: a full disk, a remote that falls behind, a restore nobody tried."""
        if self._store.agreement.rank == 0 and (reminder := self._proof.reminder()) is not None:
            self._voice.say(reminder, logging.WARNING)
        for name in self._store.remotes:
            count, age_s = self._safety.lag(name)
            if count < 2:
                self._lagging.discard(name)
            elif name not in self._lagging and age_s >= LAG_SECONDS:
                self._lagging.add(name)
                self._voice.say(f"{name} is {count} saves behind; the oldest waits for {age_s:.0f} s", logging.WARNING)
        if self._keeper is None or self._store.local is None:
            return
        ahead = forecast(
            _free_bytes(self._store.local),
            self._keeper.save_bytes,
            step=self._progress.last_step or 0,  # this save is the first of those that are to fit
            steps_per_save=occasion.step - (self._progress.last_step or 0),
            kept=self._keeper.kept,
            limit=self._retention.limit,
        )
        if not ahead.is_short:
            self._warned_room = None
        elif self._warned_room is None or ahead.room < self._warned_room:
            self._warned_room = ahead.room
            self._voice.say(f"{self._store.local}: {ahead}", logging.WARNING)
            if ahead.room < 1:
                self._keeper.make_room()

    # -- after ----------------------------------------------------------------------------------------------------

    def _follow(self, handle: SaveHandle, stall_s: float) -> None:
        keeper = self._keeper
        is_first, is_leader = self._store.agreement.rank == 0, self._store.is_node_leader
        if keeper is not None:
            if is_leader:
                handle.before("local", keeper.after_local)
            for name in handle.remotes:

                def reached(info: CheckpointInfo, name: str = name) -> None:
                    keeper.after_remote(name, info, is_first_rank=is_first, is_leader=is_leader)

                handle.before(name, reached)
        self._safety.watch(handle)
        self._scalars.watch(handle, stall_s, self._progress.clock)
        handle.local.add_done_callback(self._ended)

    def _ended(self, future: Future[CheckpointInfo]) -> None:
        """Runs in the thread that brings the word."""
        error = future.exception()
        if isinstance(error, CkptError):
            self._progress.failures += 1
            self._voice.note_failure(str(error))
        elif error is None:
            self._progress.failures = 0

    def _react(self, error: CkptError) -> None:
        if self._on_failure == "stop":
            raise Preempted(error.exit_code, f"stopped because a save failed: {error}") from error
        if self._on_failure == "raise" or self._progress.failures >= self._max_failures:
            raise error


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
