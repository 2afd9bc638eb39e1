"""Pages of shared memory: mapped where large ones fit, brought without changing what is in them."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptstore.agent import pages
from ckptstore.agent.pages import LARGE_PAGE, Pages, map_shared

SIZE = 12 * LARGE_PAGE + 4096


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("x")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [1, 4096, LARGE_PAGE - 1, LARGE_PAGE, SIZE])
def test_a_mapping_is_the_file_and_goes_with_its_last_view(fd: int, size: int) -> None:
    inode = os.fstat(fd).st_ino
    first, second = map_shared(fd, size), map_shared(fd, size)
    assert len(first) == size
    first[size - 1 :] = b"!"
    assert second[size - 1 :] == b"!" == os.pread(fd, 1, size - 1)
    part = first[size // 2 :]
    del first, second
    gc.collect()
    assert part[-1:] == b"!"
    assert _mappings(inode) == 1
    del part
    gc.collect()
    assert _mappings(inode) == 0


def _mappings(inode: int) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[4] == str(inode) and "memfd:x" in line for line in lines)


def test_a_large_mapping_begins_where_a_large_page_can(fd: int) -> None:
    memory = map_shared(fd, SIZE)
    assert pages.address_of(memory) % LARGE_PAGE == 0


def test_what_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as raised:
            map_shared(fd, SIZE)  # for writing
        assert raised.value.errno == errno.EACCES
    finally:
        os.close(fd)


def test_bringing_pages_changes_nothing(fd: int) -> None:
    memory = map_shared(fd, SIZE)
    memory[5 << 20 : (5 << 20) + 5] = b"hello"
    memory[-1:] = b"!"
    bringing = Pages(memory)
    bringing.bring_all()
    if bringing.are_there:  # Linux 5.14
        assert os.fstat(fd).st_blocks * 512 >= SIZE
    assert bytes(memory[5 << 20 : (5 << 20) + 5]) == b"hello"
    assert bytes(memory[-1:]) == b"!"
    assert not any(memory[: 5 << 20])
    assert not any(memory[(5 << 20) + 5 : -1])


def test_bringing_pages_stops_when_told_to_and_goes_on_from_there(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []
    monkeypatch.setattr(Pages, "bring", lambda _, start, end: brought.append(start) or True)
    answers = [False, True]
    bringing = Pages(map_shared(fd, SIZE))
    every = bringing.steps()
    bringing.bring_all(lambda: answers.pop(0))
    assert (brought, answers, bringing.are_there) == ([0], [], False)
    assert bringing.steps() == every[1:]
    bringing.bring_all()
    assert bringing.are_there
    bringing.bring_all()
    assert brought == [start for start, _ in every]


def test_what_somebody_else_has_brought_is_not_brought_again(fd: int) -> None:
    bringing = Pages(map_shared(fd, SIZE))
    bringing.note_all()
    bringing.bring_all()
    assert os.fstat(fd).st_blocks == 0


def test_free_large_pages_are_those_of_the_poorest_node(tmp_path: Path) -> None:
    table = tmp_path / "buddyinfo"
    row = "Node {}, zone {:>8} 9 9 9 9 9 9 9 9 9 {} {}\n"
    table.write_text(row.format(0, "DMA", 0, 1) + row.format(0, "Normal", 5, 3) + row.format(1, "Normal", 2, 1))
    assert pages.free_large_pages(table) == 4
    assert pages.free_large_pages(tmp_path / "absent") == 0
    table.write_text("something else\n")
    assert pages.free_large_pages(table) == 0


class Kernel:
    """Answers madvise, each time it is asked for large pages as told and after so long, and notes what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, float]) -> None:
        self.answers, self.asked, self.now, self.free = list(answers), [], 0.0, 1000
        monkeypatch.setattr(pages, "_advise", self)
        monkeypatch.setattr(pages, "free_large_pages", lambda: self.free)
        monkeypatch.setattr(pages.time, "perf_counter", lambda: self.now)

    def __call__(self, memory: memoryview, advice: int) -> int:
        self.asked.append("large" if advice == pages._MADV_COLLAPSE else "small")
        if self.asked[-1] == "small":
            return 0
        code, seconds = self.answers.pop(0)
        self.now += seconds
        return code

    def bring(self, fd: int) -> int:
        """How often large pages were asked for, in three steps."""
        Pages(map_shared(fd, SIZE)).bring_all()
        assert self.asked.count("small") == 4  # whatever came of it; the last step is too short for a large page
        return self.asked.count("large")


def test_large_pages_are_asked_for_as_long_as_they_come(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    assert Kernel(monkeypatch, (0, 0.001), (errno.EAGAIN, 0.001), (0, 0.001)).bring(fd) == 3


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM, errno.EBUSY])
def test_a_kernel_that_has_none_is_asked_once(monkeypatch: pytest.MonkeyPatch, fd: int, code: int) -> None:
    assert Kernel(monkeypatch, (code, 0.001)).bring(fd) == 1


def test_they_are_given_up_where_they_come_slowly_twice(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    assert Kernel(monkeypatch, (0, 0.020), (0, 0.020)).bring(fd) == 2
    assert Kernel(monkeypatch, (0, 0.020), (0, 0.001), (0, 0.020)).bring(fd) == 3


def test_none_is_asked_for_where_the_kernel_would_have_to_move_memory(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    kernel = Kernel(monkeypatch, (0, 0.001))
    kernel.free = 64
    assert kernel.bring(fd) == 0


def test_a_large_buffer_is_aligned_and_writable() -> None:
    buffer = pages.large_buffer(3 * LARGE_PAGE + 5)
    if buffer is not None:  # the kernel has large pages
        assert len(buffer) == 3 * LARGE_PAGE + 5
        assert pages.address_of(buffer) % LARGE_PAGE == 0
        buffer[-3:] = b"abc"
        assert bytes(buffer[-4:]) == b"\0abc"


@pytest.mark.parametrize("said", ["always madvise [never]\n", None])
def test_no_buffer_where_the_kernel_has_no_large_pages(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_FOR_PROCESSES", tmp_path / "enabled")
    if said is not None:
        (tmp_path / "enabled").write_text(said)
    assert pages.large_buffer(LARGE_PAGE) is None
