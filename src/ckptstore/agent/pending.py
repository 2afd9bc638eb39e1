"""What waits for one remote: in which order it goes, how much of it is left, and what a policy leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError
from ckptstore.format.manifest import ShardManifest, Summary
from ckptstore.policy.retention import Retention
from ckptstore.repo import journal, names, timelines
from ckptstore.repo.catalog import LOCAL, Catalog
from ckptstore.repo.local import LocalSave, LocalTier
from ckptstore.repo.remote_names import RemoteSave

if TYPE_CHECKING:
    from ckptstore.repo.progress import Progress

#: How long a part of a save on several nodes counts as work while its siblings are missing.
SIBLING_PATIENCE_SECONDS = 60.0


@dataclass
class Upload:
    """One pending save on its way to this remote."""

    save: LocalSave
    state: str = "queued"
    attempts: int = 0
    due: float = 0.0
    pushed_at: float | None = None
    poll_seconds: float = 0.5
    error: CkptError | None = None
    is_reported: bool = False
    stored_bytes: int = 0
    sent_bytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    """How the last attempt came to its bytes, for people."""
    progress: Progress | None = None
    shards: list[ShardManifest] | None = None

    @property
    def age(self) -> tuple[float, int, int]:
        """Sorts older before newer. A part without the summary is of a job that runs on several nodes now."""
        save = self.save
        timeline = float("inf") if save.summary is None else float(save.summary.timeline)
        return timeline, save.step, names.split_save_id(save.save_id)[1]

    @property
    def plain_bytes(self) -> int:
        """Tensor bytes of the whole save, as far as is known."""
        if self.progress is not None:
            return self.progress.plain_total
        return self.save.summary.size_bytes if self.save.summary is not None else 0

    @property
    def plain_left(self) -> int:
        """Tensor bytes still to be dealt with."""
        return self.plain_bytes - (self.progress.plain_done if self.progress is not None else 0)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that only have to be sent."""
        return self.progress.waiting_bytes if self.progress is not None else 0

    def is_workable(self, now: float) -> bool:
        """Whether waiting for it can help."""
        if self.state == "failed":
            return False
        return self.pushed_at is None or now - self.pushed_at < SIBLING_PATIENCE_SECONDS

    def describe(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "save_id": self.save.save_id,
            "step": self.save.step,
            "state": self.state,
            "attempts": self.attempts,
            "sent_bytes": self.sent_bytes + (self.progress.sent_bytes if self.progress else 0),
            "plain_done_bytes": self.plain_bytes - self.plain_left,
            "plain_total_bytes": self.plain_bytes,
            "error": None if self.error is None else self.error.message,
        }


def may_leave_out(config: StoreConfig) -> bool:
    """Whether the configuration lets any save stay behind."""
    return config.upload_backlog is not None or not config.upload_superseded


def left_out(
    uploads: Collection[Upload], complete: Iterable[Summary], pinned: Collection[str], config: StoreConfig
) -> Iterator[tuple[Upload, str]]:
    """What need not be sent, with the reason. It follows from the local tier, so every agent finds the same.

    Args:
        uploads: What waits.
        complete: Every complete local save of the run.
        pinned: Always sent, as emergency saves are. So are saves of several nodes: one node's choice would leave the
            parts of the others waiting.
        config: ``upload_backlog`` and ``upload_superseded``.
    """
    line = {summary.save_id: number for number, summary in enumerate(timelines.current_line(complete))}
    for upload in uploads:
        summary = upload.save.summary
        if summary is None or summary.num_nodes > 1 or summary.emergency or summary.save_id in pinned:
            continue
        number = line.get(summary.save_id)
        if number is None:
            if not config.upload_superseded:
                yield upload, "it is superseded (upload_superseded=False)"
        elif config.upload_backlog is not None and (newer := len(line) - 1 - number) >= config.upload_backlog:
            yield upload, f"{newer} newer ones go first (upload_backlog={config.upload_backlog})"


def remote_rules(tier: LocalTier, run: str) -> Retention | None:
    """What the run's manager keeps on remotes, as far as the journal tells."""
    records = journal.read(tier, run, "rules")
    return Retention.noted(records[-1].get("remote")) if records else None


def dropped_there(
    uploads: Collection[Upload], tier: LocalTier, run: str, newest: RemoteSave, rules: Retention
) -> Iterator[tuple[Upload, str]]:
    """What the remote's retention has dropped, or would drop on arrival, with the reason.

    That is only asked of saves older than the remote's newest: whatever is new goes there, and its manager sees to it.

    Args:
        uploads: What waits.
        newest: The newest save that the remote holds.
        rules: Its retention.
    """
    infos = [record.info() for record in Catalog.read(tier, (), run).records]
    there = [replace(info, tiers={"there": "complete"}) for info in infos if info.tiers.get(LOCAL) == "complete"]
    dropped = {info.save_id for info in rules.decide(there, "there").drop}
    for upload in uploads:
        summary = upload.save.summary
        is_older = summary is not None and (summary.timeline, summary.step) < (newest.timeline, newest.step)
        if is_older and upload.save.save_id in dropped:
            yield upload, "the remote's retention keeps newer ones"
