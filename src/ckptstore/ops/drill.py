"""`drill`: what a recovery would take, found out by doing it into a scratch folder that is removed at the end."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import ConfigError, IntegrityError, NoSpaceError
from ckptstore.ops.history import note_restored
from ckptstore.ops.open import RunTiers
from ckptstore.ops.transfer import restore
from ckptstore.ops.verify import verify
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.local import LocalTier
from ckptstore.repo.progress import Progress, ProgressCallback
from ckptstore.types import CheckpointInfo, StepLike


@dataclass(frozen=True)
class Drilled:
    """A recovery, measured.

    Attributes:
        restore_seconds: from the first request to a committed, verified local checkpoint.
        verify_seconds: reading every byte of it once more from the disk.
        received_bytes: over the wire, for the chunks.
        age_seconds: how old the checkpoint is now: the work that would be lost.
    """

    info: CheckpointInfo
    restore_seconds: float
    verify_seconds: float
    received_bytes: int
    age_seconds: float

    @property
    def rate_bytes_per_s(self) -> float:
        """Plain bytes restored per second."""
        return self.info.size_bytes / max(self.restore_seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.info.to_json(),
            "restore_seconds": self.restore_seconds,
            "verify_seconds": self.verify_seconds,
            "received_bytes": self.received_bytes,
            "age_seconds": self.age_seconds,
            "rate_bytes_per_s": self.rate_bytes_per_s,
        }


def drill(
    tiers: RunTiers,
    step: StepLike,
    *,
    scratch: Path | None = None,
    progress: ProgressCallback | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Drilled:
    """Restore from the remotes alone, as a fresh node would, verify what is on disk, and clean up.

    Args:
        tiers: A run with a remote; its local tier is left alone.
        step: Which checkpoint.
        scratch: Folder for the scratch store, best on the disk that a recovery would use; None: the temp folder.
        progress: Called often.
        clock: Time, for tests.

    Raises:
        ConfigError: there is no remote.
        NoSpaceError: the scratch disk has no room for it.
        IntegrityError: what arrived on the disk is damaged.
    """
    if not tiers.remotes:
        raise ConfigError("a drill needs a remote to recover from", hint="ckptctl drill s3://bucket/prefix")
    record = Catalog.read(None, tiers.remotes, tiers.run).resolve(step)
    with tempfile.TemporaryDirectory(prefix="ckptstore-drill-", dir=scratch, ignore_cleanup_errors=True) as folder:
        free = psutil.disk_usage(folder).free
        if free < record.summary.size_bytes * 1.02:
            raise NoSpaceError(
                f"{folder} has {free} bytes free, the checkpoint needs {record.summary.size_bytes}",
                hint="name a folder with room: --scratch DIR",
            )
        received = 0

        def watch(now: Progress) -> None:
            nonlocal received
            received = now.sent_bytes
            if progress is not None:
                progress(now)

        began = clock.monotonic()
        restored = restore(tiers, record.save_id, Path(folder) / "store", progress=watch)
        restore_seconds = clock.monotonic() - began
        found = verify(
            RunTiers(tiers.run, LocalTier(Path(folder) / "store"), ()), record.save_id, everything=False, read_data=True
        )
        if found.findings:
            first = found.findings[0]
            raise IntegrityError(f"the restored checkpoint is damaged: {first.what}", key=first.key, step=first.step)
        verify_seconds = clock.monotonic() - began - restore_seconds
    sources = ", ".join(remote.name for remote in tiers.remotes)
    note_restored(tiers.local, tiers.run, record.step, record.save_id, sources, clock=clock)
    age = (clock.now() - restored.info.created_at).total_seconds()
    return Drilled(restored.info, restore_seconds, verify_seconds, received, age)
