"""Where the agent listens: a socket under its name, also after somebody has cleaned the temp folder up."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from ckptstore.agent.runtime import RuntimeDir, listen, try_lock
from ckptstore.errors import CkptError

log = logging.getLogger("ckptstore.agent")


class Listener:
    """A listening socket. One thread accepts, another mends and closes.

    Args:
        directory: runtime folder; the caller holds its lock.
    """

    def __init__(self, directory: RuntimeDir) -> None:
        self._directory = directory
        self._lock = _identity(directory.lock)
        self._socket = listen(directory.socket)
        self._name = _identity(directory.socket)

    def accept(self) -> socket.socket:
        """The next connection. Blocks; raises OSError when the socket was closed or replaced meanwhile."""
        return self._socket.accept()[0]

    def mend(self) -> None:
        """Listen under our name again if that is gone, unless another agent has taken our place."""
        if _identity(self._directory.socket) == self._name is not None:
            return
        try:
            self._directory.create()
            if self._lock is None or _identity(self._directory.lock) != self._lock:
                lock = try_lock(self._directory.lock)
                if lock is None:
                    return
                os.write(lock, f"{os.getpid()}\n".encode())  # held from now on
                self._lock = _identity(self._directory.lock)
            old, self._socket = self._socket, listen(self._directory.socket)
            self._name = _identity(self._directory.socket)
        except (OSError, CkptError) as error:
            log.warning("nobody can connect, the runtime directory was removed: %s", error)
            return
        log.warning("listening again: somebody had removed %s", self._directory.socket)
        with suppress(OSError):
            old.shutdown(socket.SHUT_RDWR)  # whoever waits in accept() wakes up
        old.close()

    def close(self) -> None:
        """Nobody can connect any more."""
        if _identity(self._directory.socket) == self._name:
            with suppress(OSError):
                self._directory.socket.unlink()
        self._socket.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
