"""Views of runs that never were, for tests of what pages make of them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from ckptstore.clock import rfc3339
from ckptstore.dashboard import safety
from ckptstore.dashboard.source import RunView
from ckptstore.format.manifest import Summary
from ckptstore.repo.catalog import Catalog, Record

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
JOB = "0123456789ab"


def record(step: int, *, age_s: float = 0.0, tiers: dict[str, Any] | None = None, **fields: Any) -> Record:
    old = {name: fields.pop(name) for name in ("superseded", "pinned") if name in fields}
    summary = Summary(
        run="bert", save_id=f"{JOB}-{step}", timeline=1, step=step, job="j", world_size=1, size_bytes=1000,
        created_at=rfc3339(NOW - timedelta(seconds=age_s)), **fields,
    )  # fmt: skip
    return Record(summary, tiers=tiers or {"local": "complete"}, **old)


def view(*records: Record, remotes: tuple[str, ...] = (), **fields: Any) -> RunView:
    return RunView("bert", Catalog("bert", records), 1, True, remotes, **fields)


def assess(seen: RunView, **changes: Any) -> safety.Safety:
    plain: dict[str, Any] = {
        "now": NOW, "agent": None, "agent_run": None, "uploads": (), "looks": (), "disk": (10**9, 10**10),
        "store": "/d",
    }  # fmt: skip
    return safety.assess(seen, **{**plain, **changes})
