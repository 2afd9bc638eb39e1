"""The file system steps everything durable is made of.

Every name is created with ``O_EXCL | O_NOFOLLOW`` (0600, directories 0700) and read with ``O_NOFOLLOW`` and a size
bound. The three kinds of fsync are functions of their own, called through this module, so that the power-cut test can
take each one out and see the loss.

A failed fsync is final for its file: the kernel may have dropped the dirty pages and the next fsync would succeed
without them. Nothing here retries; the file is removed and the caller writes a new one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ckptstore.clock import new_nonce
from ckptstore.errors import CkptError, FormatError, IntegrityError, NoSpaceError, StorageError
from ckptstore.repo import names

#: Flags of every file we create.
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Flags of every file we read; O_NONBLOCK so that a planted FIFO can't hang the reader.
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: macOS' fsync leaves data in the drive's cache; this command does not. Absent on Linux.
_FULL_FSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

_HINTS = {
    errno.ENOSPC: "free space or inodes (`df -h`, `df -i`), or move the local tier; saving goes on once there is room",
    errno.EDQUOT: "raise or clean up the disk quota; saving goes on once there is room",
    errno.EROFS: "the file system is mounted read-only; look at `dmesg`, then remount it",
    errno.EIO: "the disk reported an I/O error; look at `dmesg` before trusting it again",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner, mode and attributes (`lsattr`) of the directory",
    errno.EFBIG: "raise the file size limit (`ulimit -f`)",
}


def raise_for_errno(error: OSError, what: str, **context: Any) -> NoReturn:
    """Raise ``error`` as the class a user can act on, naming the errno.

    Args:
        error: What the operating system said. One of our own errors is raised again as it is.
        what: The deed that failed, in the form "can't write step 500".
        **context: Where it happened.

    Raises:
        NoSpaceError: ENOSPC or EDQUOT.
        FormatError: ELOOP, a symbolic link where we never make one.
        StorageError: everything else.
    """
    if isinstance(error, CkptError):
        raise error
    number = error.errno or 0
    name = errno.errorcode.get(number, "unknown errno")
    message = f"{what}: {os.strerror(number) if number else error} ({name})"
    facts: dict[str, Any] = {"errno": name, **context}
    if error.filename is not None:
        facts.setdefault("path", os.fsdecode(error.filename))
    if number in (errno.ENOSPC, errno.EDQUOT):
        raise NoSpaceError(message, hint=_HINTS[number], **facts) from error
    if number == errno.ELOOP:
        raise FormatError(f"{what}: a symbolic link is in the way (ELOOP)", **facts) from error
    raise StorageError(message, hint=_HINTS.get(number), **facts) from error


def _fsync(fd: int) -> None:
    if _FULL_FSYNC is not None:
        fcntl.fcntl(fd, _FULL_FSYNC)
    else:
        os.fsync(fd)


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, DIRECTORY_FLAGS)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def fsync_file(fd: int) -> None:
    """The file's bytes and size survive a power cut once this returns. Blocks."""
    _fsync(fd)


def fsync_dir(path: Path) -> None:
    """The names inside ``path`` survive a power cut once this returns. Blocks."""
    _fsync_directory(path)


def fsync_parent(path: Path) -> None:
    """The name ``path`` itself, or its absence, survives a power cut once this returns. Blocks."""
    _fsync_directory(path.parent)


def create_file(path: Path, flags: int = 0) -> int:
    """A descriptor of a new, empty file that no one else can have made. The caller closes it."""
    return os.open(path, CREATE_FLAGS | flags, 0o600)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte at the descriptor's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def write_new(path: Path, data: bytes) -> None:
    """Create ``path`` with ``data``, fsynced; after an error it does not exist. The name needs a directory fsync.

    Raises:
        FileExistsError: the name is taken.
        OSError: as the system said; the file is gone again.
    """
    fd = create_file(path)
    try:
        try:
            write_all(fd, data)
            fsync_file(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def write_replacing(path: Path, data: bytes) -> None:
    """Put ``data`` under ``path`` whole or not at all (new file, fsync, rename). The name needs a directory fsync."""
    temporary = path.with_name(names.temporary_file(path.name, new_nonce()))
    write_new(temporary, data)
    try:
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def make_dir(path: Path) -> bool:
    """Make one directory (0700) and its name durable; False if it is there already.

    An existing one gets its fsync as well: whoever made it may have been killed before that.

    Raises:
        FormatError: something that isn't a real directory has the name.
        OSError: as the system said.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise FormatError(f"{path} is not a directory", path=str(path)) from None
        created = False
    else:
        created = True
    fsync_parent(path)
    return created


def read_bounded(path: Path | str, max_bytes: int, *, dir_fd: int | None = None) -> bytes:
    """The whole of one regular file.

    Raises:
        FormatError: a symbolic link, not a regular file, or larger than ``max_bytes``; nothing was allocated for it.
        IntegrityError: the file changed its size while it was read.
        OSError: as the system said, FileNotFoundError included.
    """
    try:
        fd = os.open(path, READ_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path} is a symbolic link", path=str(path)) from None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file", path=str(path))
        if status.st_size > max_bytes:
            raise FormatError(f"{path} is larger than {max_bytes} bytes", path=str(path))
        parts = []
        left = status.st_size
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
        if left:
            raise IntegrityError(f"{path} was cut while it was read", path=str(path))
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a directory and all that is in it, following no link. Absent ones, also in mid-removal, are fine."""
    with suppress(FileNotFoundError):
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(Path(entry.path))
                else:
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)
        path.rmdir()
