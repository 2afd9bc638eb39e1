"""Copying a plan's pieces into the arena: the one pass over the bytes that a save makes.

The arena is the image of the shard file, so each piece's place is known and a copy is all there is. The C kernels copy
plain memory; ``Tensor.copy_`` does strides, conjugation and devices. Both release the GIL, so several threads share the
work.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from ckptstore import native
from ckptstore.agent.pages import Pages
from ckptstore.dcp.binder import Binding
from ckptstore.dcp.boxes import copyable
from ckptstore.dcp.planner import Plan
from ckptstore.dcp.walk import Kind

#: Below this a second thread costs more than it saves.
_BYTES_PER_THREAD = 8 << 20
#: What a thread takes at once: long copies are cut here, so that threads end together, and short ones put together.
_PORTION_BYTES = 8 << 20

#: (address to, address from, bytes)
Block: TypeAlias = tuple[int, int, int]

#: Where the kernels that change a state are queued.
Streams: TypeAlias = Mapping[torch.device, "torch.cuda.Stream"]


class _Copy(NamedTuple):
    target: torch.Tensor
    source: torch.Tensor
    size_bytes: int


def copy_pieces(plan: Plan, binding: Binding, image: Any, starts: Sequence[int], threads: int = 1) -> int:
    """Copy every piece of ``plan`` to its place in ``image`` once; see :meth:`Stage.copy`."""
    return Stage(plan, starts).copy(binding, image, threads)


class Stage:
    """Where a plan's pieces go; keeps its views of each image it was used with, since making them costs as much as
    copying small tensors. Not thread-safe.

    The views pin the image: :meth:`forget` lets go of it before it is unmapped.

    Args:
        plan: what to copy.
        starts: first byte of each piece in an image, in ``plan.pieces`` order, as ``format.stock.layout`` gives them.
    """

    def __init__(self, plan: Plan, starts: Sequence[int]) -> None:
        self._plan = plan
        self._starts = tuple(starts)
        self._targets: dict[int, tuple[list[torch.Tensor], list[int]]] = {}
        self._present: set[int] = set()  # images whose pages are there
        self._total = 0

    def copy(
        self,
        binding: Binding,
        image: Any,
        threads: int = 1,
        kinds: Collection[Kind] | None = None,
        streams: Streams | None = None,
    ) -> int:
        """Copy every piece to its place in ``image``; all bytes are there when this returns.

        Args:
            binding: of the structure the plan was made for.
            image: a writable buffer, the image of the shard file.
            threads: upper bound; small totals are copied by the caller alone.
            kinds: copy only tensors of these kinds; None: all.
            streams: as :func:`streams_of` gave them where training runs; needed by another thread, which has its own.

        Returns:
            Bytes copied.
        """
        locals_ = binding.locals
        targets, indexes = self._views(binding, image)
        total = self._total
        if kinds is not None:
            chosen = [(t, i) for t, i in zip(targets, indexes, strict=True) if binding.tensors[i].kind in kinds]
            targets, indexes = [t for t, _ in chosen], [i for _, i in chosen]
            total = sum(target.nbytes for target in targets)
        sources = [copyable(locals_[i]) for i in indexes]
        if kinds is not None:
            # Training may go on meanwhile: who gives a parameter other memory must not take ours away.
            sources = [source.detach() for source in sources]
        threads = min(threads, max(1, total // _BYTES_PER_THREAD))
        if total >= _BYTES_PER_THREAD:
            self._bring_pages(image, threads)
        with torch.no_grad():
            if any(source.is_cuda for source in sources):
                copies = [_Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]
                on_devices = [copy for copy in copies if copy.source.is_cuda]
                _copy_from_cuda(on_devices, streams_of(binding) if streams is None else streams)
                _run(_portions([copy for copy in copies if not copy.source.is_cuda]), threads)
            elif total >= _BYTES_PER_THREAD:
                _run(_portions([_Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]), threads)
            elif targets:
                torch._foreach_copy_(targets, sources)
        return total

    def forget(self) -> None:
        """Release all images seen so far."""
        self._targets.clear()
        self._present.clear()

    def _bring_pages(self, image: Any, threads: int) -> None:
        """Nobody has touched this memory before its first long copy: its pages come in large parts, not one by one."""
        address = torch.frombuffer(image, dtype=torch.uint8).data_ptr()
        if address not in self._present:
            pages = Pages(image)
            _run([partial(pages.bring, start, end) for start, end in pages.steps()], threads)
            self._present.add(address)

    def _views(self, binding: Binding, image: Any) -> tuple[list[torch.Tensor], list[int]]:
        """Where the pieces with any bytes go in ``image``, and their places in the binding."""
        whole = torch.frombuffer(image, dtype=torch.uint8)
        views = self._targets.get(whole.data_ptr())
        if views is None:
            targets: list[torch.Tensor] = []
            indexes: list[int] = []
            for index, start in zip(self._plan.indexes, self._starts, strict=True):
                bound = binding.tensors[index]
                size = bound.size_bytes
                if size:
                    target = whole[start : start + size].view(bound.torch_dtype).view(bound.local_shape)
                    targets.append(copyable(target))
                    indexes.append(index)
            self._total = sum(target.nbytes for target in targets)
            views = self._targets[whole.data_ptr()] = (targets, indexes)
        return views


def _run(portions: Iterable[Callable[[], object]], threads: int) -> None:
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


def _portions(copies: list[_Copy]) -> Iterator[Callable[[], None]]:
    """The work, in parts of about the size that is taken at once; the longest single ones first."""
    blocks: list[Block] = []
    tensors: list[_Copy] = []
    for target, source, size in copies:
        if native.is_available() and _is_plain(source):
            blocks.append((target.data_ptr(), source.data_ptr(), size))
        else:
            tensors.append(_Copy(target, source, size))
    for part in _grouped(sorted(_cut(tensors), key=lambda c: -c.size_bytes)):
        yield partial(_copy_tensors, part)
    for some in _grouped(_cut_blocks(blocks)):
        yield partial(_copy_blocks, some)


_Sized = TypeVar("_Sized", bound=tuple[Any, Any, int])


def _grouped(copies: Iterable[_Sized]) -> Iterator[list[_Sized]]:
    group: list[_Sized] = []
    size = 0
    for copy in copies:
        group.append(copy)
        size += copy[2]
        if size >= _PORTION_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _copy_tensors(copies: Sequence[_Copy]) -> None:
    with torch.no_grad():  # the mode is per thread
        torch._foreach_copy_([c.target for c in copies], [c.source for c in copies])


def _copy_blocks(blocks: Sequence[Block]) -> None:
    targets, sources, sizes = zip(*blocks, strict=True)
    native.copy(targets, sources, sizes)


def _is_plain(source: torch.Tensor) -> bool:
    """Whether its numbers are the host memory's bytes from first to last."""
    return source.is_cpu and source.is_contiguous() and not source.is_conj() and not source.is_neg()


