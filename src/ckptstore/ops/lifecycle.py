"""`pin`, `unpin`, `delete`: the life of one checkpoint, in every tier that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.errors import ConfigError
from ckptstore.ops.open import RunTiers
from ckptstore.repo.record import LOCAL, Record
from ckptstore.types import StepLike


@dataclass(frozen=True)
class Action:
    """One thing that will be, or was, done to one copy of a checkpoint, and why."""

    step: int
    save_id: str
    tier: str
    action: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "save_id": self.save_id,
            "tier": self.tier,
            "action": self.action,
            "why": self.why,
        }


def pin(tiers: RunTiers, steps: Sequence[StepLike]) -> list[Action]:
    """Keep these checkpoints whatever retention says, in every tier that has them. Idempotent."""
    return _pins(tiers, steps, "pin")


def unpin(tiers: RunTiers, steps: Sequence[StepLike]) -> list[Action]:
    """Let retention decide about these checkpoints again. Idempotent."""
    return _pins(tiers, steps, "unpin")


def _pins(tiers: RunTiers, steps: Sequence[StepLike], action: str) -> list[Action]:
    catalog = tiers.catalog()
    done = []
    for record in [catalog.resolve(step) for step in steps]:
        why = "it was pinned" if record.pinned else "it was not pinned"
        if tiers.local is not None and record.local is not None:
            getattr(tiers.local, action)(tiers.run, record.save_id)
            done.append(Action(record.step, record.save_id, LOCAL, action, why))
        for remote in tiers.remotes:
            if remote.name in record.remote:
                getattr(remote, action)(record.save_id)
                done.append(Action(record.step, record.save_id, remote.name, action, why))
    return done


@dataclass(frozen=True)
class Deletion:
    """What a delete will do, and what the person who asked should know first."""

    records: tuple[Record, ...]
    actions: tuple[Action, ...]
    warnings: tuple[str, ...]


def plan_delete(tiers: RunTiers, steps: Sequence[StepLike], *, tier: str | None = None) -> Deletion:
    """What deleting these checkpoints would remove. Changes nothing.

    Args:
        tiers: Where to look.
        steps: Which.
        tier: ``local`` or a remote's name: only there.

    Raises:
        ConfigError: one is pinned, or there is no such tier.
        CheckpointNotFoundError: one isn't there.
    """
    names = ([LOCAL] if tiers.local is not None else []) + [remote.name for remote in tiers.remotes]
    if tier is not None and tier not in names:
        raise ConfigError(f"there is no tier {tier!r} here", hint=f"one of: {', '.join(names)}")
    catalog = tiers.catalog()
    records = {record.save_id: record for record in map(catalog.resolve, steps)}
    actions, warnings = [], []
    for record in records.values():
        if record.pinned:
            raise ConfigError(f"step {record.step} is pinned", hint=f"ckptctl unpin {record.save_id}")
        places = [LOCAL] if tiers.local is not None and record.local is not None else []
        places += [remote.name for remote in tiers.remotes if remote.name in record.remote]
        wanted = [place for place in places if tier is None or place == tier]
        actions += [Action(record.step, record.save_id, place, "delete", "asked for") for place in wanted]
        kept = [place for place in places if place not in wanted]
        if not kept:
            warnings.append(f"step {record.step} will be gone from every tier named here")
    for name in names if tier is None else [tier]:
        there = {record.save_id for record in catalog.records if record.tiers.get(name) == "complete"}
        going = {action.save_id for action in actions if action.tier == name}
        if going and there <= going:
            warnings.append(f"{name} will hold no checkpoint of run {tiers.run} any more")
    return Deletion(tuple(records.values()), tuple(actions), tuple(warnings))


def delete(tiers: RunTiers, plan: Deletion) -> None:
    """Carry a plan out: manifests first; packs are left to gc, which waits its grace. May be killed and repeated.

    The local copy goes first, so that no agent takes the save for one that has still to be uploaded.

    Raises:
        CredentialsError: without the right to delete.
        StorageError: a tier refused; what was not done yet is still there, whole.
    """
    todo = {(action.save_id, action.tier) for action in plan.actions}
    for record in plan.records:
        if tiers.local is not None and (record.save_id, LOCAL) in todo:
            tiers.local.delete(tiers.run, record.save_id)
        for remote in tiers.remotes:
            if (record.save_id, remote.name) in todo:
                remote.delete(record.remote[remote.name])
