"""`status`: what would be lost if the process, the machine or the site died now."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ckptstore.agent.client import AgentClient
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import TransientError
from ckptstore.ops.open import RunTiers
from ckptstore.types import CheckpointInfo


@dataclass(frozen=True)
class Safety:
    """The newest checkpoint that survives one kind of loss."""

    survives: str
    step: int | None
    created_at: datetime | None
    seconds_at_risk: float | None
    steps_at_risk: int | None

    def to_json(self) -> dict[str, Any]:
        from ckptstore.clock import rfc3339

        return {
            "survives": self.survives,
            "step": self.step,
            "created_at": rfc3339(self.created_at) if self.created_at else None,
            "seconds_at_risk": self.seconds_at_risk,
            "steps_at_risk": self.steps_at_risk,
        }


@dataclass(frozen=True)
class Status:
    """One run, seen from this machine."""

    run: str
    safety: list[Safety]
    waiting_uploads: int
    waiting_bytes: int
    agent: dict[str, Any] | None = field(default=None)


def status(tiers: RunTiers, clock: Clock = SYSTEM_CLOCK) -> Status:
    """Look at the tiers and at the agent, if one runs for this local tier."""
    infos = [record.info() for record in tiers.catalog().line()]
    newest = max((info.step for info in infos), default=None)
    safety = []
    if tiers.local is not None:
        local = [info for info in infos if info.tiers.get("local") == "complete"]
        safety.append(_safety("power cut (local)", local, newest, clock))
    waiting: set[str] = set()
    for remote in tiers.remotes:
        held = [info for info in infos if info.tiers.get(remote.name) == "complete"]
        safety.append(_safety(f"loss of the machine ({remote.name})", held, newest, clock))
        behind = {info.save_id for info in held}
        waiting |= {info.save_id for info in infos if info.save_id not in behind}
    waiting_bytes = sum(info.size_bytes for info in infos if info.save_id in waiting)
    return Status(tiers.run, safety, len(waiting), waiting_bytes, _agent(tiers))


def _safety(survives: str, infos: list[CheckpointInfo], newest: int | None, clock: Clock) -> Safety:
    if not infos:
        return Safety(survives, None, None, None, newest)
    last = infos[-1]
    age = (clock.now() - last.created_at).total_seconds()
    return Safety(survives, last.step, last.created_at, max(age, 0.0), max((newest or 0) - last.step, 0))


def _agent(tiers: RunTiers) -> dict[str, Any] | None:
    if tiers.local is None:
        return None
    try:
        client = AgentClient.observe(tiers.local.root)
        if client is None:
            return None
        try:
            return client.status()
        finally:
            client.close()
    except TransientError:
        return None
