"""How far a transfer is, as told to whoever waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["transfer", "commit", "done"]


@dataclass(frozen=True)
class Progress:
    """A moment of a push or pull.

    Attributes:
        plain_done: tensor bytes dealt with so far: moved, referenced, or found in place.
        plain_total: tensor bytes of the whole transfer.
        sent_bytes: bytes that went over the wire, in either direction.
        stage: ``transfer``, then ``commit``, then ``done``.
        waiting_bytes: bytes of a push that are ready to be sent, or on their way.
    """

    plain_done: int
    plain_total: int
    sent_bytes: int
    stage: Stage
    waiting_bytes: int = 0


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts for a :class:`Progress` callback. Thread-safe; the callback is never called by two threads at once."""

    def __init__(self, plain_total: int, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._now = Progress(0, plain_total, 0, "transfer")

    @property
    def plain_total(self) -> int:
        """Tensor bytes of the whole transfer."""
        return self._now.plain_total

    @property
    def sent_bytes(self) -> int:
        """Bytes over the wire so far."""
        return self._now.sent_bytes

    def add(self, *, plain: int = 0, sent: int = 0, waiting: int = 0, stage: Stage | None = None) -> None:
        """Advance, and tell."""
        with self._lock:
            now = self._now
            self._now = Progress(
                now.plain_done + plain,
                now.plain_total,
                now.sent_bytes + sent,
                stage if stage is not None else now.stage,
                now.waiting_bytes + waiting,
            )
            if self._callback is not None:
                self._callback(self._now)
