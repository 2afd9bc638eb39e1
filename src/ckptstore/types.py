"""The values users receive: plain, frozen, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

#: Levels of durability, weakest first.
Level = Literal["staged", "local", "remote"]

TierState = Literal["complete", "prepared", "uploading", "partial", "damaged", "absent"]

#: What names a checkpoint everywhere: a step, "latest", "latest~2", "best", or a save_id.
StepLike = int | str


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        missing: keys of the target that the checkpoint lacks.
        unexpected: keys of the checkpoint below a named top-level key that the target lacks.
        cast: key -> (stored dtype, target dtype), where they differed and the value was converted.
        renamed: stored key -> target key.
        bytes_by_source: plain bytes taken from each source: "arena" (the node agent's memory), "local", "peer" (read by
            another rank of the job), or a remote's name.
        repaired: local files whose damaged or missing bytes were replaced from a remote.
        passed_over: newer checkpoints that were not used, and remotes that could not be asked for any, with the reason.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    bytes_by_source: Mapping[str, int] = field(default_factory=dict)
    repaired: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint as its run knows it.

    Attributes:
        step: optimizer steps done.
        created_at: aware UTC time of the ``save`` call.
        size_bytes: plain tensor bytes, replicas once.
        stored_bytes: bytes this save added to the remote; None when no remote has it.
        base_step: step of the save its deltas refer to, if any.
        superseded: a newer timeline of the run branched off at or before this step.
        skipped: by policy the save was skipped (back-pressure; ``tiers`` is empty then), or not sent to a remote.
        report: what a load did; None for infos that don't come from ``load``.
        tiers: tier name ("local", a remote's name or scheme) -> its state there.
    """

    run: str
    step: int
    save_id: str
    created_at: datetime
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    pinned: bool = False
    emergency: bool = False
    superseded: bool = False
    timeline: int = 1
    world_size: int = 1
    size_bytes: int = 0
    stored_bytes: int | None = None
    base_step: int | None = None
    job: str = ""
    skipped: bool = False
    report: LoadReport | None = None
    tiers: Mapping[str, TierState] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As in ``ckptctl --json``: times RFC 3339, non-finite metrics as strings."""
        from ckptstore.clock import rfc3339

        return {
            "run": self.run,
            "step": self.step,
            "save_id": self.save_id,
            "created_at": rfc3339(self.created_at),
            "epoch": self.epoch,
            "metrics": {k: json_number(v) for k, v in self.metrics.items()},
            "tags": list(self.tags),
            "pinned": self.pinned,
            "emergency": self.emergency,
            "superseded": self.superseded,
            "timeline": self.timeline,
            "world_size": self.world_size,
            "size_bytes": self.size_bytes,
            "stored_bytes": self.stored_bytes,
            "base_step": self.base_step,
            "job": self.job,
            "tiers": dict(self.tiers),
        }


def json_number(value: float) -> float | str:
    """The number itself, or "nan", "inf", "-inf", which JSON lacks."""
    return value if value - value == 0 else str(float(value))
