"""`gc`: in buckets, what no checkpoint needs; in the local tier, what crashes left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptstore.errors import TransientError
from ckptstore.ops.open import Place
from ckptstore.repo import gc, names
from ckptstore.repo.local import LocalTier

#: Local leftovers younger than this may be somebody's work: another node's, or a restore's.
LOCAL_GRACE_SECONDS = 3600.0


@dataclass
class Collection:
    """What was, or would be, done: per remote and run, and in the local tier."""

    remotes: dict[str, list[gc.Collected]] = field(default_factory=dict)
    local: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "remotes": {name: [run.to_json() for run in runs] for name, runs in self.remotes.items()},
            "local_leftovers": self.local,
        }

    @property
    def is_empty(self) -> bool:
        """Nothing to delete now."""
        return not self.local and not any(run.deleted for runs in self.remotes.values() for run in runs)


def collect_garbage(
    place: Place,
    run: str | None,
    *,
    rules: gc.Rules,
    part: tuple[int, int] = (0, 1),
    dry_run: bool = False,
    progress: gc.MarkProgress | None = None,
) -> Collection:
    """Collect one run, or all of them.

    Raises:
        CkptError: as :func:`ckptstore.repo.gc.collect`.
    """
    from ckptstore.repo.remote import runs as runs_of

    found = Collection()
    for name, blob in place.blobs.items():
        runs = [run] if run is not None else runs_of(blob)
        if dry_run:
            found.remotes[name] = gc.preview(blob, name, runs, rules=rules, part=part, progress=progress)
        else:
            found.remotes[name] = gc.collect(blob, name, runs, rules=rules, part=part, progress=progress)
    if place.local is not None and place.local.exists() and part[0] == 0:
        found.local = _sweep_local(place.local, [run] if run is not None else place.local.runs(), dry_run)
    return found


def _sweep_local(tier: LocalTier, runs: Sequence[str], dry_run: bool) -> list[str]:
    """Staging and half-deleted directories nobody has touched for long. A running agent looks after its own."""
    if _agent_runs(tier.root):
        return []
    swept = []
    for run in runs:
        left = _leftovers(tier.run_path(run))
        old = {save_id for save_id, touched in left.items() if time.time() - touched > LOCAL_GRACE_SECONDS}
        if dry_run:
            swept += [f"{run}/{save_id}" for save_id in sorted(old)]
        else:
            swept += [f"{run}/{name}" for name in tier.sweep(run, live=set(left) - old)]
    return swept


def _agent_runs(root: Path) -> bool:
    from ckptstore.agent.client import AgentClient

    try:
        client = AgentClient.observe(root)
    except TransientError:
        return True  # it is there, only busy
    if client is not None:
        client.close()
    return client is not None


def _leftovers(run: Path) -> dict[str, float]:
    """save_id of each staging or half-deleted directory -> when it, or a file in it, was last touched."""
    found: dict[str, float] = {}
    with suppress(OSError), os.scandir(run) as entries:
        for entry in entries:
            save_id = names.parse_staging_dir(entry.name) or names.parse_deleting_dir(entry.name)
            if save_id is None or not entry.is_dir(follow_symlinks=False):
                continue
            touched = entry.stat(follow_symlinks=False).st_mtime
            with suppress(OSError), os.scandir(entry.path) as files:
                touched = max([touched, *(file.stat(follow_symlinks=False).st_mtime for file in files)])
            found[save_id] = max(found.get(save_id, 0.0), touched)
    return found
