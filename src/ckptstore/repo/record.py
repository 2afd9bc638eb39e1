"""One save as the catalogue describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptstore.format.manifest import Summary
from ckptstore.repo import timelines
from ckptstore.repo.local_save import LocalSave
from ckptstore.types import CheckpointInfo, TierState

if TYPE_CHECKING:
    from ckptstore.repo.remote import RemoteSave

#: Name of the local tier wherever tiers are named.
LOCAL = "local"
#: Source of bytes that were still in the node agent's memory.
ARENA = "arena"


@dataclass(frozen=True)
class Record:
    """One save that is complete in at least one tier.

    Attributes:
        local: What the local tier has of it, in whatever state.
        remote: Name of each remote that has it -> its place there.
        superseded: A newer timeline branched off before it.
        tiers: State in every tier that was read, ``absent`` included.
    """

    summary: Summary
    local: LocalSave | None = None
    remote: Mapping[str, RemoteSave] = field(default_factory=dict)
    superseded: bool = False
    pinned: bool = False
    tiers: Mapping[str, TierState] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.summary.step

    @property
    def save_id(self) -> str:
        return self.summary.save_id

    def metric(self, name: str) -> float | None:
        """A metric's value, non-finite ones too; None when the save does not have it."""
        value = self.summary.metrics.get(name)
        return None if value is None else float(value)

    def info(self) -> CheckpointInfo:
        """This save as users see it."""
        s = self.summary
        return CheckpointInfo(
            run=s.run,
            step=s.step,
            save_id=s.save_id,
            created_at=timelines.created_at(s),
            epoch=s.epoch,
            metrics={name: float(value) for name, value in s.metrics.items()},
            tags=s.tags,
            pinned=self.pinned,
            emergency=s.emergency,
            superseded=self.superseded,
            timeline=s.timeline,
            world_size=s.world_size,
            size_bytes=s.size_bytes,
            job=s.job,
            tiers=dict(self.tiers),
        )


@dataclass(frozen=True)
class Damaged:
    """A save that is committed somewhere but of which no tier can even tell the summary; ``reason`` says why."""

    step: int
    save_id: str
    tiers: tuple[str, ...]
    reason: str
