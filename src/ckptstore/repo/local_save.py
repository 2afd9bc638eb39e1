"""One save as its local directory shows it: looked at for a listing, or taken away.

A listing reads one small file per save, ``summary.json``, and falls back to the manifest. What it can't read it
reports as damaged; a save is never left out because of what is in its files.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptstore.clock import new_nonce
from ckptstore.errors import CkptError, FormatError
from ckptstore.format.manifest import MAX_MANIFEST_BYTES, MAX_SUMMARY_BYTES, RootManifest, ShardManifest, Summary
from ckptstore.repo import directory, names
from ckptstore.repo.durable import raise_for_errno, read_bounded

logger = logging.getLogger(__name__)

#: What makes one file unreadable; other errors (no descriptors, no memory) say nothing about the file and raise.
_UNREADABLE = frozenset({errno.EIO, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR, errno.ENOTDIR})


@dataclass(frozen=True)
class LocalSave:
    """One save as this tier has it.

    Attributes:
        path: Its directory.
        state: ``prepared``: parts of it are durable here, but it is not committed here; never use it as a checkpoint.
        summary: None when it is damaged, or prepared without rank 0's part.
        damaged: Why the summary can't be told, in words; None when all is well.
    """

    step: int
    save_id: str
    path: Path
    state: Literal["prepared", "complete"]
    summary: Summary | None = None
    damaged: str | None = None


def look_at(run: str, step: int, save_id: str, path: Path) -> LocalSave | None:
    """One save as its directory shows it; None when it was deleted meanwhile."""
    damage: list[str] = []
    complete = directory.file_bytes(path / names.MANIFEST)
    summary = _summary(run, step, save_id, path, damage, complete=complete is not None)
    if summary is None and complete is None and not path.exists():
        return None
    if complete == 0:
        damage.append(f"{names.MANIFEST} is empty")
    return LocalSave(
        step=step,
        save_id=save_id,
        path=path,
        state="prepared" if complete is None else "complete",
        summary=summary,
        damaged="; ".join(damage) if damage and (summary is None or complete == 0) else None,
    )


def _summary(run: str, step: int, save_id: str, path: Path, damage: list[str], *, complete: bool) -> Summary | None:
    """The summary from the cheapest file that has it: its own, the root manifest, or rank 0's manifest."""
    sources = [(names.SUMMARY, MAX_SUMMARY_BYTES)]
    sources.append((names.MANIFEST if complete else names.shard_manifest_file(0), MAX_MANIFEST_BYTES))
    for name, max_bytes in sources:
        try:
            data = read_bounded(path / name, max_bytes)
            if name == names.SUMMARY:
                summary = Summary.decode(data, what=name, max_bytes=max_bytes)
            elif complete:
                summary = directory.check_root(RootManifest.decode(data, what=name), what=name).summary
            else:
                head = ShardManifest.decode(data, what=name).summary
                if head is None:
                    raise FormatError(f"{name} has no summary")
                summary = head
            return directory.check_summary(summary, run=run, step=step, save_id=save_id, what=name)
        except FileNotFoundError:
            if complete:
                damage.append(f"{name} is missing")
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise_for_errno(error, f"can't read {path / name}", run=run, save_id=save_id)
            damage.append(f"{name}: {os.strerror(error.errno)}")
        except CkptError as error:
            damage.append(error.message)
    return None


def remove_checkpoint(path: Path) -> None:
    """Remove a half-deleted checkpoint directory; what we did not write is kept under a name that is not ours."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    foreign = []
    for entry in entries:
        ours = names.is_checkpoint_file(entry.name) or names.is_temporary_file(entry.name)
        if ours and not entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
        else:
            foreign.append(entry.name)
    if foreign:
        save_id = names.parse_deleting_dir(path.name) or path.name
        kept = path.with_name(names.kept_dir(save_id, new_nonce()))
        os.rename(path, kept)
        logger.warning("files that are not ours stay in %s: %s", kept, ", ".join(sorted(foreign)))
        return
    with suppress(FileNotFoundError):
        path.rmdir()
