"""What waits for one remote: in which order it goes, how much of it is left, and what a policy leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError
from ckptstore.format.manifest import ShardManifest, Summary
from ckptstore.repo import names, timelines
from ckptstore.repo.local import LocalSave

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
