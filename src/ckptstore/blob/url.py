"""URL -> store. Each scheme's module, and with it its SDK, is imported when a URL first names it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore.blob.address import Address, parse_address
from ckptstore.blob.base import Attempts, BlobStore, once
from ckptstore.errors import ConfigError

if TYPE_CHECKING:
    from ckptstore.blob.retry import Retrier, Retry
    from ckptstore.blob.throttle import Throttle

#: Other packages offer a scheme here: its name -> a callable (url, environ) -> BlobStore.
ENTRY_POINT_GROUP = "ckptstore.blob_stores"

_OURS = ("file", "mem", "oss", "s3")


def open_blob_store(
    url: str,
    *,
    environ: Mapping[str, str] | None = None,
    retry: bool | Retrier = True,
    on_retry: Callable[[Retry], None] | None = None,
    throttle: Throttle | None = None,
) -> BlobStore:
    """Open the store a URL names. Free and local: no request is made, no SDK is loaded before the first operation.

    Args:
        url: ``s3://bucket/prefix?endpoint=..&region=..``, ``oss://bucket/prefix?..``, ``file:///abs/path`` or
            ``mem://name``. Never with credentials in it.
        environ: Where credentials, region and endpoint are looked up; ``os.environ`` when None. It is read again when
            the server says that credentials have expired, so a mapping that is kept current keeps the store working.
        retry: Try again after transient failures (True: the default policy), or don't.
        on_retry: Told of each failure that is tried again; with ``retry=True``.
        throttle: A budget of bytes and requests, which several stores may share.

    Raises:
        ConfigError: not a store's URL, an unknown scheme or parameter, credentials in the URL, or a missing extra.
    """
    address = parse_address(url)
    if retry is False:
        return _throttled(_open(address, environ, once), throttle)
    from ckptstore.blob.retry import Retrier, RetryingBlobStore

    attempts = Retrier(on_retry=on_retry) if retry is True else retry
    return RetryingBlobStore(_throttled(_open(address, environ, attempts), throttle), attempts)


def _throttled(store: BlobStore, throttle: Throttle | None) -> BlobStore:
    if throttle is None:
        return store
    from ckptstore.blob.throttle import ThrottledBlobStore

    return ThrottledBlobStore(store, throttle)


def _open(address: Address, environ: Mapping[str, str] | None, attempts: Attempts) -> BlobStore:
    if address.scheme == "s3":
        from ckptstore.blob.s3 import S3BlobStore

        return S3BlobStore.from_address(address, environ=environ, attempts=attempts)
    if address.scheme == "oss":
        from ckptstore.blob.oss import OSSBlobStore

        return OSSBlobStore.from_address(address, environ=environ, attempts=attempts)
    if address.scheme == "file":
        from ckptstore.blob.local import LocalBlobStore

        return LocalBlobStore.from_address(address)
    if address.scheme == "mem":
        from ckptstore.blob.memory import MemoryBlobStore

        return MemoryBlobStore.from_address(address)
    return _open_foreign(address, environ)


def _open_foreign(address: Address, environ: Mapping[str, str] | None) -> BlobStore:
    from importlib.metadata import entry_points

    offered = entry_points(group=ENTRY_POINT_GROUP)
    for entry in offered:
        if entry.name == address.scheme:
            store: object = entry.load()(address.url, environ)
            if not isinstance(store, BlobStore):
                raise ConfigError(f"{entry.value} did not return a BlobStore for {address.url}", url=address.url)
            return store
    known = ", ".join(sorted({*_OURS, *(entry.name for entry in offered)}))
    raise address.refuse(f"has the unknown scheme {address.scheme!r}", hint=f"known: {known}")


def between_processes(url: str) -> str:
    """The URL by which several processes of this machine see the same objects.

    ``mem://name`` lives in one process; trainer, agent and command line share it as a folder in shared memory, which
    is gone at the next boot. Every other URL is itself.

    Raises:
        ConfigError: not a store's URL.
    """
    address = parse_address(url)
    if address.scheme != "mem":
        return url
    shared = Path("/dev/shm")  # noqa: S108  not a temporary file: memory that processes share
    folder = (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"ckptstore-mem-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else", hint="use file:///a/folder/of/yours instead of mem://")
    return f"file://{folder}/{url.removeprefix('mem://').strip('/').replace('/', '.')}"
