"""Staging: exactly the pieces' bytes, exactly in their places."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import threading
import time
from concurrent.futures import thread as executors
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore.agent.pages import Pages
from ckptstore.dcp import stage as stage_module
from ckptstore.dcp.binder import Binder, bind
from ckptstore.dcp.pause import no_collections
from ckptstore.dcp.planner import plan
from ckptstore.dcp.portions import Copy, run
from ckptstore.dcp.stage import Stage, _portions, copy_pieces
from ckptstore.format.stock import layout
from ckptstore.store.fence import Fence


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_in_its_place_and_nothing_else_is_touched(threads: int) -> None:
    state = {
        "big": torch.randn(3000, 3000), "odd": torch.randn(7, 5).t(), "half": torch.randn(9).bfloat16(),
        "conj": torch.randn(4, dtype=torch.complex64).conj(), "empty": torch.zeros(0), "scalar": torch.tensor(3),
        "long": torch.randn(6_000_000), "row": torch.randn(1, 5_000_000),
    }  # fmt: skip
    binding = bind(state)
    made = plan(binding)
    places = layout(made.pieces)
    image = bytearray(b"\xaa" * places.image_bytes)
    assert copy_pieces(made, binding, image, places.starts, threads) == sum(p.size_bytes for p in made.pieces)
    untouched = bytearray(image)
    for piece, start in zip(made.pieces, places.starts, strict=True):
        expected = state[piece.fqn].resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert image[start : start + piece.size_bytes] == expected, piece.fqn
        untouched[start : start + piece.size_bytes] = b"\xaa" * piece.size_bytes
    assert untouched == b"\xaa" * places.image_bytes


def test_each_copy_shows_the_values_of_its_own_call() -> None:
    model = nn.Linear(4, 4)
    binder = Binder()
    made = plan(binder.bind({"m": model}))
    places = layout(made.pieces)
    stage = Stage(made, places.starts)
    images = [bytearray(places.image_bytes), bytearray(places.image_bytes)]
    seen = []
    for number in range(4):
        model.weight = nn.Parameter(torch.full((4, 4), float(number)))
        stage.copy(binder.bind({"m": model}), images[number % 2])
        start = places.starts[made.indexes[0]]
        seen.append(torch.frombuffer(images[number % 2], dtype=torch.float32, offset=start, count=1).item())
    assert seen == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("size", [3, 5_000_000])
def test_an_image_can_be_unmapped_once_the_stage_forgets_it(size: int) -> None:
    binding = bind({"x": torch.ones(size)})
    made = plan(binding)
    places = layout(made.pieces)
    image = mmap.mmap(-1, places.image_bytes)
    stage = Stage(made, places.starts)
    stage.copy(binding, image, 2)
    stage.forget()
    image.close()
    assert image.closed


def test_a_long_copy_brings_the_pages_that_are_not_there() -> None:
    binding = bind({"m": nn.BatchNorm1d(5_000_000), "n": torch.ones(3)})
    made = plan(binding)
    places = layout(made.pieces)
    memory = mmap.mmap(-1, places.image_bytes)
    stage, pages = Stage(made, places.starts), Pages(memory)
    params, plain = ({i for i, t in enumerate(binding.tensors) if t.kind == kind} for kind in ("param", "plain"))
    stage.copy(binding, memory, only=plain, pages=pages)
    assert not pages.are_there, "few bytes bring their own"
    stage.copy(binding, memory, 2, only=params, pages=pages)
    assert pages.are_there
    start = places.starts[made.indexes.index(next(i for i, t in enumerate(binding.tensors) if t.kind == "param"))]
    assert torch.frombuffer(memory, dtype=torch.float32, offset=start, count=5_000_000).sum().item() == 5_000_000


def _large() -> tuple[list[torch.Tensor], list[Copy]]:
    """Targets, and copies into them that are worth several threads."""
    sources = [torch.full((5_000_000,), float(i + 1)) for i in range(4)]
    targets = [torch.zeros_like(source) for source in sources]
    return targets, [Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]


def _is_copied(targets: list[torch.Tensor]) -> bool:
    return all(bool((target == i + 1).all()) for i, target in enumerate(targets))


@pytest.mark.parametrize("fails_in", ["caller", "other"])
def test_nobody_is_copying_any_more_when_a_copy_has_failed(fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the arena would be given back, and a source freed, while a thread still uses them."""
    caller, begun, release = threading.current_thread(), threading.Event(), threading.Event()
    busy: set[threading.Thread] = set()

    def copy(*_: Any, **__: Any) -> None:
        me = threading.current_thread()
        if (me is caller) == (fails_in == "caller"):
            begun.wait(30)
            release.set()
            raise RuntimeError("no")
        busy.add(me)
        begun.set()
        release.wait(30)
        time.sleep(0.2)  # whoever doesn't wait is found out
        busy.discard(me)

    monkeypatch.setattr(stage_module, "_copy_blocks", copy)
    with pytest.raises(RuntimeError, match="no"):
        run(_portions(_large()[1]), 2)
    assert not busy


def test_memory_that_a_parameter_gives_up_during_an_overlapping_copy_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(5000, 2000)
    model.weight.data.fill_(7.0)
    binding = bind({"m": model})
    made = plan(binding)
    places = layout(made.pieces)
    image, real = bytearray(places.image_bytes), stage_module._copy_blocks

    def copy(*arguments: Any, **options: Any) -> None:
        model.weight.data = torch.zeros(1)
        real(*arguments, **options)

    monkeypatch.setattr(stage_module, "_copy_blocks", copy)
    if (child := os.fork()) == 0:  # which may crash
        torch.set_num_threads(1)
        Stage(made, places.starts).copy(binding, image, 1, set(made.indexes))
        start = places.starts[[p.fqn for p in made.pieces].index("m.weight")]
        copied = torch.frombuffer(image, dtype=torch.float32, offset=start, count=10_000_000)
        os._exit(0 if bool((copied == 7.0).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupt_waits_for_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, begun, ended = threading.current_thread(), threading.Event(), threading.Event()

    def copy(*_: Any, **__: Any) -> None:
        if threading.current_thread() is caller:
            begun.wait(30)
            return
        begun.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.set()

    monkeypatch.setattr(stage_module, "_copy_blocks", copy)
    with pytest.raises(KeyboardInterrupt):
        run(_portions(_large()[1][:1]), 2)
    assert ended.is_set()


def test_everything_is_copied_when_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's end, which waits for a copy in the background."""
    targets, copies = _large()
    monkeypatch.setattr(executors, "_shutdown", True)
    run(_portions(copies), 4)
    assert _is_copied(targets)


def test_a_forked_child_copies_collects_and_steps_on_its_own() -> None:
    targets, copies = _large()
    run(_portions(copies), 3)
    fence, release = Fence(), threading.Event()
    fence.run(lambda: assert_released(release))
    with no_collections():
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                torch.set_num_threads(1)  # torch's own threads are not there either
                for target in targets:
                    target.zero_()
                run(_portions(copies), 3)
                fence.wait()
                os._exit(0 if _is_copied(targets) and gc.isenabled() else 1)
            finally:
                os._exit(2)
        assert not gc.isenabled()
    release.set()
    assert gc.isenabled()
    assert os.waitpid(child, 0)[1] == 0
    fence.close()


def assert_released(release: threading.Event) -> None:
    assert release.wait(120)