def _cut_blocks(blocks: Iterable[Block]) -> Iterator[Block]:
    for target, source, size in blocks:
        for at in range(0, size, _PORTION_BYTES):
            yield target + at, source + at, min(_PORTION_BYTES, size - at)


def _cut(copies: Iterable[_Copy]) -> Iterable[_Copy]:
    """The same copies, long ones cut along their first dimension."""
    for copy in copies:
        target, source, size = copy
        rows = source.shape[0] if source.dim() else 1
        if size <= _PORTION_BYTES or rows == 1:
            yield copy
            continue
        step = max(1, rows * _PORTION_BYTES // size)
        for row in range(0, rows, step):
            part = target[row : row + step]
            yield _Copy(part, source[row : row + step], part.nbytes)


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


def streams_of(binding: Binding) -> Streams:
    """The stream that this thread's work is queued on, for each CUDA device of the state."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no type for it
        return {}
    devices = {local.device for local in binding.locals if local.is_cuda}
    return {device: torch.cuda.current_stream(device) for device in devices}


def _copy_from_cuda(copies: list[_Copy], streams: Streams) -> None:
    """A side stream moves slices into two pinned buffers in turn while the host empties the other one.

    The side stream first waits for the work queued so far, so it reads the state as of the call, and the main stream is
    made to wait for the last read, so no later kernel overwrites what is not read yet.
    """
    by_device: dict[torch.device, list[_Copy]] = {}
    for copy in _cut(copies):
        by_device.setdefault(copy.source.device, []).append(copy)
    for device, on_device in by_device.items():
        main = streams[device]
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        largest = max(copy.size_bytes for copy in on_device)
        buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(min(2, len(on_device)))]
        in_flight: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = []
        for i, copy in enumerate(on_device):
            if len(in_flight) == len(buffers):
                _land(*in_flight.pop(0))
            pinned = buffers[i % len(buffers)][: copy.size_bytes].view(copy.target.dtype).view(copy.target.shape)
            with torch.cuda.stream(side):
                pinned.copy_(copy.source, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(side)
            in_flight.append((copy.target, pinned, done))
        for waiting in in_flight:
            _land(*waiting)
        main.wait_stream(side)


def _land(target: torch.Tensor, pinned: torch.Tensor, done: torch.cuda.Event) -> None:
    done.synchronize()
    target.copy_(pinned)
