"""How fast one remote takes what is sent, and how fast it may: for status, estimates, deadlines and caps."""

from __future__ import annotations

import threading
from datetime import datetime

from ckptstore.config import StoreConfig

#: What happened this long ago counts half.
_HALF_LIFE_SECONDS = 15.0
#: A rate is told once this much work has been seen.
_LEAST_SECONDS = 0.02
#: With a cap, one pack is at most what passes in this time: a pack is paid for as a whole, then sent at full speed.
PACK_SECONDS = 2.0
_LEAST_PACK_BYTES = 1 << 20


class Pace:
    """Rates over the recent past, counting only the time in which something was being sent. Thread-safe.

    Attributes:
        plain_bytes_per_s: tensor bytes dealt with, sent or not: what estimates are made with. None: not known yet.
        sent_bytes_per_s: bytes on the wire.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at: float | None = None
        self._last = (0, 0)
        self._seconds = self._plain = self._sent = 0.0

    def begin(self, now: float) -> None:
        """A transfer begins; its counts start at zero."""
        with self._lock:
            self._at, self._last = now, (0, 0)

    def note(self, now: float, plain_bytes: int, sent_bytes: int) -> None:
        """How far the transfer is by now."""
        with self._lock:
            if self._at is None or now <= self._at:
                return
            fade = 0.5 ** ((now - self._at) / _HALF_LIFE_SECONDS)
            self._seconds = self._seconds * fade + now - self._at
            self._plain = self._plain * fade + max(0, plain_bytes - self._last[0])
            self._sent = self._sent * fade + max(0, sent_bytes - self._last[1])
            self._at, self._last = now, (plain_bytes, sent_bytes)

    @property
    def plain_bytes_per_s(self) -> float | None:
        with self._lock:
            return self._plain / self._seconds if self._seconds >= _LEAST_SECONDS and self._plain else None

    @property
    def sent_bytes_per_s(self) -> float | None:
        with self._lock:
            return self._sent / self._seconds if self._seconds >= _LEAST_SECONDS else None

    def seconds_for(self, plain_bytes: int, waiting_bytes: int = 0, cap: float | None = None) -> float | None:
        """How long it will take to deal with so many tensor bytes and to send so many that are ready.

        Args:
            plain_bytes: Of them, the recent share will have to be sent.
            waiting_bytes: Frames that only have to be sent.
            cap: Most bytes a second.

        Returns:
            None: not known yet.
        """
        with self._lock:
            seconds, plain, sent = self._seconds, self._plain, self._sent
        if seconds < _LEAST_SECONDS or not plain:
            return None
        working = plain_bytes * seconds / plain
        rates = [rate for rate in (sent / seconds, cap) if rate]
        if not rates:
            return None if waiting_bytes else working
        share = min(1.0, (sent + waiting_bytes) / plain)
        return max(working, (plain_bytes * share + waiting_bytes) / min(rates))


def cap_at(config: StoreConfig, local_time: datetime) -> float | None:
    """Bytes a second an upload may use at this time of day; None: as many as there are."""
    if not config.upload_schedule:
        return config.upload_bytes_per_s
    now = local_time.strftime("%H:%M")
    entries = sorted(config.upload_schedule)
    earlier = [cap for begin, cap in entries if begin <= now]
    # Before the first entry of the day, the last one of the day before still holds.
    return earlier[-1] if earlier else entries[-1][1]


def pack_bytes(config: StoreConfig, cap: float | None) -> int:
    """Size of packs under this cap: small enough that their bursts are short."""
    if cap is None:
        return config.pack_bytes
    return min(config.pack_bytes, max(_LEAST_PACK_BYTES, int(cap * PACK_SECONDS)))
