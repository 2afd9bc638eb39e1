"""What is being read is not deleted meanwhile: readers share a lock on a checkpoint, who deletes wants it alone.

The lock is a flock on the root manifest, so the kernel drops it with its holder and no crash leaves one behind. Where a
file system has none, readers do without: what is gone from under them comes from a remote. There, a deleted save's
chunks stay for gc's grace of a day, which no read outlasts, so readers announce nothing and need no right to write.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptstore.errors import LockedError
from ckptstore.repo import names
from ckptstore.repo.durable import READ_FLAGS, raise_for_errno

#: flock's ways to say that there are no locks here.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Hold:
    """Keeps the checkpoint in this directory from being deleted until it is released. Never blocks, never raises."""

    def __init__(self, path: Path) -> None:
        self._fd: int | None = None
        try:
            fd = os.open(path / names.MANIFEST, READ_FLAGS)
        except OSError:
            return  # not complete, and so nothing that retention looks at; or gone already
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._fd = fd
        except OSError:
            os.close(fd)

    def release(self) -> None:
        """Let it go; idempotent. A forked child's copy of the lock goes with it."""
        fd, self._fd = self._fd, None
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody reads the checkpoint in this directory, and nobody begins to.

    Raises:
        LockedError: somebody reads it. Trying again later can help.
    """
    try:
        # Writable, though nothing is written: where flock is made of byte-range locks, only such a descriptor gets it.
        fd = os.open(path / names.MANIFEST, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
            raise_for_errno(error, f"can't tell whether {path.name} is being read")
        yield  # not complete, so no reader holds it
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{path.name} is being read", hint="it can be deleted once that has ended", path=str(path)
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(fd)
