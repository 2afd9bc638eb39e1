"""Shared memory that the agent owns and lends: where a rank's part of a save waits for the disk.

A slot is one rank's place on this node. It has one or two generations, each a memfd laid out as the image of the shard
file to be written. A generation goes FREE -> FILLING -> SEALED -> FREE, and only a seal, sent by the slot's owner after
its last copy, makes its contents part of a save. Pages, not copying, are what fresh memory costs: the trainer that
needs them brings them, ahead or between saves if it can, and a restarted rank takes over its slot's memory as it is.

Everything here is guarded by the agent's one condition, except where it says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ckptstore.agent.memory import available_memory
from ckptstore.agent.pages import PAGE, Pages, map_shared
from ckptstore.agent.protocol import layout_id_of
from ckptstore.errors import LockedError, NoSpaceError, TransientError
from ckptstore.format import stock
from ckptstore.format.stock import Layout, PieceSpec

log = logging.getLogger("ckptstore.agent")


@dataclass(frozen=True)
class Arena:
    """What a rank is lent.

    Attributes:
        layout_id: names the layout; goes into the seal.
        starts: first payload byte of each piece, in the order given to ``layout``.
        generations: one writable shared mapping for each generation; it may be longer than the image.
        pages: of each generation, as this process has them.
        image_bytes: length of the image.
        is_on_disk: memory is short; copying goes as fast as the disk.
    """

    layout_id: str
    starts: tuple[int, ...]
    generations: tuple[memoryview, ...]
    pages: tuple[Pages, ...]
    image_bytes: int = 0
    is_on_disk: bool = False

    @classmethod
    def lent(cls, answer: Mapping[str, Any], fds: Sequence[int]) -> Arena:
        """Map what the agent has lent with this answer."""
        generations = tuple(map_shared(fd, size) for fd, size in zip(fds, answer["capacity_bytes"], strict=True))
        pages = tuple(Pages(memory) for memory in generations)
        starts = tuple(answer["starts"])
        return cls(answer["layout_id"], starts, generations, pages, answer["image_bytes"], answer["is_on_disk"])


class State(str, Enum):
    """Of a generation."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"


#: Every generation there is, over all slots: memory that is lent but not yet touched is spoken for all the same.
_alive: weakref.WeakSet[Generation] = weakref.WeakSet()
_budget = threading.Lock()


