"""What happened to a run, line by line, for people and for the dashboard; nothing that is durable depends on it.

Files that only grow, beside the checkpoints, so that they outlive the checkpoints they speak of::

    <root>/<run>/journal/verified.jsonl     looks at copies of checkpoints, and restores that were checked
    <root>/<run>/journal/jobs.jsonl         jobs that ended without a goodbye
    <root>/<run>/journal/rules.jsonl        the retention in force; the last line counts
    <root>/<run>/journal/live.jsonl         metrics between checkpoints, from rank 0's manager

One JSON object a line, each with a ``time``. Several processes may append at once. A file that has grown too long is
thinned: the older half loses every other line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ckptstore.clock import new_nonce
from ckptstore.errors import CkptError
from ckptstore.repo import durable, names
from ckptstore.repo.local import LocalTier

Name = Literal["verified", "jobs", "rules", "live"]

#: A file is thinned when it is longer; a reader looks at no more than twice as much.
MAX_BYTES = 2 << 20


def append(tier: LocalTier, run: str, name: Name, records: Iterable[Mapping[str, Any]]) -> None:
    """Add these records. Never fails: a line in a journal is not worth a save."""
    with suppress(OSError, CkptError, TypeError, ValueError):
        data = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records).encode()
        path = path_of(tier, run, name)
        if not path.parent.is_dir():
            durable.make_dir(path.parent)
        with _locked(path.parent):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, data)
                is_long = os.fstat(fd).st_size > MAX_BYTES
            finally:
                os.close(fd)
            if is_long:
                _thin(path)


def read(tier: LocalTier, run: str, name: Name) -> list[dict[str, Any]]:
    """Every record, oldest first; lines that a crash has torn are left out. Empty if there is nothing."""
    try:
        data = durable.read_bounded(path_of(tier, run, name), 2 * MAX_BYTES)
    except (OSError, CkptError):
        return []
    found = []
    for line in data.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def path_of(tier: LocalTier, run: str, name: Name) -> Path:
    """Where the file is, once there is one."""
    return tier.run_path(run) / names.JOURNAL / f"{name}.jsonl"


def _thin(path: Path) -> None:
    kept = path.read_bytes().splitlines(keepends=True)
    while len(kept) > 1 and sum(map(len, kept)) > MAX_BYTES:
        half = len(kept) // 2
        kept = [*kept[:half:2], *kept[half:]] if half > 1 else kept[half:]
    temporary = path.with_name(f".{path.name}-{new_nonce()}")
    fd = durable.create_file(temporary)
    try:
        durable.write_all(fd, b"".join(kept))
    finally:
        os.close(fd)
    os.replace(temporary, path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder while appending, so that no line goes into a file that is being thinned."""
    fd = os.open(folder, durable.DIRECTORY_FLAGS)
    try:
        with suppress(OSError):  # a file system without locks: a line may be lost then, which is all
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
