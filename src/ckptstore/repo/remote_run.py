"""The objects of one run in one object store: its prefix, documents that are created once, and news.

*News* spares committers the listings: whoever puts something into a folder that others must hear of puts a fresh mark
under one known name afterwards. An unchanged mark means that nothing has come since one looked last.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal

from pydantic import Field

from ckptstore.blob.base import BlobStore, ObjectInfo
from ckptstore.clock import SYSTEM_CLOCK, Clock, new_nonce
from ckptstore.errors import (
    CheckpointExistsError,
    ConflictError,
    FormatError,
    NoStoreError,
    NotFoundError,
    StorageError,
)
from ckptstore.format.manifest import (
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    MAX_SUMMARY_BYTES,
    Document,
    Marker,
    check_run_name,
    strong_digest,
)
from ckptstore.repo.remote_names import MARKER


class News(Document):
    """Overwritten each time: ``mark`` is never used twice."""

    format: Literal["ckptstore"] = "ckptstore"
    version: int = Field(default=FORMAT_VERSION, ge=1)
    mark: str
    names: tuple[str, ...] = ()
    """What was in the folder by then, as far as whoever wrote this cares to say."""


class RemoteRun:
    """One run in one object store. Thread-safe. Opening costs no request.

    Args:
        blob: The store; retries and throttling are its wrappers' business.
        run: The run; it need not exist yet.
        name: What users call this remote.
        clock: Measures how old something remembered is.
    """

    def __init__(self, blob: BlobStore, run: str, name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self.blob = blob
        self.run = check_run_name(run)
        self.name = name
        self._prefix = f"runs/{run}/"
        self._clock = clock
        self._lock = threading.Lock()
        self._is_created = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.blob.url!r}, run={self.run!r}, name={self.name!r})"

    # --- the store itself

    def exists(self) -> bool:
        """Whether a store is there (its marker is); one GET.

        Raises:
            NoStoreError: not even the bucket is there, which a mistyped URL is the likeliest reason for.
            FormatError: the store is of a newer version, or the marker isn't ours.
        """
        try:
            data = self.blob.get(MARKER, max_bytes=MAX_SUMMARY_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return False
        Marker.decode(data, what=f"{MARKER} of {self.blob.url}", max_bytes=MAX_SUMMARY_BYTES)
        return True

    def create(self) -> None:
        """Make sure the store and this run are there; free after the first time.

        Raises:
            FormatError: a newer ckptstore made this store; nothing was written.
            NoStoreError: the bucket is missing; buckets are never created.
        """
        if self._is_created:
            return
        if not self.exists():
            self._create_once(MARKER, Marker.ours().encode())
        self._create_empty(f"names/{self.run}")
        self._is_created = True

    # --- exact keys of this run, and what lies under them

    def list_keys(self, folder: str) -> dict[str, ObjectInfo]:
        """Objects below one folder of the run, by key below the run's prefix; foreign names too."""
        found = self.blob.list(f"{self._prefix}{folder}/")
        return {info.key.removeprefix(self._prefix): info for info in found}

    def has(self, key: str) -> bool:
        """Whether this key of the run is there: asked of the object itself, not of a listing."""
        return self.blob.head(self._prefix + key) is not None

    def create_document(self, key: str, data: bytes) -> None:
        """Write a document of gc once."""
        self._create_once(self._prefix + key, data)

    def remove_keys(self, keys: Sequence[str]) -> None:
        """Delete exactly these keys of the run; absent ones are fine."""
        self.blob.delete([self._prefix + key for key in keys])

    # --- news

    def news(self, folder: str) -> News | None:
        """The last news of this folder; None when there never was any. One GET.

        News only saves listings. Damaged ones are news without a word: everybody looks, and gc announces all anew.

        Raises:
            FormatError: of a newer version.
        """
        try:
            data = self._get(f"news/{folder}.json", MAX_MANIFEST_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return None
        try:
            return News.decode(data, what=f"news of {folder} on {self.name}")
        except FormatError as error:
            if error.hint is not None:
                raise
            return News(mark=strong_digest(data))

    def put_news(self, folder: str, names: Collection[str] = ()) -> None:
        """Let everybody know that this folder has something new; after it is there."""
        news = News(mark=new_nonce(), names=tuple(sorted(names)))
        self.blob.put(f"{self._prefix}news/{folder}.json", news.encode())

    # --- inside

    def _get(self, name: str, max_bytes: int) -> bytes:
        return self.blob.get(self._prefix + name, max_bytes=max_bytes)

    def _create_empty(self, key: str) -> None:
        """Create an object whose name says it all."""
        with suppress(CheckpointExistsError):
            self.blob.put(key, b"", if_absent=True)

    def _create_once(self, key: str, data: bytes) -> None:
        """Create, or find exactly these bytes there: the answer to our own request may have been lost."""
        try:
            self.blob.put(key, data, if_absent=True)
        except CheckpointExistsError:
            if self.blob.get(key, max_bytes=MAX_MANIFEST_BYTES) != data:
                raise ConflictError(
                    f"{key} on {self.name} holds other bytes than ours", tier=self.name, key=key
                ) from None


def modified(info: ObjectInfo) -> datetime:
    """The server's time of an object: the only clock gc trusts.

    Raises:
        StorageError: the server does not tell.
    """
    if info.modified is None:
        raise StorageError(f"the server does not tell when {info.key} was written", key=info.key)
    return info.modified
