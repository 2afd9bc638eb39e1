"""The ``with`` block of a manager: who is on watch while it is entered, and how it is left."""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from ckptstore.manager import ending
from ckptstore.manager.parts import Parts
from ckptstore.manager.saving import Saver
from ckptstore.manager.signals import SignalWatch
from ckptstore.manager.voice import is_first_rank, print_line

Phase = Literal["outside", "inside", "ending"]


class Block:
    """Watches signals, children and optimizers between :meth:`enter` and :meth:`leave`.

    Args:
        parts: what an ending needs.
        names: the signals that end the job with an emergency save.
        grace_s: seconds between a signal and the kill.
        saves_on_exception: whether an exception ends in a save.
    """

    def __init__(
        self,
        parts: Parts,
        saver: Saver,
        *,
        names: Sequence[str],
        grace_s: float,
        saves_on_exception: bool,
    ) -> None:
        self.phase: Phase = "outside"
        self.watch: SignalWatch | None = None
        self._parts, self._saver, self._children = parts, saver, parts.children
        self._names, self._grace_s, self._saves_on_exception = names, grace_s, saves_on_exception

    @property
    def pending(self) -> int | None:
        """The signal this rank has seen."""
        return self.watch.pending if self.watch is not None else None

    def enter(self) -> None:
        """Take over the signals."""
        parts = self._parts
        self.phase = "inside"
        parts.guard.watch(parts.tracked.optimizers)
        parts.progress.saved_at = parts.progress.clock()
        self._children.begin()
        self.watch = SignalWatch(
            self._names, grace_s=self._grace_s, on_late=self._too_late, on_first_interrupt=self._acknowledge
        )
        if (note := self.watch.install()) is not None:
            parts.voice.warn(note)

    def stop(self, signal: int, metrics: Mapping[str, Any] | None, *, can_save: bool) -> NoReturn:
        """End because of a signal, at a step that all ranks agree on. Collective.

        Raises:
            Preempted, KeyboardInterrupt: after the emergency save.
        """
        self.phase = "ending"
        self._children.end()
        remaining_s = self.watch.remaining_s() if self.watch is not None else self._grace_s
        ending.stop(self._parts, self._saver, signal, metrics, remaining_s, can_save=can_save)

    def leave(self, error: BaseException | None) -> None:
        """Save if an exception leaves the block and the state is whole; wait for what is on its way; let go.

        Raises:
            Preempted: a signal arrived that nobody has acted on.
            SaveFailedError: at a clean end, the last save failed.
        """
        if error is not None:
            self._children.end()
        try:
            with self._children:
                self._leave(error)
        finally:
            if self.watch is not None:
                self.watch.restore()
            self.phase = "outside"
            self._children.close()

    def close(self, timeout_s: float) -> None:
        """Wait for what is on its way, then let go."""
        self._parts.guard.release()
        ending.close(self._parts, timeout_s, watch=self.watch)

    # -- inner ----------------------------------------------------------------------------------------------------

    def _leave(self, error: BaseException | None) -> None:
        has_ended = self.phase == "ending"
        self.phase = "ending"
        is_now = self.watch is not None and self.watch.interrupts > 1
        # The KeyboardInterrupt that ends an ending needs no second one; any other exception has broken the ending off.
        is_unsaved = isinstance(error, Exception) or (isinstance(error, KeyboardInterrupt) and not has_ended)
        if error is not None and is_unsaved and self._saves_on_exception and not is_now:
            ending.rescue(self._parts, self._saver, error, self._grace_s)
        self._parts.guard.release()
        ending.leave(self._parts, error, watch=self.watch, is_now=is_now)

    # Called in the handler and the watcher: only what is safe there.

    def _acknowledge(self) -> None:
        if is_first_rank():
            what = "leaving" if self.phase == "ending" else "saving after this step"
            print_line(f"interrupted: {what}; press Ctrl-C again to stop now")

    def _too_late(self, signal: int) -> None:
        if is_first_rank():
            name = signals.Signals(signal).name
            print_line(f"{name}: no step came within {self._grace_s:.0f} s; {self._parts.safety.sentence()}")
