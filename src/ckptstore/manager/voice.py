"""What the manager says: to the user's logger, or, where nobody listens to logs, to rank 0's stderr."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any


class Voice:
    """Says each line once, on rank 0; other ranks log it at DEBUG.

    Args:
        logger: where to; None: the logger "ckptstore".
    """

    def __init__(self, logger: logging.Logger | None) -> None:
        self._logger = logger if logger is not None else logging.getLogger("ckptstore")
        self._said: set[str] = set()

    @property
    def has_listeners(self) -> bool:
        """Whether some logging handler would show what is logged."""
        current: Any = self._logger
        while current is not None:
            if any(not isinstance(handler, logging.NullHandler) for handler in current.handlers):
                return True
            current = current.parent if current.propagate else None
        return False

    def say(self, text: str, level: int = logging.INFO) -> None:
        """A line the user should see."""
        if not is_first_rank():
            self._logger.debug("%s", text)
        elif self.has_listeners:
            self._logger.log(level, "%s", text)
        else:
            print_line(text)

    def warn(self, text: str) -> None:
        """Something to look at; the same words are said once."""
        if text not in self._said:
            self._said.add(text)
            self.say(text, logging.WARNING)

    def ask(self, text: str) -> None:
        """A question at the terminal, whoever else reads logs."""
        if is_first_rank():
            print_line(text)

    def note_failure(self, text: str) -> None:
        """A failed save: the store has logged it, so only print it where logs go nowhere."""
        if is_first_rank() and not self.has_listeners:
            print_line(text)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone, as far as is known by now."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def print_line(text: str) -> None:
    """One line on stderr, unbuffered and safe in a signal handler; a closed stderr is not an error."""
    with suppress(OSError, ValueError):
        try:
            fd = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # replaced by something that isn't a file
            print(f"ckptstore: {text}", file=sys.stderr, flush=True)  # noqa: T201  # this is how it is said
            return
        os.write(fd, f"ckptstore: {text}\n".encode(errors="replace"))
