"""What stores behind S3 and OSS have in common: how a body is written once, read exactly, and sent in parts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ckptstore.blob.address import Address
from ckptstore.blob.base import Attempts, BlobStore, Buffer
from ckptstore.blob.keys import check_key
from ckptstore.blob.multipart import Part, parts_of, send_parts
from ckptstore.blob.ranges import exact_range, past_the_end
from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
    IntegrityError,
    NotFoundError,
    StorageError,
    TransientError,
)

MIB = 1 << 20
#: A pack of the usual 64 MiB, and the frame that closed it, go in one request: packs are sent side by side anyway.
SINGLE_PUT_BYTES = 80 * MIB
PART_BYTES = 16 * MIB
DELETE_BATCH = 1000
_PARTS_IN_FLIGHT = 4


def md5_base64(payload: bytes | bytearray) -> str:
    """A body's Content-MD5."""
    return base64.b64encode(hashlib.md5(payload, usedforsecurity=False).digest()).decode()


@dataclass(frozen=True)
class Reading:
    """An answer whose body has not been read yet."""

    status: int
    size_bytes: int
    read: Callable[[], bytes]


class BucketStore(BlobStore):
    """A prefix of a bucket; a dialect says how each request is made.

    Args:
        address: The URL, taken apart.
        params: Parameters of the URL that the dialect knows.
        attempts: How the single requests of multi-request operations are made.
        single_put_bytes: Larger bodies are sent in parts.
        part_bytes: Least size of a part.
    """

    def __init__(
        self, address: Address, params: frozenset[str], attempts: Attempts, single_put_bytes: int, part_bytes: int
    ) -> None:
        self._bucket, self._prefix = address.bucket_and_prefix(params)
        self.url = address.url
        self._attempts = attempts
        self._single_put_bytes = single_put_bytes
        self._part_bytes = part_bytes
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        name = self._prefix + check_key(key)
        body = memoryview(data).cast("B")
        is_large = len(body) > self._single_put_bytes
        is_conditional = if_absent and self.capabilities.conditional_put
        # A large body's condition is checked by its last request: ask first, before all the others.
        if if_absent and (is_large or not is_conditional) and self.head(key) is not None:
            raise CheckpointExistsError(f"{self.url}: {key} exists already", key=key, bucket=self._bucket)
        if is_large:
            self._put_in_parts(key, name, body, is_conditional)
        else:
            self._put_whole(key, name, data, is_conditional)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        name = self._prefix + check_key(key)
        what = f"{self.url}: {key}"
        if length == 0:
            exact_range(self._size(key), start, 0, what=what)
            return b""
        byte_range = None
        if start or length is not None:
            byte_range = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        try:
            with self._reading(key, name, byte_range) as answer:
                if byte_range is not None and answer.status != 206:
                    raise StorageError(f"{what}: the server ignores ranges", hint="use a server that honours them")
                if length is not None and answer.size_bytes != length:
                    raise past_the_end(what, start, length, start + answer.size_bytes)
                if length is None and max_bytes is not None and answer.size_bytes > max_bytes:
                    raise IntegrityError(
                        f"{what} has {answer.size_bytes} bytes or more, over the limit of {max_bytes}", key=key
                    )
                content = answer.read()
        except StorageError as error:
            if error.context.get("code") != "InvalidRange" and error.context.get("status") != 416:
                raise
            first, last = exact_range(self._size(key), start, length, what=what)
            if first == last:
                return b""
            raise TransientError(
                f"{what} changed its size while it was read", reason="server_error", key=key
            ) from error
        if len(content) != answer.size_bytes:
            raise TransientError(
                f"{what} was cut off after {len(content)} of {answer.size_bytes} bytes", reason="cut_off", key=key
            )
        return content

    def delete(self, keys: Sequence[str]) -> None:
        names = [self._prefix + check_key(key) for key in keys]
        for first in range(0, len(names), DELETE_BATCH):
            batch = names[first : first + DELETE_BATCH]
            self._attempts("delete", lambda batch=batch: self._delete_batch(batch))  # type: ignore[misc]

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()
        self._disconnect()

    # -- requests of the dialect; names are keys with the prefix ----------------------------------------------------

    @abstractmethod
    def _put_whole(self, key: str, name: str, data: Buffer, is_conditional: bool) -> None:
        """Write the object in one request, under a checksum."""

    @abstractmethod
    def _reading(self, key: str, name: str, byte_range: str | None) -> AbstractContextManager[Reading]:
        """Ask for an object or a range of it; the answer is closed at the end of the ``with``."""

    @abstractmethod
    def _delete_batch(self, names: Sequence[str]) -> None:
        """Delete these, in one request."""

    @abstractmethod
    def _begin(self, key: str, name: str, is_conditional: bool) -> str:
        """Begin an upload in parts; its id."""

    @abstractmethod
    def _send(self, key: str, name: str, upload: str, number: int, payload: bytes) -> Any:
        """Send one part; what has to be said of it in the end."""

    @abstractmethod
    def _join(
        self, key: str, name: str, upload: str, sent: Sequence[Any], body: memoryview, is_conditional: bool
    ) -> None:
        """Make the parts an object."""

    @abstractmethod
    def _is_joined(self, key: str, name: str, sent: Sequence[Any], body: memoryview) -> bool:
        """Whether the object that is there consists of these parts."""

    @abstractmethod
    def _abort(self, name: str, upload: str) -> None:
        """Forget the parts; that they are gone already is fine."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close connections; a later request connects anew."""

    # -- parts -------------------------------------------------------------------------------------------------------

    def _put_in_parts(self, key: str, name: str, body: memoryview, is_conditional: bool) -> None:
        upload = self._attempts("put", lambda: self._begin(key, name, is_conditional))

        def send(part: Part) -> Any:
            payload = bytes(body[part.start : part.stop])
            return self._attempts("put", lambda: self._send(key, name, upload, part.number, payload))

        try:
            sent = send_parts(parts_of(len(body), self._part_bytes), send, self._part_pool())
            self._complete(key, name, upload, sent, body, is_conditional)
        except BaseException as error:
            with contextlib.suppress(CkptError):  # the failure itself matters more; gc finds what stays behind
                self._attempts("abort", lambda: self._abort(name, upload))
            if isinstance(error, StorageError) and error.context.get("code") == "NoSuchUpload":
                raise TransientError(
                    f"could not write {key}: its upload was aborted by somebody", reason="cut_off", key=key
                ) from error  # another one can succeed
            raise

    def _complete(
        self, key: str, name: str, upload: str, sent: Sequence[Any], body: memoryview, is_conditional: bool
    ) -> None:
        """Join the parts. If an answer was lost, the object itself says whether it was ours that was joined."""
        is_uncertain = False

        def request() -> None:
            nonlocal is_uncertain
            try:
                self._join(key, name, upload, sent, body, is_conditional)
            except StorageError as error:
                if is_uncertain and self._is_joined(key, name, sent, body):
                    return
                is_uncertain = is_uncertain or isinstance(error, TransientError)
                raise

        self._attempts("put", request)

    def _part_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_PARTS_IN_FLIGHT, thread_name_prefix=f"ckptstore-{self.scheme}-part")
            return self._pool

    def _size(self, key: str) -> int:
        info = self.head(key)
        if info is None:
            raise NotFoundError(f"there is no object {key} in {self.url}", key=key, bucket=self._bucket)
        return info.size_bytes
