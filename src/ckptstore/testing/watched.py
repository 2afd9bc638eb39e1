"""A blob store that tells what was asked of it, and fails where a test plans it."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo


@dataclass(frozen=True)
class Request:
    """One call: ``op`` is the method's name, ``size_bytes`` what a put sends or a ranged get wants."""

    op: str
    key: str
    size_bytes: int = 0


class WatchedBlobStore(BlobStore):
    """Keeps the contract of the store it wraps. Thread-safe.

    Attributes:
        requests: Everything asked so far, in order.

    Args:
        inner: The store.
        before: Called with each request before it is passed on; what it raises is the answer.
        after: Called when the inner store has done it; what it raises is a lost answer.
    """

    def __init__(
        self,
        inner: BlobStore,
        *,
        before: Callable[[Request], None] | None = None,
        after: Callable[[Request], None] | None = None,
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self.scheme = inner.scheme
        self.capabilities = inner.capabilities
        self.requests: builtins.list[Request] = []
        self.before = before
        self.after = after
        self._lock = threading.Lock()

    def sent_bytes(self, op: str = "put", part: str = "") -> int:
        """Bytes of all requests of this kind whose key contains ``part``."""
        return sum(request.size_bytes for request in self.requests if request.op == op and part in request.key)

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        request = self._begin(Request("put", key, memoryview(data).nbytes))
        self.inner.put(key, data, if_absent=if_absent)
        self._end(request)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        request = self._begin(Request("get", key, length or 0))
        data = self.inner.get(key, start=start, length=length, max_bytes=max_bytes)
        self._end(request)
        return data

    def head(self, key: str) -> ObjectInfo | None:
        request = self._begin(Request("head", key))
        info = self.inner.head(key)
        self._end(request)
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        request = self._begin(Request("list", prefix))
        yield from self.inner.list(prefix)
        self._end(request)

    def delete(self, keys: Sequence[str]) -> None:
        begun = [self._begin(Request("delete", key)) for key in keys]
        self.inner.delete(keys)
        for request in begun:
            self._end(request)

    def close(self) -> None:
        self.inner.close()

    def _begin(self, request: Request) -> Request:
        with self._lock:
            self.requests.append(request)
        if self.before is not None:
            self.before(request)
        return request

    def _end(self, request: Request) -> None:
        if self.after is not None:
            self.after(request)
