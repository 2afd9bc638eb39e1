"""The bytes of a committed checkpoint's shard files on this disk: read, verified, and repaired in place."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ckptstore.errors import IntegrityError
from ckptstore.format.manifest import digest
from ckptstore.repo.durable import READ_FLAGS
from ckptstore.repo.packs import Chunk

_log = logging.getLogger("ckptstore.repo")

_WRITE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class ShardFiles:
    """Reads chunks, of neighbours one after another. Of one thread.

    One file is open at a time: there are as many as ranks have saved, which may be more than a process may open.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, path: Path, chunk: Chunk, out: memoryview) -> None:
        """Exactly the chunk's bytes into ``out``, verified; after an error its content is undefined.

        Raises:
            IntegrityError: the file is too short, or holds something else.
            OSError: it is not here, or the disk fails.
        """
        if path is not self._path:  # comparing paths takes longer than reading a small chunk
            self._close()
            self._fd = os.open(path, READ_FLAGS)
            self._path = path
        done = 0
        while done < chunk.size_bytes:
            count = os.preadv(self._fd, [out[done:]], chunk.offset + done)
            if count == 0:
                raise IntegrityError(f"{path.name} is too short")
            done += count
        if digest(out) != chunk.digest:
            raise IntegrityError(f"{path.name} is damaged at byte {chunk.offset} or behind")

    def _close(self) -> None:
        if self._path is not None:
            self._path = None
            os.close(self._fd)


def repair(path: Path, file_bytes: int, chunk: Chunk, good: memoryview) -> bool:
    """Put a chunk's verified bytes where damaged ones are, durably; whether that was done.

    A committed checkpoint is immutable; this makes it what it was. A file that is missing or not of its size is left to
    a full restore. Failing is no failure of who reads, and is logged.
    """
    try:
        fd = os.open(path, _WRITE_FLAGS)
        try:
            if os.fstat(fd).st_size != file_bytes:
                return False
            done = 0
            while done < chunk.size_bytes:
                done += os.pwrite(fd, good[done:], chunk.offset + done)
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return False
    except OSError as error:
        _log.warning("can't repair %s: %s", path, error)
        return False
    return True
