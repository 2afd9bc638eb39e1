"""Work on many bytes, shared by a few threads in portions of about one size, so that they end together."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

#: What a thread takes at once: long copies are cut here, and short ones put together.
PORTION_BYTES = 8 << 20


class Copy(NamedTuple):
    """One tensor to copy into another of the same shape."""

    target: torch.Tensor
    source: torch.Tensor
    size_bytes: int


def cut(copies: Iterable[Copy]) -> Iterable[Copy]:
    """The same copies, long ones cut: as they lie in memory if they can be, else along their first dimension."""
    for copy in copies:
        target, source, size = copy
        if size > PORTION_BYTES and source.is_contiguous() and target.is_contiguous():
            target, source = target.view(-1), source.view(-1)
        rows = source.shape[0] if source.dim() else 1
        if size <= PORTION_BYTES or rows == 1:
            yield copy
            continue
        step = max(1, rows * PORTION_BYTES // size)
        for row in range(0, rows, step):
            part = target[row : row + step]
            yield Copy(part, source[row : row + step], part.nbytes)


_Sized = TypeVar("_Sized", bound=tuple[Any, Any, int])


def grouped(copies: Iterable[_Sized]) -> Iterator[list[_Sized]]:
    """Neighbours put together until they are a portion; each ends with its size."""
    group: list[_Sized] = []
    size = 0
    for copy in copies:
        group.append(copy)
        size += copy[2]
        if size >= PORTION_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def run(portions: Iterable[Callable[[], object]], threads: int) -> None:
    """Do it all; each thread takes the next portion when it has done one, so that they end together."""
    work = deque(portions)

    def take_turns() -> None:
        while True:
            try:
                portion = work.popleft()
            except IndexError:
                return
            portion()

    others = _start(min(threads, len(work)) - 1, take_turns)
    try:
        take_turns()
    finally:
        work.clear()  # after a failure nobody begins another
        _outlast(others)  # on return nobody writes into the image any more, nor reads what the caller may free
    for other in others:
        other.result()


_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None


def _start(count: int, work: Callable[[], None]) -> list[Future[None]]:
    """So many threads at ``work``; fewer where there are none to be had, as when the interpreter is about to end.

    They stay between saves: starting them costs as much as a small save.
    """
    global _pool
    started: list[Future[None]] = []
    if count < 1:
        return started
    with _lock:
        if _pool is None or _pool[0] < count:
            if _pool is not None:
                _pool[1].shutdown(wait=False)
            _pool = (count, ThreadPoolExecutor(count, thread_name_prefix="ckptstore-copy"))
        with suppress(RuntimeError):
            started.extend(_pool[1].submit(work) for _ in range(count))
    return started


def _outlast(others: Sequence[Future[None]]) -> None:
    """Wait for them whatever happens; an interrupt is raised afterwards."""
    interrupt: BaseException | None = None
    while not all(other.done() for other in others):
        try:
            wait(others)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _forget_in_child() -> None:
    """A forked child has none of our threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
