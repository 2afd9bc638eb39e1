"""`status`: what would be lost if the process, the machine or the site died now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from ckptstore.agent.client import AgentClient
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import StorageError, TransientError
from ckptstore.ops.open import RunTiers
from ckptstore.repo.catalog import Catalog
from ckptstore.types import CheckpointInfo


@dataclass(frozen=True)
class Safety:
    """The newest checkpoint that survives one kind of loss."""

    survives: str
    step: int | None
    created_at: datetime | None
    seconds_at_risk: float | None
    steps_at_risk: int | None
    unknown: str | None = None
    """Why that can't be told now: the remote is out of reach, or refuses."""

    def to_json(self) -> dict[str, Any]:
        from ckptstore.clock import rfc3339

        return {
            "survives": self.survives,
            "step": self.step,
            "created_at": rfc3339(self.created_at) if self.created_at else None,
            "seconds_at_risk": self.seconds_at_risk,
            "steps_at_risk": self.steps_at_risk,
            "unknown": self.unknown,
        }


@dataclass(frozen=True)
class Status:
    """One run, seen from this machine."""

    run: str
    safety: list[Safety]
    waiting_uploads: int
    waiting_bytes: int
    agent: dict[str, Any] | None = field(default=None)
    ranks: tuple[Rank, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Remotes that could not be asked, and why."""


@dataclass(frozen=True)
class Rank:
    """One rank slot of this node, as the agent sees it."""

    slot: int
    is_attached: bool
    """Whether its trainer is there; what a dead one left in memory is still written."""
    staging: tuple[int, ...]
    """Steps that are in memory and not on disk yet."""

    def to_json(self) -> dict[str, Any]:
        return {"slot": self.slot, "is_attached": self.is_attached, "staging": list(self.staging)}


def status(tiers: RunTiers, clock: Clock = SYSTEM_CLOCK) -> Status:
    """Look at the tiers and at the agent, if one runs for this local tier.

    Where the local tier tells something, a remote that is out of reach or refuses is said, no more.
    """
    agent = _agent(tiers)
    catalog, unknown = _catalog(tiers)
    infos = [record.info() for record in catalog.line()]
    said = (agent or {}).get("runs", {}).get(tiers.run, {})
    staged = [save for save in said.get("saves", []) if not save["ranks_missing"]]
    steps = [info.step for info in infos] + [save["step"] for save in staged]
    newest = max(steps, default=None)
    safety = []
    if agent is not None:
        safety.append(_staged(staged, infos, clock))
    if tiers.local is not None:
        local = [info for info in infos if info.tiers.get("local") == "complete"]
        safety.append(_safety("power cut (local)", local, newest, clock))
    waiting: set[str] = set()
    for remote in tiers.remotes:
        survives = f"loss of the machine ({remote.name})"
        if remote.name in unknown:
            safety.append(Safety(survives, None, None, None, None, unknown[remote.name]))
            continue
        held = [info for info in infos if info.tiers.get(remote.name) == "complete"]
        safety.append(_safety(survives, held, newest, clock))
        behind = {info.save_id for info in held}
        waiting |= {info.save_id for info in infos if info.save_id not in behind}
    waiting_bytes = sum(info.size_bytes for info in infos if info.save_id in waiting)
    ranks = _ranks(tiers.run, agent or {}, said)
    return Status(tiers.run, safety, len(waiting), waiting_bytes, agent, ranks, unknown)


def _catalog(tiers: RunTiers) -> tuple[Catalog, dict[str, str]]:
    """What the tiers hold, and why which remote could not be asked."""
    refused: dict[str, StorageError] = {}
    while True:
        asked = tuple(remote for remote in tiers.remotes if remote.name not in refused)
        try:
            catalog = replace(tiers, remotes=asked).catalog(tolerate_unreachable=True)
        except TransientError:
            raise
        except StorageError as error:
            name = error.context.get("tier")
            if not any(remote.name == name for remote in asked):
                raise
            refused[str(name)] = error
            continue
        if refused and not catalog.records:
            raise next(iter(refused.values()))
        return catalog, {name: error.message for name, error in {**catalog.unreachable, **refused}.items()}


def _staged(staged: list[dict[str, Any]], infos: list[CheckpointInfo], clock: Clock) -> Safety:
    """What an agent holds in memory outlives the trainers."""
    step = max((save["step"] for save in staged), default=None)
    last = infos[-1] if infos else None
    survives = "death of the trainers"
    if step is not None and (last is None or step > last.step):
        return Safety(survives, step, None, 0.0, 0)
    return _safety(survives, infos, last.step if last is not None else None, clock)


def _ranks(run: str, agent: dict[str, Any], said: dict[str, Any]) -> tuple[Rank, ...]:
    """The slots that are in use, each with what it has copied whole."""
    steps = {save["save_id"]: save["step"] for save in said.get("saves", [])}
    found = []
    for slot in agent.get("slots", []):
        sealed = [g["save_id"] for g in slot["generations"] if g["state"] == "sealed" and not g["is_on_disk"]]
        staging = tuple(sorted(steps[save_id] for save_id in sealed if save_id in steps))
        if slot["run"] == run and (slot["is_attached"] or staging):
            found.append(Rank(slot["slot"], slot["is_attached"], staging))
    return tuple(sorted(found, key=lambda rank: rank.slot))


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
