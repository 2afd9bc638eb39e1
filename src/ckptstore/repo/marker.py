"""The file that says a directory is a local tier of ours, and of which format."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from ckptstore.clock import new_nonce
from ckptstore.errors import FormatError
from ckptstore.format.manifest import Marker
from ckptstore.repo import durable, names
from ckptstore.repo.durable import raise_for_errno, read_bounded

_MAX_BYTES = 4096


def is_there(root: Path) -> bool:
    """Whether the root carries a marker that we can read on from.

    Raises:
        FormatError: the marker is damaged, or of a newer version than this ckptstore reads.
        StorageError: it can't be told.
    """
    file = root / names.MARKER
    try:
        data = read_bounded(file, _MAX_BYTES)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise FormatError(f"{root} is not a directory", path=str(root)) from None
    except OSError as error:
        raise_for_errno(error, f"can't read {file}")
    Marker.decode(data, what=str(file), max_bytes=_MAX_BYTES)
    return True


def leave(root: Path) -> None:
    """Make the root and put the marker there, durably; fine if somebody else just did.

    Raises:
        NoSpaceError, StorageError: as the disk said; trying again is safe.
    """
    try:
        _make_dirs(root)
        temporary = root / names.temporary_file(names.MARKER, new_nonce())
        durable.write_new(temporary, Marker.ours().encode())
        try:
            _publish(temporary, root / names.MARKER)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        durable.fsync_dir(root)
    except OSError as error:
        raise_for_errno(error, f"can't create a store in {root}")


def _publish(temporary: Path, marker: Path) -> None:
    """Give the marker its name unless somebody else just did; links say so, renames would overwrite."""
    try:
        os.link(temporary, marker)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(temporary, marker)  # a file system without hard links


def _make_dirs(path: Path) -> None:
    """``mkdir -p`` with each new name durable. An existing path may lead through symbolic links: it is the user's."""
    if path.is_dir():
        return
    _make_dirs(path.parent)
    durable.make_dir(path)
