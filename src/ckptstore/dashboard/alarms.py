"""What is wrong with a run, or soon will be: what it means, and the command that helps."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ckptstore.dashboard.agents import Uploading
from ckptstore.dashboard.source import RemoteLook, RunView
from ckptstore.dashboard.words import count, human_bytes, human_seconds

Severity = Literal["critical", "warning", "info"]

#: A save is overdue after this many usual intervals.
OVERDUE_INTERVALS = 3.0
#: An upload that lags by more than this, and by more than a few intervals, is news.
LAG_SECONDS = 600.0
#: Checkpoints that nobody has read back for so long are worth a word.
READ_BACK_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Alarm:
    """Something to look at: what it is, what it means, and the command that helps."""

    severity: Severity
    title: str
    hint: str
    command: str | None = None


class Alarms:
    """Each method looks for one kind of trouble."""

    def __init__(self, view: RunView, store: str, now: datetime, interval_s: float | None) -> None:
        self._view = view
        self._now = now
        self._interval_s = interval_s
        self._ctl = f"ckptctl -s {shlex.quote(store)} --run {view.run}"
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
                    f"ckptctl doctor {shlex.quote(look.url)}",
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
                    f"{self._ctl} push --all --remote {shlex.quote(url)}",
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
