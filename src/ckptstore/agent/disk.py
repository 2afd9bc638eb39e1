"""One image to one file, as fast as the disk takes it and with as little CPU as possible.

O_DIRECT where the file system takes it (no page cache to evict, a thirtieth of the CPU), several blocks at a time,
since a disk with one request in its queue idles between two, and each from a buffer in large pages, since a request
is cut where it has as many pages as the disk takes at once; else buffered with ``sync_file_range``, so that the fsync
at the end finds little left to do.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable

from ckptstore import native
from ckptstore.agent.libc import libc
from ckptstore.agent.pages import address_of, large_buffer

#: One write: large, since each waits for the interpreter once.
BLOCK_BYTES = 16 << 20
#: Writes under way at a time.
DEPTH = 2
_DIRECT_ALIGNMENT = 4096
_WRITE, _WAIT = 2, 1 | 2 | 4  # Source: sync_file_range(2): WRITE; WAIT_BEFORE | WRITE | WAIT_AFTER

Range = tuple[int, int]


class Abandoned(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The save was discarded while it was being written."""


def write_image(fd: int, image: memoryview, tail: bytes, is_abandoned: Callable[[], bool]) -> None:
    """All of the image from the file's beginning, then the tail; the file is not durable yet. Blocks.

    Raises:
        Abandoned: ``is_abandoned`` said so in between.
        OSError: as the disk said; which blocks are written is unknown.
    """
    size = len(image)
    _allocate(fd, size + len(tail))
    rest: list[Range] = [(0, size)]
    if _set_direct(fd, True):
        aligned = size - size % _DIRECT_ALIGNMENT
        rest = [*_write_direct(fd, image[:aligned], is_abandoned), (aligned, size)]
        _set_direct(fd, False)
    for start, end in rest:
        _write_buffered(fd, image[:end], start, is_abandoned)
    done = 0
    while done < len(tail):
        done += os.pwrite(fd, tail[done:], size + done)


def _write_direct(fd: int, image: memoryview, is_abandoned: Callable[[], bool]) -> list[Range]:
    """Write blocks past the page cache, several at a time; returns what this file system won't take that way."""
    starts = iter(range(0, len(image), BLOCK_BYTES))
    left: list[Range] = []
    failures: list[BaseException] = []

    def work() -> None:
        buffer = large_buffer(BLOCK_BYTES) if len(image) >= BLOCK_BYTES else None
        while not left and not failures and (start := next(starts, None)) is not None:
            end = min(start + BLOCK_BYTES, len(image))
            block = image[start:end]
            try:
                if buffer is not None:
                    block = _copied(block, buffer)
                at = start + _write_block_direct(fd, block, start, is_abandoned)
            except BaseException as error:  # the other threads must stop, and the caller hear of it
                failures.append(error)
                return
            if at < end:
                left.append((at, end))

    others = [threading.Thread(target=work, name="write") for _ in range(min(DEPTH, len(image) // BLOCK_BYTES) - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    if failures:
        raise failures[0]
    return sorted([*left, *((start, min(start + BLOCK_BYTES, len(image))) for start in starts)])


def _copied(block: memoryview, buffer: memoryview) -> memoryview:
    """The block in the buffer; other threads go on meanwhile if the kernels are there."""
    if native.is_available() and not block.readonly:
        native.copy([address_of(buffer)], [address_of(block)], [len(block)])
    else:
        buffer[: len(block)] = block
    return buffer[: len(block)]


def _write_block_direct(fd: int, block: memoryview, start: int, is_abandoned: Callable[[], bool]) -> int:
    """Write the block to ``start``, or as much of it as direct writes take; returns how much that was."""
    done = 0
    while done < len(block) and done % _DIRECT_ALIGNMENT == 0:
        if is_abandoned():
            raise Abandoned
        try:
            done += write_block(fd, block[done:], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # the flag was taken, the write is not: some network and stacked file systems
    return done


def _write_buffered(fd: int, image: memoryview, at: int, is_abandoned: Callable[[], bool]) -> None:
    begun = at
    while at < len(image):
        if is_abandoned():
            raise Abandoned
        count = write_block(fd, image[at : at + BLOCK_BYTES], at)
        _sync_range(fd, at, count, _WRITE)
        if at - begun >= 2 * BLOCK_BYTES:
            _sync_range(fd, at - 2 * BLOCK_BYTES, BLOCK_BYTES, _WAIT)
        at += count


def write_block(fd: int, block: memoryview, offset: int) -> int:
    """Write some of ``block``; how much is returned. A seam of its own: tests make the disk slow or sick here."""
    return os.pwrite(fd, block, offset)


def _set_direct(fd: int, wanted: bool) -> bool:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return False
    return wanted


def _allocate(fd: int, size: int) -> None:
    """Reserve the file's blocks: a full disk is noticed before the first byte, and the file lies in one stretch.

    The raw call, because the C library's ``posix_fallocate`` writes zeros where the file system can't reserve.
    """
    if size == 0 or not hasattr(libc(), "fallocate"):
        return
    while libc().fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _sync_range(fd: int, offset: int, count: int, flags: int) -> None:
    """Start, or wait for, the writing of a range.

    An error here must be raised: having told us once, the kernel may not tell the fsync again.
    """
    if not hasattr(libc(), "sync_file_range"):
        return
    if libc().sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(count), flags) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ESPIPE):
            raise OSError(number, os.strerror(number))
