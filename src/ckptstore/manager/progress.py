"""Where the loop is, and what has been saved of it: plain facts, kept on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptstore.errors import CkptError
from ckptstore.policy.save import Moment
from ckptstore.store import SaveHandle

#: Entries of the manager's own history: one per save.
KEPT_ENTRIES = 2000


@dataclass
class Progress:
    """The loop's place.

    Attributes:
        step, epoch: of the last completed step; step None before the first.
        last_step: step of the last save, or where the job started.
        handle: the last save.
        saves: how many this job has made.
        failures: failed saves in a row.
        failure: why the last save could not be taken; None if it was.
        metrics: of the last completed step, as they were told.
    """

    clock: Callable[[], float] = time.monotonic
    step: int | None = None
    epoch: int | None = None
    previous_step: int | None = None
    last_step: int | None = None
    epochs_since_save: int = 0
    handle: SaveHandle | None = None
    saves: int = 0
    failures: int = 0
    failure: CkptError | None = None
    metrics: Mapping[str, Any] | None = None
    is_end_saved: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.saved_at = self.clock()

    def advance(self, step: int, epoch: int | None, metrics: Mapping[str, Any] | None = None) -> None:
        """A step of the loop is complete."""
        self.previous_step = self.step
        self.step, self.metrics = step, metrics
        if epoch is not None:
            self.epoch = epoch
        if self.last_step is None:
            self.last_step = step - 1

    def started_from(self, step: int, epoch: int | None, epochs_since_save: int) -> None:
        """The state is that of a checkpoint, or new."""
        self.step = self.last_step = step
        self.previous_step, self.epoch, self.epochs_since_save = None, epoch, epochs_since_save
        self.handle = self.failure = self.metrics = None
        self.saved_at = self.clock()

    def saved(self, handle: SaveHandle, *, is_epoch_end: bool) -> None:
        """A save was taken."""
        self.handle, self.last_step, self.saves = handle, handle.step, self.saves + 1
        self.saved_at, self.failure = self.clock(), None
        if is_epoch_end:
            self.epochs_since_save = 0

    def missed(self, error: CkptError, step: int) -> None:
        """A save could not be taken; the next one is due as if it had been."""
        self.last_step, self.saved_at, self.failure = step, self.clock(), error
        self.failures += 1

    def is_saved(self, step: int) -> bool:
        """Whether this step was saved, and not in vain."""
        handle = self.handle
        return handle is not None and handle.step == step and not (handle.done("local") and handle.local.exception())

    def moment(
        self, *, is_epoch_end: bool = False, signal: str | None = None, end: float | None = None, timed: bool = True
    ) -> Moment:
        """What a save policy sees now; without ``timed``, as if no time had passed."""
        return Moment(
            step=self.step or 0,
            last_step=self.last_step or 0,
            previous_step=self.previous_step,
            seconds_since_save=self.clock() - self.saved_at if timed else 0.0,
            is_epoch_end=is_epoch_end,
            epochs_since_save=self.epochs_since_save,
            seconds_left=end - time.time() if end is not None and timed else math.inf,
            is_end_saved=self.is_end_saved,
            signal=signal,
        )

    def note(self, step: int, epoch: int | None, metrics: Mapping[str, float]) -> None:
        """One line of history."""
        self.history.append({"step": step, **({"epoch": epoch} if epoch is not None else {}), **metrics})
        del self.history[:-KEPT_ENTRIES]
