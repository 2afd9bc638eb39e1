"""Is this training safe? What each kind of loss would cost now, and what to do about it: pure functions of a view."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from ckptstore.dashboard.agents import Uploading
from ckptstore.dashboard.source import RemoteLook, RunView
from ckptstore.dashboard.words import count, human_bytes, human_seconds
from ckptstore.types import CheckpointInfo, json_number

Severity = Literal["critical", "warning", "info"]
Verdict = Literal["safe", "at risk", "not safe", "empty", "looking"]

#: A save is overdue after this many usual intervals.
OVERDUE_INTERVALS = 3.0
#: An upload that lags by more than this, and by more than a few intervals, is news.
LAG_SECONDS = 600.0
#: Checkpoints that nobody has read back for so long are worth a word.
READ_BACK_SECONDS = 7 * 86400.0


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
class Alarm:
    """Something to look at: what it is, what it means, and the command that helps."""

    severity: Severity
    title: str
    hint: str
    command: str | None = None


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
    alarms = _Alarms(view, store, now, interval).all(
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


class _Alarms:
    """Each method looks for one kind of trouble."""

    def __init__(self, view: RunView, store: str, now: datetime, interval_s: float | None) -> None:
        self._view = view
        self._now = now
        self._interval_s = interval_s
        self._ctl = f"ckptctl -s {_quoted(store)} --run {view.run}"
        self._found: list[Alarm] = []

    def all(
        self,
        *,
        agent: dict[str, Any] | None,
        said: dict[str, Any],
        uploads: Sequence[Uploading],
        looks: Sequence[RemoteLook],
        disk: tuple[int, int] | None,
        is_training: bool,
        read_back_at: datetime | None,
    ) -> list[Alarm]:
        self._damage()
        self._remotes(looks, uploads, agent)
        self._disk(disk)
        self._saving(said, is_training)
        self._newest()
        self._read_back(read_back_at)
        if self._view.has_local and not self._view.remote_names and self._view.line:
            self._add(
                "info",
                "no remote was named",
                "these checkpoints are shown for this machine only; if there is a bucket, name it with --remote",
            )
        order = {"critical": 0, "warning": 1, "info": 2}
        return sorted(self._found, key=lambda alarm: order[alarm.severity])

    def _add(self, severity: Severity, title: str, hint: str, command: str | None = None) -> None:
        self._found.append(Alarm(severity, title, hint, command))

    def _damage(self) -> None:
        view = self._view
        for damaged in view.catalog.damaged:
            self._add(
                "critical",
                f"step {damaged.step} is damaged: {damaged.reason}",
                "no tier can describe this checkpoint any more; verify tells what is left of it",
                f"{self._ctl} verify {damaged.save_id}",
            )
        hurt = [info for info in view.infos if "damaged" in info.tiers.values()]
        if hurt:
            steps = ", ".join(str(info.step) for info in hurt[-5:])
            self._add(
                "warning",
                f"{count(len(hurt), 'checkpoint')} damaged in one tier: step {steps}",
                "another tier still has it; verify names the files",
                f"{self._ctl} verify --all",
            )

    def _remotes(self, looks: Sequence[RemoteLook], uploads: Sequence[Uploading], agent: dict[str, Any] | None) -> None:
        view = self._view
        for look in looks:
            if look.error is not None:
                old = "it was never seen" if look.age_s is None else f"last seen {human_seconds(look.age_s)} ago"
                self._add(
                    "warning",
                    f"{look.name} can't be read: {look.error.message}",
                    f"{look.error.hint or 'check network and credentials'}; {old}",
                    f"ckptctl doctor {_quoted(look.url)}",
                )
        for upload in uploads:
            if upload.error is not None:
                self._add(
                    "critical" if upload.is_refused else "warning",
                    f"uploads to {upload.remote} {'are refused' if upload.is_refused else 'fail'}: {upload.error}",
                    "nothing is lost while the local disk holds; uploads go on by themselves once the cause is gone",
                    f"{self._ctl} agent logs",
                )
            for row in upload.waiting:
                if row.get("state") == "failed":
                    self._add(
                        "critical",
                        f"step {row['step']} can't be uploaded to {upload.remote}: {row.get('error')}",
                        "verify tells whether the local copy is whole",
                        f"{self._ctl} verify {row['save_id']}",
                    )
            limit = max(LAG_SECONDS, 3 * (self._interval_s or 0.0))
            if upload.waiting and upload.lag_s > limit:
                self._add(
                    "warning",
                    f"uploads to {upload.remote} lag by {human_seconds(upload.lag_s)}",
                    "checkpoints come faster than they can be sent, or the network is slow",
                    f"{self._ctl} status",
                )
        for name in view.remote_names:
            if name in view.unknown_remotes or not view.has_local:
                continue
            missing = [i for i in view.line if i.tiers.get(name) != "complete" and i.tiers.get("local") == "complete"]
            queued = {row["save_id"] for upload in uploads if upload.remote == name for row in upload.waiting}
            idle = [info for info in missing if info.save_id not in queued]
            # A save that is seconds old may be in the agent's hands between two looks.
            idle = [info for info in idle if agent is None or (self._now - info.created_at).total_seconds() > 30]
            if idle and idle[-1] is view.line[-1]:
                url = next((look.url for look in looks if look.name == name), "URL")
                size = human_bytes(sum(info.size_bytes for info in idle))
                self._add(
                    "warning",
                    f"{count(len(idle), 'checkpoint')} ({size}) not on {name}, and nobody is uploading",
                    "they are on this machine's disk only; push sends what is missing",
                    f"{self._ctl} push --all --remote {_quoted(url)}",
                )

    def _disk(self, disk: tuple[int, int] | None) -> None:
        if disk is None or not self._view.line:
            return
        free, _ = disk
        size = self._view.line[-1].size_bytes
        if size and free < 3 * size:
            fits = free // size
            self._add(
                "critical" if fits < 1 else "warning",
                f"{human_bytes(free)} free: room for {count(fits, 'more checkpoint')}",
                "a full disk makes saves fail; keep fewer, or delete what is on a remote",
                f"{self._ctl} list --all",
            )

    def _saving(self, said: dict[str, Any], is_training: bool) -> None:
        line = self._view.line
        if said.get("failures"):
            self._add(
                "warning",
                f"{count(int(said['failures']), 'save')} failed since the agent started",
                "training went on; the log says why",
                f"{self._ctl} agent logs",
            )
        if is_training and line and self._interval_s is not None:
            since = (self._now - line[-1].created_at).total_seconds()
            if since > max(60.0, OVERDUE_INTERVALS * self._interval_s) and not said.get("saves"):
                self._add(
                    "warning",
                    f"no checkpoint for {human_seconds(since)}, usually one every {human_seconds(self._interval_s)}",
                    "training may hang, or saves are skipped",
                    f"{self._ctl} status",
                )
        if self._view.catalog.prepared and not is_training:
            number = len(self._view.catalog.prepared)
            self._add(
                "info",
                f"{count(number, 'save')} begun but never completed",
                "parts of other nodes are missing; such saves are never loaded",
                f"{self._ctl} list --all",
            )

    def _read_back(self, at: datetime | None) -> None:
        """A checkpoint nobody has ever read is a hope. Said for runs that are old enough to have something to lose."""
        first = self._view.infos[0].created_at if self._view.infos else self._now
        since = at if at is not None else first
        if self._view.has_local and (self._now - since).total_seconds() > READ_BACK_SECONDS:
            never = f"no checkpoint was read back for {human_seconds((self._now - since).total_seconds())}"
            self._add(
                "info",
                never if at is not None else "no checkpoint of this run was ever read back whole, as far as noted here",
                "a drill restores one into scratch, checks every byte, and says how long a recovery takes",
                f"{self._ctl} drill" if self._view.remote_names else f"{self._ctl} verify --read-data",
            )

    def _newest(self) -> None:
        if not self._view.line:
            return
        newest = self._view.line[-1]
        bad = [name for name, value in newest.metrics.items() if value - value != 0]
        if "suspect" in newest.tags or bad:
            what = f"{', '.join(bad)} not finite" if bad else "values that are not finite"
            self._add(
                "warning",
                f"step {newest.step} has {what}",
                "the training may have diverged; an earlier checkpoint can be loaded by its step",
                f"{self._ctl} list",
            )


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
