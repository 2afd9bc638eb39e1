"""Copying from CUDA devices: through pinned buffers, on streams of their own.

A lane has two buffers: while the device fills one, the host empties the other. Several lanes share a device's work,
because one host thread empties more slowly than the device fills.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import torch

from ckptstore.dcp.binder import Binding
from ckptstore.dcp.portions import Copy, cut, grouped, run

#: Where the kernels that change a state are queued.
Streams: TypeAlias = Mapping[torch.device, "torch.cuda.Stream"]

#: Of a lane.
_BUFFERS = 2
#: Of each tensor in a buffer, enough for every dtype.
_ALIGNMENT = 64


def streams_of(binding: Binding) -> Streams:
    """The stream that this thread's work is queued on, for each CUDA device of the state."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no type for it
        return {}
    devices = {local.device for local in binding.locals if local.is_cuda}
    return {device: torch.cuda.current_stream(device) for device in devices}


class Event(Protocol):
    """A torch.cuda.Event, as far as it is used."""

    def synchronize(self) -> object:
        """Wait until what was queued before it is done."""


class Lane:
    """One side stream of a device. It reads the state as it is once the work queued so far is done.

    Args:
        main: the stream of whoever changes the state.
    """

    def __init__(self, main: torch.cuda.Stream) -> None:
        self._main = main
        self._side = torch.cuda.Stream(main.device)  # type: ignore[no-untyped-call]  # torch has no type for it
        self._side.wait_stream(main)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """Host memory that the device writes to by itself."""
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def fetch(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Event:
        """Begin to copy from the device into a buffer; the event tells when that is done."""
        with torch.cuda.stream(self._side):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no type for it
            done.record(self._side)
        return done

    def end(self) -> None:
        """Let no later kernel of the main stream change what is not read yet."""
        self._main.wait_stream(self._side)


def copy_from_devices(
    copies: Sequence[Copy], streams: Streams, threads: int, lane: Callable[[torch.cuda.Stream], Lane] = Lane
) -> None:
    """Copy tensors of CUDA devices into host memory; all bytes are there when this returns.

    Args:
        streams: as :func:`streams_of` gave them where training runs.
        threads: upper bound.
    """
    by_device: dict[torch.device, list[Copy]] = {}
    for copy in cut(copies):
        by_device.setdefault(copy.source.device, []).append(copy)
    for device, on_device in by_device.items():
        work = deque(grouped(on_device))
        # All lanes are made here: each waits for what is queued now, and for nothing later.
        lanes = [lane(streams[device]) for _ in range(min(threads, len(work)))]
        largest = max(sum(_room(copy) for copy in portion) for portion in work)
        run([partial(_drain, work, each, largest) for each in lanes], len(lanes))


def _drain(work: deque[list[Copy]], lane: Lane, buffer_bytes: int) -> None:
    """Copy portion by portion until there are none left."""
    under_way: deque[tuple[list[Copy], list[torch.Tensor], torch.Tensor, Event]] = deque()
    with torch.no_grad():  # the mode is per thread
        try:
            while work:
                try:
                    portion = work.popleft()
                except IndexError:  # another lane was quicker
                    break
                buffer = lane.buffer(buffer_bytes) if len(under_way) < _BUFFERS else _land(*under_way.popleft())
                places = _places(portion, buffer)
                under_way.append((portion, places, buffer, lane.fetch(places, [copy.source for copy in portion])))
            while under_way:
                _land(*under_way.popleft())
        finally:
            lane.end()


def _room(copy: Copy) -> int:
    return -(-copy.size_bytes // _ALIGNMENT) * _ALIGNMENT


def _places(portion: Sequence[Copy], buffer: torch.Tensor) -> list[torch.Tensor]:
    """A place in the buffer for each tensor."""
    places = []
    at = 0
    for copy in portion:
        places.append(buffer[at : at + copy.size_bytes].view(copy.target.dtype).view(copy.target.shape))
        at += _room(copy)
    return places


def _land(portion: list[Copy], places: list[torch.Tensor], buffer: torch.Tensor, done: Event) -> torch.Tensor:
    """Empty a buffer when it is full; gives it back."""
    done.synchronize()
    torch._foreach_copy_([copy.target for copy in portion], places)
    return buffer
