"""Why each checkpoint is still there, and which one goes next: the rules that the manager noted, applied here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptstore.dashboard.safety import usual_interval
from ckptstore.dashboard.source import RunView
from ckptstore.policy.retention import Retention
from ckptstore.types import CheckpointInfo

#: Save id of the checkpoint that isn't there yet.
_NEXT = "next"


@dataclass(frozen=True)
class TierPlan:
    """Retention in one tier.

    Attributes:
        rules: in words.
        keep: save_id -> reasons.
        going: what the next checkpoint will push out, oldest first.
        limit: the most checkpoints that stay; None if that grows with the run.
        most_bytes: what these take.
        note: something the rules themselves have to say.
    """

    tier: str
    rules: str
    keep: Mapping[str, tuple[str, ...]]
    going: tuple[CheckpointInfo, ...]
    limit: int | None
    most_bytes: int | None
    note: str | None


def plans(view: RunView, rules: Mapping[str, Any] | None, verified: Collection[str] = ()) -> list[TierPlan]:
    """One per tier that is known; none if no manager has noted its rules here."""
    if rules is None:
        return []
    found = []
    for tier in view.tiers:
        retention = Retention.noted(rules.get("local" if tier == "local" else "remote"))
        if retention is None or tier in view.unknown_remotes:
            continue
        now = retention.decide(view.infos, tier, verified=verified)
        going = now.drop
        if view.line:
            then = retention.decide([*view.infos, _next(view.line, tier)], tier, verified=verified)
            going = then.drop
        size = view.line[-1].size_bytes if view.line else 0
        most = None if retention.limit is None else retention.limit * size
        found.append(TierPlan(tier, retention.words, now.keep, going, retention.limit, most, now.note))
    return found


def reasons(found: Sequence[TierPlan], info: CheckpointInfo) -> tuple[str, ...]:
    """Why this checkpoint stays, with the tier where the tiers differ; that it goes, if nothing speaks for it."""
    here = [plan for plan in found if info.tiers.get(plan.tier) == "complete"]
    by_reason: dict[str, list[str]] = {}
    for plan in here:
        for reason in plan.keep.get(info.save_id, ("may go now",)):
            by_reason.setdefault(reason, []).append(plan.tier)
        if info.save_id in plan.keep and any(going.save_id == info.save_id for going in plan.going):
            by_reason.setdefault("goes with the next checkpoint", []).append(plan.tier)
    return tuple(
        reason if len(tiers) == len(here) else f"{reason} ({', '.join(tiers)})" for reason, tiers in by_reason.items()
    )


def rests_on(view: RunView, save_id: str) -> tuple[str, ...]:
    """save_ids whose packs this checkpoint needs on a remote, as far as the notes here tell."""
    found: dict[str, None] = {}
    for name in view.remote_names:
        spans = view.notes.get(save_id, {}).get(f"remote {name}")
        told = spans.get("rests_on") if isinstance(spans, dict) else None
        found.update(dict.fromkeys(str(one) for one in told) if isinstance(told, list) else {})
    return tuple(found)


def _next(line: Sequence[CheckpointInfo], tier: str) -> CheckpointInfo:
    """A checkpoint like the last one, one interval later, that is best at nothing."""
    last = line[-1]
    interval = usual_interval(line)
    steps = last.step - line[-2].step if len(line) > 1 else 1
    created = (
        last.created_at
        if interval is None
        else last.created_at.fromtimestamp(last.created_at.timestamp() + interval, last.created_at.tzinfo)
    )
    return replace(
        last, step=last.step + max(1, steps), save_id=_NEXT, created_at=created, metrics={}, tags=(), pinned=False,
        emergency=False, tiers={tier: "complete"},
    )  # fmt: skip
