"""The nodes of a running job, as seen from their local tiers: which ranks share one, and what the others hold.

Ranks share a node when they see the same local root on the same machine. On a file system that several machines share,
each machine counts as a node that holds everything, which is as good.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from ckptstore.clock import new_nonce
from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import CkptError
from ckptstore.format.manifest import MAX_SUMMARY_BYTES, Summary
from ckptstore.repo.local import LocalTier

T = TypeVar("T")


@dataclass(frozen=True)
class Nodes:
    """Attributes:
    of_rank: number of each rank's node; nodes are numbered by their lowest rank.
    """

    of_rank: tuple[int, ...]
    rank: int

    @classmethod
    def meet(cls, local: LocalTier | None, agreement: Agreement) -> Nodes:
        """Collective. Find out who shares a node."""
        keys = agreement.gather(_key(local.root if local is not None else None), what="counting the nodes")
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return cls(tuple(numbers[key] for key in keys), agreement.rank)

    @property
    def count(self) -> int:
        """How many nodes."""
        return max(self.of_rank) + 1

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its node."""
        return self.of_rank.index(self.of_rank[self.rank]) == self.rank

    def gather(self, agreement: Agreement, look: Callable[[], T], *, what: str) -> list[T]:
        """Collective. What each node's leader finds by looking, by node.

        Raises:
            CkptError: some leader could not look; on all ranks.
        """
        found: T | None = None
        error: CkptError | None = None
        if self.is_leader:
            try:
                found = look()
            except CkptError as failure:
                error = failure
        agreement.together(error, what=what)
        everybody = agreement.gather(found, what=what)
        return [everybody[self.of_rank.index(node)] for node in range(self.count)]  # type: ignore[misc]

    def elsewhere(self, local: LocalTier | None, run: str, agreement: Agreement) -> list[Summary]:
        """Collective. Saves that are complete on other nodes but not on rank 0's."""
        if self.count == 1:
            return []
        mine: dict[str, Summary] = {}

        def look() -> list[str]:
            for save in local.saves(run) if local is not None else ():
                if save.state == "complete" and save.summary is not None and save.damaged is None:
                    mine[save.save_id] = save.summary
            return list(mine)

        held = self.gather(agreement, look, what="listing the local checkpoints")
        owed: dict[str, int] = {}
        for node, save_ids in enumerate(held):
            for save_id in save_ids:
                owed.setdefault(save_id, node)
        if not any(owed.values()):
            return []
        here = self.of_rank[self.rank]
        told = self.gather(
            agreement,
            lambda: [mine[save_id].encode() for save_id, node in owed.items() if node == here != 0],
            what="listing the local checkpoints",
        )
        return [
            Summary.decode(data, what="another node's summary", max_bytes=MAX_SUMMARY_BYTES)
            for node in told
            for data in node
        ]


def _key(root: Path | None) -> str:
    """Equal on two ranks if and only if they see the same root on the same machine."""
    machine = _machine()
    if root is None:
        return machine
    with suppress(OSError):
        status = root.stat()
        return f"{machine}/{status.st_dev}/{status.st_ino}"
    return f"{machine}{root}"


@cache
def _machine() -> str:
    """This boot of this kernel; containers on one machine share it, which is why the root's identity is added."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return new_nonce()  # unknown: every rank counts as a node, which costs speed only
