"""A store that moves no more bytes a second than it may, and fewer while the server says that it is too much."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo, Trait
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import TransientError

_LEAST_SHARE = 1 / 64
_RECOVERY_PER_REQUEST = 1.05


class Throttle:
    """A budget of bytes a second and of requests at a time. Thread-safe; several stores may share one.

    A body is paid for before it is sent or after it came, in one sum, so the rate holds on average, not within one
    body. A throttling answer halves the concurrency and the rate; each success gives a little back.

    Args:
        bytes_per_s: None: as fast as it goes.
        concurrency: None: as many requests as there are threads.
    """

    def __init__(
        self, bytes_per_s: float | None = None, concurrency: int | None = None, *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        if (bytes_per_s is not None and bytes_per_s <= 0) or (concurrency is not None and concurrency < 1):
            raise ValueError("a throttle lets something through")
        self._bytes_per_s = bytes_per_s
        self._concurrency = concurrency
        self._clock = clock
        self._share = 1.0
        self._paid_until = clock.monotonic()
        self._num_running = 0
        self._changed = threading.Condition()

    def limit(self, bytes_per_s: float | None) -> None:
        """Another rate from now on; what was paid for earlier keeps its time."""
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError("a throttle lets something through")
        self._bytes_per_s = bytes_per_s

    @property
    def share(self) -> float:
        """How much of the budget is used at present, from 1/64 to 1."""
        return self._share

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request; waits for its turn and learns from its failure."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._num_running += 1
        try:
            yield
        except TransientError as error:
            if error.context.get("reason") == "throttled":
                self._share = max(_LEAST_SHARE, self._share / 2)
            raise
        else:
            self._share = min(1.0, self._share * _RECOVERY_PER_REQUEST)
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def pay(self, num_bytes: int) -> None:
        """Wait until bytes paid for earlier have had their time, then owe these."""
        rate = self._bytes_per_s
        if rate is None or num_bytes <= 0:
            return
        with self._changed:
            now = self._clock.monotonic()
            begin = max(now, self._paid_until)
            self._paid_until = begin + num_bytes / (rate * self._share)
        if begin > now:
            self._clock.sleep(begin - now)

    def _has_room(self) -> bool:
        if self._concurrency is None:
            return True
        return self._num_running < max(1, int(self._concurrency * self._share))


class ThrottledBlobStore(BlobStore):
    """A store under a throttle. Goes *inside* a RetryingBlobStore, so that each attempt pays."""

    def __init__(self, inner: BlobStore, throttle: Throttle) -> None:
        self.inner = inner
        self._throttle = throttle
        self.url = inner.url
        self.scheme = inner.scheme
        self.capabilities = inner.capabilities

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        self._throttle.pay(memoryview(data).nbytes)
        with self._throttle.request():
            self.inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        self._throttle.pay(length or 0)
        with self._throttle.request():
            body = self.inner.get(key, start=start, length=length, max_bytes=max_bytes)
        self._throttle.pay(len(body) - (length or 0))
        return body

    def head(self, key: str) -> ObjectInfo | None:
        with self._throttle.request():
            return self.inner.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        with self._throttle.request():
            self.inner.delete(keys)

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        with self._throttle.request():
            return self.inner.abort_uploads(prefix, older_than)

    def deletion_rules(self) -> builtins.list[str]:
        with self._throttle.request():
            return self.inner.deletion_rules()

    def traits(self, key: str) -> builtins.list[Trait]:
        with self._throttle.request():
            return self.inner.traits(key)

    def close(self) -> None:
        self.inner.close()
