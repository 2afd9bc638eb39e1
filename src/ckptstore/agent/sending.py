"""One save on its way to one remote: the push, what is noted of it, and what is told when it is there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ckptstore.agent.libc import libc
from ckptstore.agent.line import RemoteLine
from ckptstore.agent.pace import pack_bytes
from ckptstore.agent.pending import Upload
from ckptstore.agent.protocol import Event
from ckptstore.clock import Clock
from ckptstore.config import StoreConfig
from ckptstore.format.manifest import RootManifest, Summary
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.repo.progress import Progress

log = logging.getLogger("ckptstore.agent")

#: Of the saves that one refers to, so many are told.
MAX_TOLD_BASES = 16


def send(
    upload: Upload,
    tier: LocalTier,
    line: RemoteLine,
    config: Callable[[], StoreConfig],
    clock: Clock,
    *,
    is_cut_short: Callable[[], bool],
    going: Callable[[], None],
) -> RootManifest | None:
    """Push this save and note in ``upload`` how far it came. Blocks.

    Args:
        upload: The save.
        tier: Where it is.
        line: Where to.
        config: That of the moment: a trainer may attach with another one meanwhile.
        clock: For the pace.
        is_cut_short: Asked often: whether to leave it for now.
        going: Told whenever bytes have gone through.

    Returns:
        The root manifest once the save is committed; None while it was cut short, or other ranks are missing.
    """
    from ckptstore.repo.upload import push

    sent_bytes = 0

    def note(progress: Progress) -> None:
        nonlocal sent_bytes
        upload.progress = progress
        line.pace.note(clock.monotonic(), progress.plain_done, progress.sent_bytes)
        if progress.sent_bytes > sent_bytes:
            sent_bytes = progress.sent_bytes
            going()
        line.apply_cap(config())

    cap = line.apply_cap(config())
    line.pace.begin(clock.monotonic())
    upload.attempts += 1
    upload.state = "uploading"
    remote = line.remote(config())
    result = push(
        tier,
        upload.save.path,
        remote.run,
        remote,
        config=config().model_copy(update={"pack_bytes": pack_bytes(config(), cap)}),
        progress=note,
        cancelled=is_cut_short,
    )
    upload.sent_bytes += result.sent_bytes
    upload.stored_bytes = max(upload.stored_bytes, result.stored_bytes)
    upload.details = {
        "reused_bytes": result.reused_bytes,
        "by_codec": {name: list(sizes) for name, sizes in result.bytes_by_codec.items()},
        "rests_on": list(result.rests_on[-MAX_TOLD_BASES:]),
        "encode_seconds": round(result.encode_seconds, 6),
    }
    upload.progress = None
    if result.is_cancelled:
        upload.state = "queued"
    elif result.committed is None:
        upload.state = "waiting"
        upload.shards = tier.shard_manifests_present(upload.save.path)
        upload.pushed_at = clock.monotonic()
    return result.committed


def uploaded(upload: Upload, summary: Summary, run: str, remote: str) -> Event:
    """What trainers hear of a save that is committed on this remote now; also goes to the log."""
    log.info(
        "save %s of %s, step %d, is on %s: %d bytes sent, %d stored",
        *(summary.save_id, run, summary.step, remote, upload.sent_bytes, upload.stored_bytes),
        extra={
            "run": run,
            "step": summary.step,
            "save_id": summary.save_id,
            "remote": remote,
            "event": "uploaded",
            "bytes": upload.sent_bytes,
        },
    )
    told = {
        "remote": remote,
        "stored_bytes": upload.stored_bytes,
        "sent_bytes": upload.sent_bytes,
        **upload.details,
        "summary": summary.model_dump(mode="json"),
    }
    return Event("remote", summary.save_id, summary.step, told)


def order(summary: Summary) -> tuple[int, int]:
    """Sorts older saves before newer ones."""
    return summary.timeline, summary.step


def trim_memory() -> None:
    """Give freed pack buffers back to the system: an idle agent is small."""
    with suppress(AttributeError, OSError):
        libc().malloc_trim(0)
