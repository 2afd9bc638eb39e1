"""The contract of an object store, in seven methods.

Keys are relative to the store's own prefix: ``/``-joined segments of ``[A-Za-z0-9._-]``, none of them ``.`` or ``..``.
A store never overwrites silently: names are written once. Nothing here retries; :mod:`ckptstore.blob.retry` wraps.

Errors, for every method:
    NotFoundError: the object (or, as NoStoreError with ``context['bucket']``, the bucket) is proven absent.
    CredentialsError: refused for credentials or rights. Permanent.
    TransientError: unreachable, throttled, cut off, timed out. Trying again can help. ``context['retry_after_s']``
        where the server said so; ``context['reason']`` is one of unreachable, throttled, timeout, server_error,
        cut_off, damaged, expired (credentials: worth one more try, since the next request reads them anew).
    NoSpaceError: quota or disk full. Permanent until somebody makes room.
    ConfigError: the bucket's or client's configuration can't be right. Permanent.
    StorageError: anything else the server refused. Permanent.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Attempts(Protocol):
    """How one request of an operation that takes many (parts, pages, batches) is made: once, or again if it fails.

    With one that retries, a failed part or page costs that part or page, not the whole operation.
    """

    def __call__(self, op: str, request: Callable[[], T]) -> T:
        """Make the request, perhaps several times, and return its answer."""


def once(op: str, request: Callable[[], T]) -> T:
    """The Attempts that tries once."""
    del op
    return request()


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of one object."""

    key: str
    size_bytes: int
    modified: datetime | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a store can do, so that callers never guess.

    Attributes:
        conditional_put: ``put(if_absent=True)`` is atomic among concurrent writers.
    """

    conditional_put: bool = True


@dataclass(frozen=True)
class Trait:
    """One thing that a store's server turned out to be like: is it right, and what to do where it isn't.

    Attributes:
        name: ``TLS``, ``addressing`` or ``checksums``.
    """

    name: str
    is_right: bool
    detail: str
    fix: str | None = None


def transport(endpoint: str) -> Trait:
    """How bytes travel to this endpoint, which has been reached before."""
    parts = urlsplit(endpoint)
    if parts.scheme == "https":
        return Trait("TLS", True, f"{parts.hostname} has shown a certificate that holds")
    if parts.hostname in ("localhost", "127.0.0.1", "::1"):
        return Trait("TLS", True, "plain HTTP that does not leave this machine")
    return Trait("TLS", False, f"{parts.hostname} is spoken to in clear text", f"use endpoint=https://{parts.netloc}")


class BlobStore(ABC):
    """One prefix of one bucket (or folder). Thread-safe. Not to be used across a fork."""

    #: URL without secrets, for messages and records.
    url: str
    #: ``s3``, ``oss``, ``file`` or ``mem``.
    scheme: str
    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Store one object, durably and visibly once this returns; readers see all of it or nothing.

        Large bodies are sent in parts. The bytes on the wire are covered by a checksum the server verifies, where it
        can.

        Args:
            key: Name below this store's prefix.
            data: Whole body; not modified, not kept after return.
            if_absent: Create only. If an object is there already, raise CheckpointExistsError and change nothing.
                A store without ``capabilities.conditional_put`` checks first, which is not atomic.

        Raises:
            CheckpointExistsError: ``if_absent`` and the key exists. May be our own earlier request whose answer was
                lost: callers compare bytes before they call it a conflict.
        """

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        """Read an object or a byte range of it, whole or not at all.

        Args:
            key: Name below this store's prefix.
            start: First byte.
            length: Number of bytes; exactly so many are returned. None: to the end.
            max_bytes: Refuse larger answers before reading them (only without ``length``).

        Raises:
            NotFoundError: no such object.
            IntegrityError: the range reaches past the object's end, or the object exceeds ``max_bytes``.
            TransientError: the body was cut off.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of one object; None when it is proven absent."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in any order, paging as needed.

        Foreign objects, whose names are no keys, are passed over.
        An error in mid-listing raises: a listing that ends normally is complete. An existing bucket without such
        objects yields nothing; a missing bucket raises NoStoreError.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete exactly these keys; absent ones are fine. Raises if any of them may still be there."""

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        """Abort multipart uploads below ``prefix`` begun before ``older_than``; returns how many. Default: none."""
        del prefix, older_than
        return 0

    def deletion_rules(self) -> builtins.list[str]:
        """Rules of the bucket that delete or freeze objects of this store by age, a sentence each. Default: none."""
        return []

    def traits(self, key: str) -> builtins.list[Trait]:
        """What the server is like, once it has been reached; may write the scratch object ``key``. Default: nothing."""
        del key
        return []

    def close(self) -> None:  # noqa: B027  most stores hold nothing
        """Release connections; idempotent. Default: nothing to release."""
