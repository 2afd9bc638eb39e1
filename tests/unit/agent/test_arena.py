"""Generations: who may have them when, and what is in them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.agent import arena
from ckptstore.agent.arena import Slot, State, available_memory, gaps
from ckptstore.errors import LockedError, NoSpaceError, TransientError
from ckptstore.format import stock
from ckptstore.format.stock import PieceSpec


def spec(fqn: str, elements: int, dtype: str = "float32") -> PieceSpec:
    return PieceSpec(fqn, dtype, (elements,), (0,), (elements,), False)


PIECES = [spec("a", 100_000), spec("b", 3, "bfloat16"), spec("c", 0), spec("d", 20_000)]
OWNER = object()


@pytest.fixture
def slot() -> Slot:
    slot = Slot(threading.Condition(threading.RLock()), "run", 0)
    slot.owner = OWNER
    return slot


@given(st.lists(st.integers(0, 40_000), max_size=6))
def test_gaps_and_payloads_cover_the_image_exactly(sizes: list[int]) -> None:
    pieces = [spec(f"p{i}", size, "int8") for i, size in enumerate(sizes)]
    layout = stock.layout(pieces)
    payload = [(start, start + p.size_bytes) for start, p in zip(layout.starts, pieces, strict=True) if p.size_bytes]
    covered = sorted([*gaps(layout, pieces), *payload])
    at = 0
    for start, end in covered:
        assert start == at < end
        at = end
    assert at == layout.image_bytes


def test_memory_is_laid_out_as_the_file_when_it_held_something_else_before(slot: Slot) -> None:
    _, generations = slot.configure(OWNER, PIECES, 2, 1)
    for generation in generations:
        generation.memory[:] = b"\xff" * len(generation.memory)
    pieces = [spec("x", 90_000), spec("y", 7, "int8"), spec("z", 30_000)]
    layout, again = slot.configure(OWNER, pieces, 2, 1)
    assert [g.fd for g in again] == [g.fd for g in generations], "warm pages were given away"
    expected = bytearray(layout.image_bytes)
    for offset, data in stock.layout(pieces).segments:
        expected[offset : offset + len(data)] = data
    for generation in again:
        for start, end in gaps(layout, pieces):
            assert generation.memory[start:end] == expected[start:end]


def test_memory_grows_in_place_and_is_given_back_when_far_too_large(slot: Slot) -> None:
    _, first = slot.configure(OWNER, [spec("a", 10_000)], 2, 1)
    fds = [os.fstat(g.fd).st_ino for g in first]
    _, grown = slot.configure(OWNER, [spec("a", 2_000_000)], 2, 1)
    assert [os.fstat(g.fd).st_ino for g in grown] == fds
    assert all(os.fstat(g.fd).st_size == g.capacity_bytes == len(g.memory) for g in grown)
    _, small = slot.configure(OWNER, [spec("a", 10)], 2, 1)
    assert not {os.fstat(g.fd).st_ino for g in small} & set(fds)
    with pytest.raises(PermissionError):
        os.ftruncate(small[0].fd, 0)


def test_the_same_layout_costs_nothing(slot: Slot) -> None:
    first = slot.configure(OWNER, PIECES, 2, 1)
    first[1][0].memory[0:4] = b"same"
    assert slot.configure(OWNER, PIECES, 2, 1) == first
    assert first[1][0].memory[0:4] == b"same"


def test_a_generation_is_free_filling_sealed_free(slot: Slot) -> None:
    slot.configure(OWNER, PIECES, 2, 1)
    assert (slot.reserve(OWNER, 0), slot.reserve(OWNER, 0), slot.reserve(OWNER, 0.01)) == (0, 1, None)
    assert slot.filling(1).state is State.FILLING
    slot.release(OWNER, 0)
    with pytest.raises(LockedError, match="not reserved"):
        slot.filling(0)
    with pytest.raises(LockedError):
        slot.filling(2)
    assert slot.reserve(OWNER, 0, "0123456789ab-1") == 0
    assert slot.generations[0].save_id == "0123456789ab-1"


def test_reserving_waits_until_one_is_free(slot: Slot) -> None:
    slot.configure(OWNER, PIECES, 1, 1)
    assert slot.reserve(OWNER, 0) == 0
    threading.Timer(0.1, slot.release, (OWNER, 0)).start()
    begun = time.monotonic()
    assert slot.reserve(OWNER, 10) == 0
    assert time.monotonic() - begun < 5


def test_only_the_owner_is_served(slot: Slot) -> None:
    slot.configure(OWNER, PIECES, 2, 1)
    other = object()
    for deed in (
        lambda: slot.reserve(other, 0),
        lambda: slot.release(other, 0),
        lambda: slot.configure(other, PIECES, 2, 1),
    ):
        with pytest.raises(LockedError, match="taken over"):
            deed()
    assert slot.reserve(OWNER, 0) == 0
    assert slot.reserve(OWNER, 0) == 1
    waiting = threading.Timer(0.1, lambda: (setattr(slot, "owner", other), _notify(slot)))
    waiting.start()
    with pytest.raises(LockedError):
        slot.reserve(OWNER, 10)


def _notify(slot: Slot) -> None:
    with slot._condition:
        slot._condition.notify_all()


def test_a_new_layout_waits_and_gives_up_when_a_generation_stays_busy(slot: Slot) -> None:
    slot.configure(OWNER, PIECES, 2, 1)
    assert slot.reserve(OWNER, 0) == 0
    with pytest.raises(TransientError, match="still in use"):
        slot.configure(OWNER, PIECES[:1], 2, 0.05)
    assert slot.reserve(OWNER, 0) == 1, "the old layout must still serve"


def test_memory_of_an_owner_who_may_still_write_is_not_used_again(slot: Slot) -> None:
    _, old = slot.configure(OWNER, PIECES, 2, 1)
    slot.is_tainted = True
    _, new = slot.configure(OWNER, PIECES, 2, 1)
    assert not {g.fd for g in old} & {g.fd for g in new}
    assert not slot.is_tainted


def test_one_generation_is_made_when_two_do_not_fit(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_room", lambda _pid: 5 << 20 if not slot.generations else 0)
    _, generations = slot.configure(OWNER, [spec("a", 1 << 20)], 2, 1)
    assert len(generations) == 1


def test_too_little_memory_is_refused_naming_the_bytes(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_room", lambda _pid: 1000)
    with pytest.raises(NoSpaceError, match="staging needs 4202496 bytes of memory, 1000 are available"):
        slot.configure(OWNER, [spec("a", 1 << 20)], 2, 1)
    assert slot.reserve(OWNER, 0.01) is None
    monkeypatch.undo()
    slot.configure(OWNER, PIECES, 2, 1)
    assert slot.reserve(OWNER, 0) == 0


def test_the_disk_stands_in_where_memory_is_short_and_leaves_nothing(tmp_path: Path, caplog: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_room", lambda _pid: 1000)
        slot = Slot(threading.Condition(threading.RLock()), "run", 0, tmp_path)
        slot.owner = OWNER
        layout, [generation] = slot.configure(OWNER, PIECES, 2, 1)
        assert generation.is_on_disk
        assert "staging through the disk" in caplog.text
        assert os.fstat(generation.fd).st_blocks * 512 >= layout.image_bytes, "a full disk would kill the trainer"
        generation.memory[:5] = b"hello"
        with pytest.raises(NoSpaceError, match="on disk: No space left on device"):
            slot.configure(OWNER, [spec("a", 1 << 43)], 2, 1)
    assert list(tmp_path.iterdir()) == []
    assert not any(g.is_on_disk for g in slot.configure(OWNER, PIECES, 2, 1)[1]), "there is memory again"


def test_memory_lent_but_not_yet_touched_is_counted(slot: Slot) -> None:
    before = arena._room()
    slot.configure(OWNER, [spec("a", 64 << 20)], 1, 1)  # 256 MiB
    assert arena._room() < before - (128 << 20)
    assert 0 < available_memory() < 1 << 50


def test_what_was_never_sealed_is_free_when_its_owner_begins_another_save(slot: Slot) -> None:
    slot.configure(OWNER, PIECES, 2, 1)
    assert [slot.reserve(OWNER, 0, f"0123456789ab-{number}") for number in range(1, 6)] == [0] * 5
    slot.generations[0].state = State.SEALED
    assert [slot.reserve(OWNER, 0, f"0123456789ab-{number}") for number in range(6, 9)] == [1] * 3
    slot.generations[0].free()
    slot.configure(OWNER, PIECES[:2], 2, 0)  # nor does another layout wait for it
    assert [g.state for g in slot.generations] == [State.FREE, State.FREE]
    with pytest.raises(LockedError):
        slot.filling(1)
