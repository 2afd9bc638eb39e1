"""Objects as files below a folder: ``file:///abs/path``, for a NAS, a second disk, and tests.

An object becomes visible by one ``link`` or ``rename`` of a file whose bytes are on the disk already, and its name is
on the disk before ``put`` returns. Names of files being written hold a ``~``, which no key can: they are never objects.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

from ckptstore.blob.address import Address
from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo
from ckptstore.blob.keys import check_key, check_prefix, is_key
from ckptstore.blob.ranges import exact_range
from ckptstore.errors import (
    CheckpointExistsError,
    CredentialsError,
    IntegrityError,
    NoSpaceError,
    NoStoreError,
    NotFoundError,
    StorageError,
    TransientError,
)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EBUSY, errno.ESTALE}
)
_READ_BYTES = 1 << 30  # Linux moves at most 2 GiB in one read or write
_TEMPORARY_AGE_S = 24 * 3600.0


class LocalBlobStore(BlobStore):
    """A folder of objects. The folder is made by the first ``put``; the folder above it must exist.

    The folder above stands for the bucket: were it made as well, a file system that isn't mounted would look like an
    empty store.

    Args:
        root: Absolute folder.
    """

    scheme = "file"

    def __init__(self, root: Path) -> None:
        self._root = root
        self.url = f"file://{root}"

    @classmethod
    def from_address(cls, address: Address) -> LocalBlobStore:
        """Open ``file:///abs/path``."""
        address.only(())
        if address.host or not address.path.startswith("/"):
            raise address.refuse("is not absolute", hint="write file:///absolute/path, with three slashes")
        root = Path(os.path.normpath(address.path))
        if root.parent == root:
            raise address.refuse("is the root folder", hint="name a folder")
        return cls(root)

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        path = self._path(key)
        temporary = path.with_name(f"{path.name[:200]}~{secrets.token_hex(6)}")
        with self._errors(f"write {path}", key, writing=True):
            if if_absent and path.exists():
                raise FileExistsError
            self._make_folder(path.parent)
            try:
                _write_durably(temporary, data)
                if if_absent:
                    _link(temporary, path)
                else:
                    os.replace(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            _sync_folder(path.parent)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        path = self._path(key)
        with self._errors(f"read {path}", key):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "not a regular file")
                if length is None and max_bytes is not None and status.st_size - start > max_bytes:
                    raise IntegrityError(f"{path} has {status.st_size} bytes, more than {max_bytes}", key=key)
                first, last = exact_range(status.st_size, start, length, what=str(path))
                return _read(descriptor, first, last, path)
            finally:
                os.close(descriptor)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            with self._errors(f"look at {path}", key):
                status = os.stat(path, follow_symlinks=False)
        except NoStoreError:
            raise
        except NotFoundError:
            return None
        return _info(key, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder, _, beginning = check_prefix(prefix).rpartition("/")
        base = self._root / folder if folder else self._root
        with self._errors(f"list {base}", prefix):
            try:
                entries = _entries(base)
            except (FileNotFoundError, NotADirectoryError):
                self._require_parent()
                return
            pending = [(folder, name, is_folder) for name, is_folder in entries if name.startswith(beginning)]
            while pending:
                above, name, is_folder = pending.pop()
                key = f"{above}/{name}" if above else name
                if not is_key(key):
                    continue
                try:
                    if is_folder:
                        pending += [(key, *entry) for entry in _entries(self._root / key)]
                        continue
                    status = os.stat(self._root / key, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # deleted meanwhile
                if stat.S_ISREG(status.st_mode):
                    yield _info(key, status)

    def delete(self, keys: Sequence[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            with self._errors(f"delete {path}", key):
                try:
                    os.unlink(path)
                except (FileNotFoundError, NotADirectoryError):
                    self._require_parent()
                    continue
                folders.add(path.parent)
        for folder in folders:
            with self._errors(f"sync {folder}", ""):
                _sync_folder(folder)

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        """Remove the temporary files that writers which died have left; those younger than a day are kept."""
        check_prefix(prefix)
        limit = min(older_than.timestamp(), datetime.now(timezone.utc).timestamp() - _TEMPORARY_AGE_S)
        removed = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                stem, tilde, nonce = name.rpartition("~")
                path = Path(folder, name)
                key = path.with_name(stem).relative_to(self._root).as_posix() if stem else ""
                if not tilde or len(nonce) != 12 or not is_key(key) or not key.startswith(prefix):
                    continue
                with self._errors(f"delete {path}", key), contextlib.suppress(FileNotFoundError):
                    if os.stat(path, follow_symlinks=False).st_mtime < limit:
                        os.unlink(path)
                        removed += 1
        return removed

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _require_parent(self) -> None:
        if not self._root.parent.is_dir():
            raise NoStoreError(
                f"the folder {self._root.parent} does not exist",
                hint="create it, or mount what should be there; only the last folder of a file:// URL is made for you",
                bucket=str(self._root.parent),
                url=self.url,
            )

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            if folder == self._root.parent:
                self._require_parent()
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            _sync_folder(path.parent)  # also when somebody else has just made it: the name must be on disk before ours

    @contextlib.contextmanager
    def _errors(self, what: str, key: str, *, writing: bool = False) -> Iterator[None]:
        """Turn an OSError into ours, naming the errno."""
        try:
            yield
        except StorageError:
            raise
        except FileExistsError:
            raise CheckpointExistsError(f"{self._root / key} exists already", key=key, url=self.url) from None
        except OSError as error:
            self._fail(error, what, key, writing)

    def _fail(self, error: OSError, what: str, key: str, writing: bool) -> NoReturn:
        code = error.errno or 0
        name = errno.errorcode.get(code, "")
        message = f"could not {what}: {error.strerror or error} [{name}]"
        context = {"key": key, "url": self.url, "errno": name}
        if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
            self._require_parent()
            if writing:
                raise StorageError(
                    message, hint="something that isn't a folder of this store stands in the way", **context
                ) from error
            raise NotFoundError(f"there is no object {self._root / key}", **context) from error
        if code in _FULL:
            raise NoSpaceError(message, hint="make room, then try again", **context) from error
        if code in _DENIED:
            raise CredentialsError(message, hint="check owner, mode and mount options", **context) from error
        if code in _PASSING:
            raise TransientError(message, reason="unreachable", **context) from error
        raise StorageError(message, **context) from error


def _entries(folder: Path) -> builtins.list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, timezone.utc))


def _write_durably(path: Path, data: Buffer) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest[:_READ_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise StorageError(
                f"could not write {target}: its file system has no hard links, which an atomic create needs",
                hint="use a file system with hard links",
                errno=errno.errorcode[error.errno],
            ) from error
        raise


def _read(descriptor: int, first: int, last: int, path: Path) -> bytes:
    if last - first <= _READ_BYTES:
        data = os.pread(descriptor, last - first, first)
        if len(data) == last - first:
            return data
    parts = bytearray()
    while len(parts) < last - first:
        part = os.pread(descriptor, min(_READ_BYTES, last - first - len(parts)), first + len(parts))
        if not part:
            raise TransientError(f"{path} became shorter while it was read", reason="cut_off")
        parts += part
    return bytes(parts)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
