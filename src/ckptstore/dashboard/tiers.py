"""Tiers that remember what cannot change, so that ten thousand checkpoints are read once.

A complete save is immutable, so its summary is read once per directory and time of change. A remote is asked when
:meth:`RememberedRemote.refresh` is called, never by a page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import CkptError
from ckptstore.format.manifest import RootManifest, Summary
from ckptstore.repo import names
from ckptstore.repo.local import LocalSave, LocalTier
from ckptstore.repo.local_save import look_at
from ckptstore.repo.remote import RemoteSave, RemoteTier

#: A directory changed more recently than this may change again within the same tick of the file system's clock.
SETTLED_NS = 1_000_000_000


class RememberedLocal(LocalTier):
    """A local tier that reads each finished save once."""

    def __init__(self, root: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(root, clock)
        self._seen: dict[tuple[str, str], tuple[int, LocalSave]] = {}

    def saves(self, run: str) -> list[LocalSave]:
        """As in the base class; a complete, whole save is read again only when its directory has changed."""
        found: list[LocalSave] = []
        here: set[tuple[str, str]] = set()
        now_ns = int(self.clock.now().timestamp() * 1e9)
        with self._scan(run) as entries:
            listed = [
                (*parsed, Path(entry.path), entry.stat(follow_symlinks=False).st_mtime_ns)
                for entry in entries
                if (parsed := names.parse_checkpoint_dir(entry.name)) and entry.is_dir(follow_symlinks=False)
            ]
        listed.sort(key=lambda item: (item[0], names.split_save_id(item[1])))
        for step, save_id, path, changed_ns in listed:
            key = (run, path.name)
            known = self._seen.get(key)
            if known is not None and known[0] == changed_ns:
                save: LocalSave | None = known[1]
            else:
                save = look_at(run, step, save_id, path)
            if save is None:
                continue
            found.append(save)
            if save.state == "complete" and save.damaged is None and now_ns - changed_ns > SETTLED_NS:
                self._seen[key] = changed_ns, save
                here.add(key)
        for key in [key for key in self._seen if key[0] == run and key not in here]:
            del self._seen[key]
        return found

    def fingerprint(self, run: str, folders: Sequence[Path] = ()) -> tuple[int, ...]:
        """Changes whenever a save, a pin or a timeline comes or goes, or one of ``folders`` changes; a few ``stat``."""
        path = self.run_path(run)
        return tuple(_changed_ns(folder) for folder in (path, path / names.PINS, path / names.TIMELINES, *folders))


def _changed_ns(path: Path) -> int:
    with suppress(OSError):
        return os.lstat(path).st_mtime_ns
    return 0


class RememberedRemote(RemoteTier):
    """A remote as it was when it was last asked.

    Attributes:
        error: why the last look failed; None if it did not.
        listed_at: monotonic time of the last good look; None before the first.
        revision: counts good looks that found something else than the one before.
    """

    def __init__(self, remote: RemoteTier) -> None:
        super().__init__(remote.blob, remote.run, remote.name)
        self.error: CkptError | None = None
        self.listed_at: float | None = None
        self.revision = 0
        self._saves: list[RemoteSave] = []
        self._pins: set[str] = set()
        self._summaries: dict[str, Summary] = {}
        self._roots: dict[str, RootManifest] = {}

    def refresh(self, monotonic: Callable[[], float]) -> bool:
        """Ask the remote; whether anything is new. An error keeps what was known and is kept beside it."""
        before = (self._saves, self._pins, None if self.error is None else str(self.error), self.listed_at is None)
        try:
            saves, pins = super().saves(), super().pins()
            self._saves, self._pins, self.error = saves, pins, None
            self.listed_at = monotonic()
        except CkptError as error:
            self.error = error
        now = (self._saves, self._pins, None if self.error is None else str(self.error), self.listed_at is None)
        if now != before:
            self.revision += 1
        return now != before

    def saves(self) -> list[RemoteSave]:
        """Of the last look."""
        return list(self._saves)

    def pins(self) -> set[str]:
        """Of the last look."""
        return set(self._pins)

    def summary(self, save: RemoteSave) -> Summary:
        """Read once."""
        found = self._summaries.get(save.save_id)
        if found is None:
            found = self._summaries[save.save_id] = super().summary(save)
        return found
