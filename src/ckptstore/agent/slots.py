"""The places of one run's ranks on this node: who holds which, and what those who left have left in them.

The newest to attach owns a slot. Whoever lost it may still live and be in the middle of a copy, so its memory is given
to nobody else; what its process left behind sealed stays readable until a later save writes over it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptstore.agent.arena import Slot, State
from ckptstore.agent.protocol import Event
from ckptstore.clock import Clock
from ckptstore.errors import LockedError
from ckptstore.format.manifest import Json


@dataclass(eq=False)
class Attachment:
    """One rank's connection.

    Attributes:
        is_gone: whether its process has ended, so that nothing of it writes into the arena any more.
        rank: learned from its seals unless it was told.
        begun: when its job began, in seconds since 1970; 0: unknown.
    """

    run: str
    slot: Slot
    send: Callable[[Event], None]
    is_gone: Callable[[], bool]
    rank: int | None = None
    begun: float = 0.0
    last: tuple[str, int] | None = None
    """save_id and step of its last seal."""
    tree: Json | None = None
    """The state tree of its last seal."""


@dataclass(frozen=True)
class Leaving:
    """An owner has lost its slot.

    Attributes:
        unsealed: saves it was copying for.
        was_closed: it said goodbye.
    """

    who: Attachment
    unsealed: tuple[str, ...]
    was_closed: bool


class Slots:
    """Which rank holds which slot of one run. Hold the agent's condition for every call.

    Args:
        condition: the agent's.
        run: the run.
        left: told of every owner that has lost its slot, for whatever reason.

    Attributes:
        attached: every connection of the run, owners or not.
    """

    def __init__(self, condition: threading.Condition, run: str, left: Callable[[Leaving], None], clock: Clock) -> None:
        self.attached: set[Attachment] = set()
        self._condition, self._run, self._left, self._clock = condition, run, left, clock
        self._slots: dict[int, Slot] = {}
        self._lost: set[int] = set()

    def attach(
        self,
        index: int,
        send: Callable[[Event], None],
        is_gone: Callable[[], bool],
        *,
        rank: int | None,
        folder: Path | None,
        begun: float,
    ) -> Attachment:
        """Make a connection the owner of a slot, whoever had it.

        Args:
            folder: on the disk that stands in when memory is short; None: nothing does.

        Raises:
            LockedError: of a job that is older than one that is here. It only comes back because the agent was lost.
        """
        if 0.0 < begun < max((other.begun for other in self.attached if not other.is_gone()), default=0.0):
            raise LockedError(
                f"a newer job has taken over run {self._run}",
                hint="stop this job; or load a checkpoint, or use another run, to go on in a line of its own",
            )
        slot = self._slots.setdefault(index, Slot(self._condition, self._run, index))
        slot.folder = folder
        if isinstance(slot.owner, Attachment):
            # If it lives it has the memory mapped, and may be in the middle of a copy.
            self._vacate(slot, slot.owner, is_gone=slot.owner.is_gone())
        attachment = Attachment(self._run, slot, send, is_gone, rank, begun)
        slot.owner, slot.rank = attachment, rank
        self._lost.discard(index)
        self.attached.add(attachment)
        return attachment

    def detach(self, attachment: Attachment, *, is_gone: bool, was_closed: bool) -> None:
        """A connection has ended; ``is_gone``: nobody can write into its memory any more."""
        self.attached.discard(attachment)
        if attachment.slot.owner is attachment:
            self._vacate(attachment.slot, attachment, is_gone=is_gone, was_closed=was_closed)

    def _vacate(self, slot: Slot, owner: Attachment, *, is_gone: bool, was_closed: bool = False) -> None:
        slot.owner, slot.vacant_since = None, self._clock.monotonic()
        slot.is_tainted = slot.is_tainted or not is_gone
        if not was_closed:
            self._lost.add(slot.index)
        unsealed = []
        for generation in slot.generations:
            if was_closed:
                generation.holds = None  # in good order: the next job reads from the disk, and finds out if it is whole
            if generation.state is State.FILLING:
                if generation.save_id is not None:
                    unsealed.append(generation.save_id)
                generation.free()
        self._left(Leaving(owner, tuple(unsealed), was_closed))

    def of_rank(self, rank: int, local_ranks: Sequence[int]) -> Slot | None:
        """Where a rank of a save copies to; by order as long as it has neither said so nor sealed."""
        told = [slot for slot in self._slots.values() if slot.rank == rank]
        if told:
            return next((slot for slot in told if slot.owner is not None), told[0])
        position = local_ranks.index(rank)
        in_order = [self._slots[index] for index in sorted(self._slots)]
        if len(in_order) == len(local_ranks):
            return in_order[position]
        return self._slots.get(position)

    def rank_of(self, who: Attachment, local_ranks: Sequence[int]) -> int | None:
        """Which of these ranks a connection is."""
        if who.rank is not None:
            return who.rank if who.rank in local_ranks else None
        return next((rank for rank in local_ranks if self.of_rank(rank, local_ranks) is who.slot), None)

    def is_lost(self, rank: int, local_ranks: Sequence[int]) -> bool:
        """Whether the process of this rank was lost and none has taken its place."""
        slot = self.of_rank(rank, local_ranks)
        return slot is not None and slot.owner is None and slot.index in self._lost

    def held(self, save_id: str) -> list[tuple[int, int, int]]:
        """(rank, descriptor, bytes) of this save's images that dead trainers left; the descriptors are copies.

        Whoever reads them verifies what was read: a new save may write over them at any time.
        """
        orphans = [g for slot in self._slots.values() if slot.owner is None for g in slot.generations]
        found = [(g.holds[1], g) for g in orphans if g.holds and g.holds[0] == save_id]
        return sorted((rank, os.dup(g.fd), g.capacity_bytes) for rank, g in found)

    def give_back(self, idle_seconds: float) -> list[int]:
        """Let go of the memory of slots whose rank has not come back for so long; which had any."""
        now = self._clock.monotonic()
        slots = self._slots.values()
        return [s.index for s in slots if now - s.vacant_since > idle_seconds and s.give_back()]

    def is_filling(self) -> bool:
        """Whether any rank is copying."""
        return any(g.state is State.FILLING for slot in self._slots.values() for g in slot.generations)

    def owners(self) -> list[int]:
        """The slots that somebody owns."""
        return sorted(a.slot.index for a in self.attached if a.slot.owner is a)

    def describe(self) -> list[dict[str, Any]]:
        """For ``status``."""
        return [slot.describe() for slot in self._slots.values()]
