"""Is this training safe? What each kind of loss would cost now, and what to do about it: pure functions of a view."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from ckptstore.dashboard.agents import Uploading
from ckptstore.dashboard.alarms import Alarm, Alarms
from ckptstore.dashboard.source import RemoteLook, RunView
from ckptstore.types import CheckpointInfo, json_number

Verdict = Literal["safe", "at risk", "not safe", "empty", "looking"]


@dataclass(frozen=True)
class Level:
    """What survives one kind of loss.

    Attributes:
        name: "staged", "local", or a remote's name.
        lost_if: the loss it guards against, in words.
        state: "ok"; "behind": something newer exists elsewhere; "none": nothing is held; "unknown": not looked at yet.
        lost_s: training that would be lost now, in seconds; None if nothing is held or it can't be told.
        lost_steps: ... in steps, up to the newest step known.
    """

    name: str
    lost_if: str
    state: Literal["ok", "behind", "none", "unknown"]
    step: int | None = None
    created_at: datetime | None = None
    lost_s: float | None = None
    lost_steps: int | None = None


@dataclass(frozen=True)
class Safety:
    """The answer for one run."""

    run: str
    verdict: Verdict
    is_training: bool
    levels: tuple[Level, ...]
    alarms: tuple[Alarm, ...]
    uploads: tuple[Uploading, ...]
    num_checkpoints: int
    interval_s: float | None
    newest: CheckpointInfo | None
    ranks: tuple[int, ...] = ()
    failures: int = 0

    def to_json(self) -> dict[str, Any]:
        from ckptstore.clock import rfc3339

        return {
            "run": self.run,
            "verdict": self.verdict,
            "is_training": self.is_training,
            "num_checkpoints": self.num_checkpoints,
            "interval_seconds": self.interval_s,
            "newest_step": None if self.newest is None else self.newest.step,
            "newest_metrics": {}
            if self.newest is None
            else {k: json_number(v) for k, v in self.newest.metrics.items()},
            "levels": [
                {
                    "name": level.name,
                    "state": level.state,
                    "step": level.step,
                    "created_at": None if level.created_at is None else rfc3339(level.created_at),
                    "lost_seconds": level.lost_s,
                    "lost_steps": level.lost_steps,
                }
                for level in self.levels
            ],
            "uploads": [
                {
                    "remote": upload.remote,
                    "num_waiting": len(upload.waiting),
                    "remaining_bytes": upload.remaining_bytes,
                    "rate_bytes_per_s": upload.rate_bytes_per_s,
                    "eta_seconds": upload.eta_s,
                    "lag_seconds": upload.lag_s,
                    "error": upload.error,
                }
                for upload in self.uploads
            ],
            "alarms": [
                {"severity": a.severity, "title": a.title, "hint": a.hint, "command": a.command} for a in self.alarms
            ],
        }


def assess(
    view: RunView,
    *,
    now: datetime,
    agent: dict[str, Any] | None,
    agent_run: dict[str, Any] | None,
    uploads: Sequence[Uploading],
    looks: Sequence[RemoteLook],
    disk: tuple[int, int] | None,
    store: str,
    read_back_at: datetime | None = None,
) -> Safety:
    """The answer for one run.

    Args:
        view: what the tiers hold.
        now: the time.
        agent: the agent's status, None if none runs here.
        agent_run: the part of it about this run.
        uploads: its queues.
        looks: how fresh the remotes' parts are.
        disk: free and total bytes.
        store: as a person would type it after ``ckptctl -s``.
        read_back_at: when a checkpoint was last read back whole, as far as it was noted here.
    """
    said = agent_run or {}
    ranks = tuple(said.get("ranks_attached", ()))
    is_training = bool(ranks)
    line = view.line
    newest = line[-1] if line else None
    interval = usual_interval(line)
    levels = _levels(view, said, now, is_training=is_training)
    alarms = Alarms(view, store, now, interval).all(
        agent=agent,
        said=said,
        uploads=uploads,
        looks=looks,
        disk=disk,
        is_training=is_training,
        read_back_at=read_back_at,
    )
    return Safety(
        run=view.run,
        verdict=_verdict(view, levels, alarms),
        is_training=is_training,
        levels=tuple(levels),
        alarms=tuple(alarms),
        uploads=tuple(uploads),
        num_checkpoints=len(line),
        interval_s=interval,
        newest=newest,
        ranks=ranks,
        failures=int(said.get("failures", 0)),
    )


def usual_interval(line: Sequence[CheckpointInfo]) -> float | None:
    """Median seconds between the last saves of one job; None with fewer than three."""
    recent = line[-20:]
    gaps = [
        (b.created_at - a.created_at).total_seconds()
        for a, b in pairwise(recent)
        if a.job == b.job and b.created_at > a.created_at
    ]
    return statistics.median(gaps) if len(gaps) >= 2 else None


def _levels(view: RunView, said: dict[str, Any], now: datetime, *, is_training: bool) -> list[Level]:
    line = view.line
    staged = [job for job in said.get("saves", ()) if job["stage"] == "writing"]
    head = line[-1].step if line else None
    top = max([s for s in (head, *(job["step"] for job in said.get("saves", ()))) if s is not None], default=None)
    levels = []
    if staged:
        step = max(job["step"] for job in staged)
        levels.append(Level("staged", "the training process dies", "ok", step, None, 0.0, 0))
    for tier in view.tiers:
        lost_if = "the power goes, or every process dies" if tier == "local" else "this machine and its disk are gone"
        if tier in view.unknown_remotes:
            levels.append(Level(tier, lost_if, "unknown"))
            continue
        held = next((info for info in reversed(line) if info.tiers.get(tier) == "complete"), None)
        if held is None:
            levels.append(Level(tier, lost_if, "none", lost_steps=top))
            continue
        until = now if is_training or not line else line[-1].created_at
        lost = max(0.0, (until - held.created_at).total_seconds())
        behind = (top or 0) - held.step
        state: Literal["ok", "behind"] = "behind" if behind > 0 else "ok"
        levels.append(Level(tier, lost_if, state, held.step, held.created_at, lost, max(0, behind)))
    return levels


def _verdict(view: RunView, levels: Sequence[Level], alarms: Sequence[Alarm]) -> Verdict:
    if any(alarm.severity == "critical" for alarm in alarms):
        return "not safe"
    if not view.line:
        return "looking" if view.unknown_remotes else "empty"
    if any(alarm.severity == "warning" for alarm in alarms):
        return "at risk"
    if all(level.state == "unknown" for level in levels):
        return "looking"
    return "safe"
