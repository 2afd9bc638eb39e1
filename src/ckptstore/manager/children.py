"""Deaths of child processes, told only where the state is whole.

torch's DataLoader handles SIGCHLD by raising RuntimeError in the main thread, wherever that is: in the middle of an
optimizer step, of a save, or of the very ending that a SIGTERM to the whole process group has begun. So while the state
is being changed or saved, a handler of Python's is held back, and called afterwards; once the job is ending, never.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class ChildWatch:
    """Stands before whatever SIGCHLD handler there is, while a manager's block is entered; for the main thread.

    ``with watch:`` holds deaths back, as :meth:`hold` and :meth:`release` do; they nest. Costs well under a
    microsecond. A handler that is installed later, as by the first loader with workers, is found at the next hold.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._has_news = False
        self._is_over = True
        self._ours: Callable[[int, FrameType | None], Any] | None = None
        self._before: Any = None
        self._thread: int | None = None
        self._pid = 0
        self._shelters: set[CodeType] = set()

    def shelter(self, function: Callable[..., Any]) -> None:
        """Nothing is told inside this function, not even at its first instruction, where it can't hold yet."""
        self._shelters.add(function.__code__)

    def begin(self) -> None:
        """The block is entered."""
        if threading.current_thread() is threading.main_thread():
            self._thread, self._pid, self._is_over = threading.get_ident(), os.getpid(), False

    def hold(self) -> None:
        """Until :meth:`release`, deaths are noted and not told."""
        if self._thread == threading.get_ident():
            self._cover()  # may still tell: nothing has begun yet
            self._depth += 1

    def release(self) -> None:
        """Tell now what was held back; raises what the handler raises."""
        if self._thread == threading.get_ident() and self._depth:
            self._depth -= 1
            if self._has_news and not self._depth and not self._is_over:
                self._has_news = False
                handler = signal.getsignal(signal.SIGCHLD)
                if callable(handler):
                    handler(signal.SIGCHLD, None)

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.release()
        elif self._depth:
            self._depth -= 1  # what is being raised has the word

    def end(self) -> None:
        """The job is ending: nothing is told any more."""
        self._is_over = True

    def close(self) -> None:
        """The block is left: the handler is as it was before, unless somebody has put another in our place since."""
        if self._ours is not None and signal.getsignal(signal.SIGCHLD) is self._ours:
            signal.signal(signal.SIGCHLD, self._before)
        self._thread = self._ours = None
        self._depth, self._has_news, self._is_over = 0, False, True

    def _is_sheltered(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code in self._shelters:
                return True
            frame = frame.f_back
        return False

    def _cover(self) -> None:
        current = signal.getsignal(signal.SIGCHLD)
        if current is self._ours or not callable(current):
            return

        def noted(number: int, frame: FrameType | None) -> None:
            is_ours = self._thread is not None and os.getpid() == self._pid
            if is_ours and (self._depth or self._is_over or self._is_sheltered(frame)):
                self._has_news = True
            else:
                current(number, frame)

        signal.signal(signal.SIGCHLD, noted)
        self._ours, self._before = noted, current
