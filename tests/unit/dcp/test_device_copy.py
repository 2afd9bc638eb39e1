"""Copies from devices, with a device whose work is done as late as it may be."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptstore.dcp.device_copy import copy_from_devices, streams_of
from ckptstore.dcp.portions import PORTION_BYTES, Copy

#: A device that is there everywhere, and a stream that nothing is queued on.
STREAMS: Any = {torch.device("cpu"): "main"}


class LateDevice:
    """Does nothing of what is queued before somebody waits for it, and notes how it is used."""

    def __init__(self) -> None:
        self.lanes: list[LateLane] = []

    def lane(self, main: Any) -> Any:
        self.lanes.append(LateLane(main))
        return self.lanes[-1]


class LateLane:
    def __init__(self, main: Any) -> None:
        self.main = main
        self.buffers: list[torch.Tensor] = []
        self.queued: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        self.is_over = False
        self.threads: set[int] = set()

    def buffer(self, size_bytes: int) -> torch.Tensor:
        self.buffers.append(torch.full((size_bytes,), 99, dtype=torch.uint8))
        return self.buffers[-1]

    def fetch(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Any:
        assert not self.is_over
        assert not torch.is_grad_enabled()
        self.threads.add(threading.get_ident())
        self.queued.append((targets, sources))
        until = self.queued[-1]

        def synchronize() -> None:
            while any(each is until for each in self.queued):
                for target, source in zip(*self.queued.pop(0), strict=True):
                    target.copy_(source)

        return SimpleNamespace(synchronize=synchronize)

    def end(self) -> None:
        self.is_over = True


def copies_of(sources: Sequence[torch.Tensor]) -> list[Copy]:
    targets = [torch.zeros(s.shape, dtype=s.dtype) for s in sources]
    return [Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]


def is_copied(copies: Sequence[Copy]) -> bool:
    return all(torch.equal(copy.target, copy.source) for copy in copies)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_tensor_arrives_when_buffers_are_used_again_and_again(threads: int) -> None:
    sources = [
        torch.randn(1, 5 * PORTION_BYTES // 4, requires_grad=True),  # one long row
        torch.randn(3000, 2500).t(),
        *(torch.randn(n) for n in range(1, 400)),
        torch.tensor(3.0, dtype=torch.float64),
        torch.randn(11, dtype=torch.complex64).conj(),
        torch.arange(7, dtype=torch.bfloat16),
        torch.randn(PORTION_BYTES // 2 + 3),
    ]
    copies, device = copies_of(sources), LateDevice()
    copy_from_devices(copies, STREAMS, threads, device.lane)
    assert is_copied(copies)
    assert all(lane.is_over and lane.main == "main" and not lane.queued for lane in device.lanes)
    assert len(device.lanes) == threads
    used = sum(buffer.nbytes for lane in device.lanes for buffer in lane.buffers)
    assert all(len(lane.buffers) <= 2 for lane in device.lanes)
    assert used <= threads * 2 * 2 * PORTION_BYTES + (1 << 20)


def test_a_single_small_tensor_takes_one_small_buffer() -> None:
    copies, device = copies_of([torch.arange(5)]), LateDevice()
    copy_from_devices(copies, STREAMS, 4, device.lane)
    assert is_copied(copies)
    (lane,) = device.lanes
    assert [buffer.nbytes for buffer in lane.buffers] == [64]


def test_a_failure_leaves_no_kernel_free_to_change_what_is_being_read() -> None:
    class FailingLane(LateLane):
        def fetch(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Any:
            if self.queued:
                raise RuntimeError("CUDA error")
            return super().fetch(targets, sources)

    lanes: list[FailingLane] = []

    def lane(main: Any) -> Any:
        lanes.append(FailingLane(main))
        return lanes[-1]

    copies = copies_of([torch.randn(PORTION_BYTES // 4) for _ in range(3)])
    with pytest.raises(RuntimeError, match="CUDA error"):
        copy_from_devices(copies, STREAMS, 1, lane)
    assert lanes[0].is_over


def test_copies_in_the_background_know_the_streams_of_the_thread_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: torch.device) -> Any:
        return SimpleNamespace(device=device, is_cuda=device.type == "cuda")

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    binding: Any = SimpleNamespace(locals=[on(first), on(torch.device("cpu")), on(second), on(first)])
    assert streams_of(binding) == {}  # no CUDA in use, and none is started
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert streams_of(binding) == {first: "stream of cuda:0", second: "stream of cuda:1"}


if torch.cuda.is_available():

    @pytest.mark.parametrize("size", [3, 5 * PORTION_BYTES // 4])
    def test_a_cuda_tensor_is_read_as_of_the_call_and_before_what_comes_later(size: int) -> None:
        source = torch.zeros(size, device="cuda")
        target = torch.zeros(size)
        binding: Any = SimpleNamespace(locals=[source])
        for number in range(1, 6):
            source.fill_(number)
            copy_from_devices([Copy(target, source, target.nbytes)], streams_of(binding), 2)
            source.fill_(-1)
            assert bool((target == number).all())
