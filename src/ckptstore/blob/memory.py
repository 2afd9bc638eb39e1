"""Objects in this process's memory: ``mem://name``, for tests and for trying things out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ckptstore.blob.address import Address
from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo
from ckptstore.blob.keys import check_key, check_prefix
from ckptstore.blob.ranges import exact_range
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import CheckpointExistsError, IntegrityError, NotFoundError


@dataclass
class _Space:
    """One name's objects; every store opened by that name shares it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, tuple[bytes, datetime]] = field(default_factory=dict)


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


class MemoryBlobStore(BlobStore):
    """A prefix of a named space that lives as long as the process.

    Args:
        name: Stores of one name share their objects.
        prefix: "" or ending in ``/``.
    """

    scheme = "mem"

    def __init__(self, name: str, prefix: str = "", *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.url = f"mem://{name}/{prefix}".rstrip("/")
        self._prefix = prefix
        self._clock = clock
        with _spaces_lock:
            self._space = _spaces.setdefault(name, _Space())

    @classmethod
    def from_address(cls, address: Address) -> MemoryBlobStore:
        """Open ``mem://name[/prefix]``."""
        name, prefix = address.bucket_and_prefix(())
        return cls(name, prefix)

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        name = self._prefix + check_key(key)
        body = bytes(data)
        with self._space.lock:
            if if_absent and name in self._space.objects:
                raise CheckpointExistsError(f"{self.url}/{key} exists already", key=key, url=self.url)
            self._space.objects[name] = (body, self._clock.now())

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        body, _ = self._object(key)
        if length is None and max_bytes is not None and len(body) - start > max_bytes:
            raise IntegrityError(f"{self.url}/{key} has {len(body)} bytes, more than {max_bytes}", key=key)
        first, last = exact_range(len(body), start, length, what=f"{self.url}/{key}")
        return body[first:last]

    def head(self, key: str) -> ObjectInfo | None:
        try:
            body, modified = self._object(key)
        except NotFoundError:
            return None
        return ObjectInfo(key, len(body), modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        full = self._prefix + check_prefix(prefix)
        with self._space.lock:
            found = [
                ObjectInfo(name[len(self._prefix) :], len(body), modified)
                for name, (body, modified) in self._space.objects.items()
                if name.startswith(full)
            ]
        yield from found

    def delete(self, keys: Sequence[str]) -> None:
        names = [self._prefix + check_key(key) for key in keys]
        with self._space.lock:
            for name in names:
                self._space.objects.pop(name, None)

    def _object(self, key: str) -> tuple[bytes, datetime]:
        with self._space.lock:
            found = self._space.objects.get(self._prefix + check_key(key))
        if found is None:
            raise NotFoundError(f"there is no object {self.url}/{key}", key=key, url=self.url)
        return found
