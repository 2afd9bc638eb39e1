"""Every error a user can meet, in one tree.

::

    CkptError                                        code  also a
    ├── ConfigError                                   2    ValueError
    ├── StorageError                                  1    OSError
    │   ├── NotFoundError                             13   FileNotFoundError
    │   │   ├── NoStoreError                          10
    │   │   └── CheckpointNotFoundError               13
    │   ├── CheckpointExistsError                     14   FileExistsError
    │   ├── CredentialsError                          12   PermissionError
    │   ├── NoSpaceError                              15
    │   └── TransientError                            75   ConnectionError
    ├── LockedError                                   11
    ├── IntegrityError                                20
    │   └── ConflictError                             20
    ├── IncompleteCheckpointError                     21
    ├── FormatError                                   22
    ├── StateError                                    23   TypeError
    ├── LoadMismatchError                             23   KeyError
    ├── SaveFailedError                               30
    └── SaveTimeoutError                              75   TimeoutError
    Preempted (outside the tree)                      143  SystemExit

Each class owns its exit code. Each instance carries a message that says what happened, a ``hint`` that says what to
do, and a ``context`` of plain values (run, step, rank, tier, key, ...). All of them pickle.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CkptError(Exception):
    """Base of all errors raised by ckptstore.

    Args:
        message: One sentence, without a final line break.
        hint: What the reader can do about it, in the imperative.
        **context: Plain values that say where it happened: run, step, rank, tier, key, path, errno, ...
    """

    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str | None] = None

    def __init__(self, message: str, *, hint: str | None = None, **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint if hint is not None else self.default_hint
        self.context = context

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.context)


def _rebuild(cls: type[CkptError], message: str, hint: str | None, context: dict[str, Any]) -> CkptError:
    return cls(message, hint=hint, **context)


class ConfigError(CkptError, ValueError):
    """A setting, an argument or a name that can't be right; nothing was done."""

    exit_code = 2


class StorageError(CkptError, OSError):
    """A disk or an object store refused or failed; ``context['errno']`` names the errno where there is one."""

    exit_code = 1


class NotFoundError(StorageError, FileNotFoundError):
    """A named object is proven absent (never raised for an error, an empty or a short listing)."""

    exit_code = 13


class NoStoreError(NotFoundError):
    """There is no store at this path or URL."""

    exit_code = 10


class CheckpointNotFoundError(NotFoundError):
    """The store has no such run or checkpoint."""

    exit_code = 13


class CheckpointExistsError(StorageError, FileExistsError):
    """The target exists already and is never overwritten."""

    exit_code = 14


class CredentialsError(StorageError, PermissionError):
    """The object store does not accept the credentials, or they lack a right."""

    exit_code = 12


class NoSpaceError(StorageError):
    """Disk, quota or inode limit reached; what was begun is cleaned up and everything older is kept."""

    exit_code = 15


class TransientError(StorageError, ConnectionError):
    """Could not be done now: unreachable, throttled, cut off. Trying again later can help."""

    exit_code = 75


class LockedError(CkptError):
    """Somebody else holds the lock or lease."""

    exit_code = 11


class IntegrityError(CkptError):
    """Bytes differ from their digest and no good copy is left; the message names the parameter."""

    exit_code = 20


class ConflictError(IntegrityError):
    """A name that is written once holds other bytes than ours."""


class IncompleteCheckpointError(CkptError):
    """Some ranks' parts of this checkpoint are missing."""

    exit_code = 21


class FormatError(CkptError):
    """A file that isn't ours, is malformed, or was written by a newer version."""

    exit_code = 22


class StateError(CkptError, TypeError):
    """Something in the state can't be stored; names the key. Raised before a byte is written, on all ranks."""

    exit_code = 23


class LoadMismatchError(CkptError, KeyError):
    """The target doesn't fit the checkpoint (missing, unexpected, shape, dtype); nothing was changed."""

    exit_code = 23


class SaveFailedError(CkptError):
    """A save did not reach its level; the previous checkpoints are untouched and the next save works."""

    exit_code = 30


class SaveTimeoutError(CkptError, TimeoutError):
    """A wait ended before the level was reached; the work itself goes on."""

    exit_code = 75


class Preempted(SystemExit):
    """Raised in the training loop after an emergency save; uncaught, the process exits 128 + signal.

    A ``SystemExit``, so that ``except Exception`` in a training loop lets it pass.
    """

    def __init__(self, code: int = 143, message: str = "") -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message or f"preempted (exit code {self.code})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.message)
