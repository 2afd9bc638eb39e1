"""The pages under shared memory: where it is mapped, and how its pages come before a copy needs them.

Pages, not copying, are what a first save costs, and one of 2 MiB costs little more than one of 4 KiB. The kernel gives
shared memory small ones unless an administrator says otherwise, but whoever has mapped it may ask for large ones.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore.agent.libc import libc

PAGE = mmap.PAGESIZE
#: Of nearly all processors that have large pages; elsewhere the kernel refuses, and small ones it is.
LARGE_PAGE = 2 << 20

_FOR_PROCESSES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: What is brought at once.
_STEP = 8 << 20

# Source: the kernel's include/uapi/asm-generic/mman-common.h
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

#: Small pages come faster than this. Large ones that don't are such as a hypervisor has to find memory for first, and
#: copies into them have proved slower, too.
_LEAST_BYTES_PER_SECOND = 1e9
_SLOW_STEPS = 2

#: Large pages are taken only where so many lie about: to make some, the kernel moves other memory, training's too.
_LEFT_ALONE = 64
#: Blocks of the kernel's free memory that hold a large page: of 2 ** 9 pages, and larger ones.
_LARGE_ORDER = 9


def map_shared(fd: int, size_bytes: int) -> memoryview:
    """The first bytes of a file, shared and writable, where large pages fit; unmapped with the last view into it."""
    if size_bytes < LARGE_PAGE:
        return memoryview(mmap.mmap(fd, size_bytes))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = memoryview(mmap.mmap(-1, size_bytes + LARGE_PAGE, flags=flags))
    start = -address_of(room) % LARGE_PAGE
    view = room[start : start + size_bytes]
    flags, protection = mmap.MAP_SHARED | _MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
    if libc().mmap(address_of(view), size_bytes, protection, flags, fd, 0) != address_of(view):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return view


def large_buffer(size_bytes: int) -> memoryview | None:
    """Memory of this process in large pages, aligned to them; None where the kernel gives none."""
    with suppress(OSError, ValueError):
        if "[never]" in _FOR_PROCESSES.read_text():
            return None
        room = mmap.mmap(-1, size_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(mmap.MADV_HUGEPAGE)
        start = -address_of(memoryview(room)) % LARGE_PAGE
        return memoryview(room)[start : start + size_bytes]
    return None


class Pages:
    """Brings the pages under a writable buffer, without changing what is in them; best effort. Thread-safe.

    Large pages are taken where they come at least as fast as small ones.

    Args:
        memory: the buffer; best from :func:`map_shared`.
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memoryview(memory).cast("B")
        self._lock = threading.Lock()
        self._wants_large = True
        self._slow_steps = 0
        self._done = 0

    @property
    def are_there(self) -> bool:
        """Whether all were brought."""
        return self._done >= len(self._memory)

    def steps(self) -> list[tuple[int, int]]:
        """(start, end) of the parts left to bring, so that threads can share them and one can stop between."""
        size = len(self._memory)
        return [(start, min(start + _STEP, size)) for start in range(self._done, size, _STEP)]

    def bring(self, start: int, end: int) -> bool:
        """Make these pages present in one go; False where the kernel can't, so that the first copy pays."""
        part = self._memory[start:end]
        if self._wants_large and len(part) >= LARGE_PAGE and free_large_pages() > _LEFT_ALONE:
            part[::LARGE_PAGE].tobytes()  # the kernel joins pages, so there must be one
            began = time.perf_counter()
            code = _advise(part, _MADV_COLLAPSE)
            self._judge(code, len(part) / (time.perf_counter() - began))
        return _advise(part, _MADV_POPULATE_WRITE) == 0

    def bring_all(self, must_stop: Callable[[], bool] = lambda: False) -> None:
        """Bring them all, unless told to stop between two steps. Goes on where it stopped."""
        for start, end in self.steps():
            if must_stop() or not self.bring(start, end):
                return
            self._done = max(self._done, end)

    def note_all(self) -> None:
        """Somebody has brought all :meth:`steps`, or touched all the memory."""
        self._done = len(self._memory)

    def _judge(self, code: int, bytes_per_second: float) -> None:
        """Whether to ask for large pages again."""
        with self._lock:
            self._slow_steps = max(0, self._slow_steps + (1 if bytes_per_second < _LEAST_BYTES_PER_SECOND else -1))
            if self._slow_steps >= _SLOW_STEPS or code not in (0, errno.EAGAIN):
                self._wants_large = False


def free_large_pages(buddyinfo: Path = Path("/proc/buddyinfo")) -> int:
    """At least how many large pages the poorest memory node can give at once; 0 where the kernel doesn't tell."""
    free: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in buddyinfo.read_text().splitlines():
            words = line.split()  # Node 0, zone Normal 5 3 ...: free blocks of one page, of two, of four
            counts = [int(word) for word in words[4:]]
            free[words[1]] = free.get(words[1], 0) + sum(n << i for i, n in enumerate(counts[_LARGE_ORDER:]))
    return min(free.values(), default=0)


def _advise(memory: memoryview, advice: int) -> int:
    """madvise for all pages that the buffer touches; 0 or the error's number."""
    start = address_of(memory) // PAGE * PAGE
    length = address_of(memory) + len(memory) - start
    while libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) != 0:
        if ctypes.get_errno() != errno.EINTR:
            return ctypes.get_errno()
    return 0


def address_of(memory: memoryview) -> int:
    """Where a writable buffer lies."""
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(memory))