@dataclass(eq=False)
class Generation:
    """One image's worth of shared memory, or of the disk. The descriptor closes with the object."""

    index: int
    fd: int
    memory: memoryview
    capacity_bytes: int
    is_on_disk: bool = False
    state: State = State.FREE
    save_id: str | None = None
    holds: tuple[str, int] | None = None
    """(save_id, rank) whose image was sealed here last and has not been written over since, committed or not."""

    def __post_init__(self) -> None:
        _alive.add(self)

    @classmethod
    def create(cls, index: int, capacity_bytes: int) -> Generation:
        fd = os.memfd_create(f"ckptstore-{index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # It may grow but never shrink: a bug in a trainer must not become a SIGBUS here.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            os.ftruncate(fd, capacity_bytes)
            return cls(index, fd, map_shared(fd, capacity_bytes), capacity_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create_on_disk(cls, index: int, capacity_bytes: int, folder: Path) -> Generation:
        """Where memory is short: a file without a name. Its pages leave memory as fast as the disk takes them.

        Raises:
            OSError: no room for it and for the checkpoint that will be made of it, or the file system can't.
        """
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstatvfs(fd)
            if status.f_bavail * status.f_frsize < 2 * capacity_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(fd, 0, capacity_bytes)  # later a full disk would be a SIGBUS in the trainer
            return cls(index, fd, map_shared(fd, capacity_bytes), capacity_bytes, is_on_disk=True)
        except BaseException:
            os.close(fd)
            raise

    def grow(self, capacity_bytes: int) -> None:
        """Keep the pages there are, add more at the end. Only while FREE."""
        os.ftruncate(self.fd, capacity_bytes)
        self.memory = map_shared(self.fd, capacity_bytes)
        self.capacity_bytes = capacity_bytes

    def free(self) -> None:
        self.state, self.save_id = State.FREE, None

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Slot:
    """One rank's place: its owner, its layout, its generations.

    Args:
        condition: the agent's; methods take it themselves.
        run, index: name of the slot.
        folder: on the disk that stands in when memory is short; None: nothing does.
    """

    def __init__(self, condition: threading.Condition, run: str, index: int, folder: Path | None = None) -> None:
        self.run = run
        self.folder = folder
        self.index = index
        self.owner: object | None = None
        self.rank: int | None = None
        self.generations: list[Generation] = []
        self.layout_id: str | None = None
        self.layout: Layout | None = None
        self.pieces: tuple[PieceSpec, ...] = ()
        self.is_tainted = False
        """A previous owner may still write into this memory: nobody else may be given it."""
        self.vacant_since = 0.0
        self._condition = condition
        self._configuring = threading.Lock()

    def check_owner(self, owner: object) -> None:
        if self.owner is not owner:
            raise LockedError(
                f"another process or store has taken over slot {self.index} of run {self.run}",
                hint="give every job its own run, and use one store per run in a process",
            )

    def configure(
        self, owner: object, pieces: Sequence[PieceSpec], wanted: int, timeout_s: float, *, pid: int = 0
    ) -> tuple[Layout, list[Generation]]:
        """Give the slot this layout and return its generations; waits until none of them is in use.

        Args:
            pid: the owner's process. Memory is charged to whoever touches it first, which either may be.

        Raises:
            NoSpaceError: not even one generation fits into memory, nor onto the disk beside its checkpoint.
            TransientError: the generations were still in use after ``timeout_s`` (``is_busy`` in its context); trying
                again can help.
        """
        with self._configuring:
            layout_id = layout_id_of(pieces)
            with self._condition:
                self.check_owner(owner)
                is_wanted = self.folder is not None or not any(g.is_on_disk for g in self.generations)
                if self.layout is not None and self.layout_id == layout_id and is_wanted and not self.is_tainted:
                    return self.layout, list(self.generations)
                if self.is_tainted:
                    # What is sealed in the old memory stays with its save; the rest goes when its last user does.
                    self._drop()
                self._give_up()
                is_free = self._condition.wait_for(lambda: self._all_free() or self.owner is not owner, timeout_s)
                self.check_owner(owner)
                if not is_free:
                    raise TransientError(
                        f"the arena of slot {self.index} is still in use after {timeout_s} s",
                        hint="the local disk is slow or a save was begun and neither sealed nor released",
                        is_busy=True,
                    )
                self.layout_id = None  # nobody can reserve until the new one stands
            layout = stock.layout(pieces)
            capacity = max(PAGE, -(-layout.image_bytes // PAGE) * PAGE)
            with _budget:
                used = self._resize(capacity, wanted, pid)
            for generation in self.generations:
                generation.holds = None
                _write_skeleton(generation.memory, layout, pieces, is_new=generation not in used)
            layout = replace(layout, segments=())  # written, and large
            with self._condition:
                self.check_owner(owner)
                self.layout, self.pieces, self.layout_id = layout, tuple(pieces), layout_id
                self._condition.notify_all()
            return layout, list(self.generations)

    def _all_free(self) -> bool:
        return all(g.state is State.FREE for g in self.generations)

    def _drop(self) -> None:
        self.generations, self.layout_id, self.layout, self.is_tainted = [], None, None, False

    def _resize(self, capacity: int, wanted: int, pid: int) -> list[Generation]:
        """Reuse touched pages where the old size is near the new one, make new memory otherwise; returns the reused."""
        self.generations = [g for g in self.generations[:wanted] if not g.is_on_disk]
        if self.generations and self.generations[0].capacity_bytes > 2 * capacity + (1 << 20):
            self.generations = []  # shrinking it would be a SIGBUS for whoever still has it mapped
        grown = []
        for generation in self.generations:
            more = capacity - generation.capacity_bytes
            if more <= 0 or more <= _room(pid):
                if more > 0:
                    generation.grow(capacity)
                grown.append(generation)
        self.generations = list(grown)
        while len(self.generations) < wanted:
            room = _room(pid)
            if capacity > room:
                if self.generations:
                    log.warning("memory for one generation only: %d bytes each, %d available", capacity, max(0, room))
                    break
                self.generations.append(self._on_disk(capacity, room))
                break
            self.generations.append(Generation.create(len(self.generations), capacity))
        for index, generation in enumerate(self.generations):
            generation.index = index
        return grown

    def _on_disk(self, capacity: int, room: int) -> Generation:
        try:
            if self.folder is None:
                raise OSError(errno.EOPNOTSUPP, "not wanted")
            generation = Generation.create_on_disk(0, capacity, self.folder)
        except OSError as error:
            raise NoSpaceError(
                f"staging needs {capacity} bytes of memory, {max(0, room)} are available; on disk: {error.strerror}",
                hint="give the job more memory, or use more ranks so that each holds less",
                needed_bytes=capacity,
                available_bytes=max(0, room),
            ) from None
        log.warning("no memory for %d bytes, %d available: staging through the disk", capacity, max(0, room))
        return generation

    def reserve(self, owner: object, timeout_s: float, save_id: str | None = None) -> int | None:
        """Take a FREE generation for filling; None if there is none within ``timeout_s``.

        What was taken for another save and never sealed, because a copy failed or was interrupted, is free again.
        """
        with self._condition:
            if self.owner is owner and save_id is not None:
                self._give_up(except_for=save_id)

            def ready() -> bool:
                return self.owner is not owner or self._free() is not None

            self._condition.wait_for(ready, timeout_s)
            self.check_owner(owner)
            generation = self._free()
            if generation is None:
                return None
            generation.state, generation.save_id, generation.holds = State.FILLING, save_id, None
            return generation.index

    def _free(self) -> Generation | None:
        if self.layout_id is None:
            return None
        return next((g for g in self.generations if g.state is State.FREE), None)

    def _give_up(self, except_for: str | None = None) -> None:
        """A rank fills for one save at a time: when it begins another, its copies have ended. Hold the condition."""
        for generation in self.generations:
            if generation.state is State.FILLING and generation.save_id not in (None, except_for):
                generation.free()

    def filling(self, index: int) -> Generation:
        """The generation of this index, which must be FILLING. Hold the condition."""
        if not 0 <= index < len(self.generations) or self.generations[index].state is not State.FILLING:
            raise LockedError(f"generation {index} of slot {self.index} was not reserved")
        return self.generations[index]

    def release(self, owner: object, index: int) -> None:
        """Give a FILLING generation back unused."""
        with self._condition:
            self.check_owner(owner)
            self.filling(index).free()
            self._condition.notify_all()

    def give_back(self) -> bool:
        """Let go of the memory of a slot without an owner, unless a save is still in it; whether there was any."""
        with self._condition:
            if self.owner is not None or not self.generations or not self._all_free():
                return False
            self._drop()
            return True

    def describe(self) -> dict[str, Any]:
        """For ``status``. Hold the condition."""
        return {
            "run": self.run,
            "slot": self.index,
            "is_attached": self.owner is not None,
            "layout_id": self.layout_id,
            "image_bytes": self.layout.image_bytes if self.layout is not None else 0,
            "capacity_bytes": sum(g.capacity_bytes for g in self.generations),
            "generations": [
                {"state": g.state.value, "save_id": g.save_id, "is_on_disk": g.is_on_disk} for g in self.generations
            ],
        }


def gaps(layout: Layout, pieces: Sequence[PieceSpec]) -> Iterator[tuple[int, int]]:
    """(start, end) of everything in the image that isn't payload, in order, empty ones left out."""
    end = 0
    for start, piece in sorted(zip(layout.starts, pieces, strict=True), key=lambda item: item[0]):
        if start > end:
            yield end, start
        end = max(end, start + piece.size_bytes)
    if layout.image_bytes > end:
        yield end, layout.image_bytes


def _write_skeleton(memory: memoryview, layout: Layout, pieces: Sequence[PieceSpec], *, is_new: bool) -> None:
    """Everything but the payloads; new memory is zero already."""
    for start, end in () if is_new else gaps(layout, pieces):
        memory[start:end] = bytes(end - start)
    for offset, data in layout.segments:
        memory[offset : offset + len(data)] = data


def _room(pid: int = 0) -> int:
    """Bytes that may still be lent to this process; 0: one that can't be seen from here."""
    promised = sum(max(0, g.capacity_bytes - os.fstat(g.fd).st_blocks * 512) for g in list(_alive))
    return min(available_memory(), available_memory(pid=pid) if pid else 1 << 62) - promised
