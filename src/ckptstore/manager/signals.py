"""Signals as flags: the handler notes which one came and when; the training loop acts at its next step.

A watcher thread learns of a signal even while the main thread is stuck in C code (a collective, a long kernel), from
the interpreter's wakeup descriptor. If no step comes within the grace it ends the process, so that a SIGTERM never
leaves a job hanging; what the agents hold by then is the result.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

log = logging.getLogger("ckptstore")

#: A user's own handlers are called after ours; these are not.
_NOT_CHAINED = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)

_live: weakref.WeakSet[SignalWatch] = weakref.WeakSet()


class SignalWatch:
    """Installed between :meth:`install` and :meth:`restore`; for the main thread.

    Args:
        names: signals to note, by name.
        grace_s: seconds between SIGTERM and the end.
        on_late: called in the watcher thread with the signal's number when SIGTERM's grace is over; then the process
            exits. Must not block for long.
        on_first_interrupt: called in the handler at the first SIGINT; must be safe there.

    Attributes:
        pending: number of the signal to act on, or None. SIGTERM replaces others; nothing replaces SIGTERM.
        interrupts: how many SIGINTs have come; the second one is acted on at once.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        grace_s: float,
        on_late: Callable[[int], None],
        on_first_interrupt: Callable[[], None],
    ) -> None:
        self.pending: int | None = None
        self._numbers = [int(getattr(signal, name)) for name in names]
        self._grace_s = grace_s
        self._on_late, self._on_first_interrupt = on_late, on_first_interrupt
        self._arrived: float | None = None
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self.interrupts = 0
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._owns_wakeup = False
        self._disarmed = threading.Event()

    def install(self) -> str | None:
        """Take over the signals; a sentence about what could not be taken over, or None."""
        if not self._numbers:
            return None
        if threading.current_thread() is not threading.main_thread():
            return "signals are not handled: the manager was entered in another thread than the main one"
        ignored: list[str] = []
        for number in self._numbers:
            previous = signal.getsignal(number)
            if previous is signal.SIG_IGN or previous is None:
                ignored.append(signal.Signals(number).name)  # whoever started us doesn't want it to end us
                continue
            self._previous[number] = previous
            signal.signal(number, self._handle)
        if self._previous:
            self._start_watcher()
            _live.add(self)
        return f"{', '.join(ignored)}: ignored when the process was started, left so" if ignored else None

    def restore(self) -> None:
        """Give the handlers back, unless somebody has put others in our place since."""
        self._disarmed.set()
        if self._pipe is None or self._thread is None or os.getpid() != self._pid:
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                with suppress(ValueError):  # closed in another thread
                    signal.signal(number, previous)
        self._previous = {}
        if self._owns_wakeup:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
        _live.discard(self)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for fd in self._pipe:
            os.close(fd)
        self._pipe = None

    def remaining_s(self) -> float:
        """Seconds of the grace that are left, counted from the first signal."""
        if self._arrived is None:
            return self._grace_s
        return self._arrived + self._grace_s - time.monotonic()

    # -- in the handler: notes, nothing else ----------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._leave_to_child(number, frame)
            return
        if self._arrived is None:
            self._arrived = time.monotonic()
        if self.pending != signal.SIGTERM:
            self.pending = number
        if not self._owns_wakeup and self._pipe is not None:
            os.write(self._pipe[1], bytes([number]))
        previous = self._previous.get(number)
        if callable(previous) and previous not in _NOT_CHAINED:
            previous(number, frame)
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt
            self._on_first_interrupt()

    def _leave_to_child(self, number: int, frame: FrameType | None) -> None:
        """A forked child behaves as if we had never been there."""
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        else:
            signal.signal(number, previous)
            os.kill(os.getpid(), number)

    # -- the watcher ----------------------------------------------------------------------------------------------

    def _start_watcher(self) -> None:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        old = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._owns_wakeup = old == -1
        if not self._owns_wakeup:
            signal.set_wakeup_fd(old)  # an event loop's; then our handler tells the watcher
        self._thread = threading.Thread(target=self._watch, args=self._pipe[:1], name="ckptstore-signals", daemon=True)
        self._thread.start()

    def _watch(self, reading: int) -> None:
        while True:
            data = os.read(reading, 64)
            if 0 in data:
                return
            if signal.SIGTERM in data and signal.SIGTERM in self._previous:
                break
        if not self._disarmed.wait(self._grace_s):
            self._on_late(signal.SIGTERM)
            os._exit(128 + signal.SIGTERM)

    def _forget_in_child(self) -> None:
        """The child's signals are none of the parent's business."""
        if self._owns_wakeup:
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                with suppress(ValueError):
                    signal.signal(number, previous)
        self._previous = {}

    @property
    def numbers(self) -> list[int]:
        """The signals taken over."""
        return list(self._previous)


# A signal that hits the child before it has let go of our handlers would be lost there, and be told to the parent's
# watcher: so they wait until that is done. A thread of its own for each fork, hence the mask is kept by thread.
_masks = threading.local()


def _before_fork() -> None:
    numbers = {number for watch in list(_live) for number in watch.numbers}
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None


def _after_fork_in_parent() -> None:
    if (mask := getattr(_masks, "before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for watch in list(_live):
        watch._forget_in_child()
    _live.clear()
    _after_fork_in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
