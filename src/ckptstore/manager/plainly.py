"""Errors a person has to put right, told at the line that called us: what to do is in the message."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ckptstore.errors import ConfigError, CredentialsError, LoadMismatchError, NotFoundError, TransientError

log = logging.getLogger("ckptstore")

P = ParamSpec("P")
R = TypeVar("R")

#: Nothing in our own frames, or an SDK's, helps with these; anything else keeps its whole traceback.
_THEIRS = (ConfigError, CredentialsError, LoadMismatchError, NotFoundError, TransientError)


def plainly(call: Callable[P, R]) -> Callable[P, R]:
    """Raise such errors without the frames and causes below ``call``, which go to the log at DEBUG."""

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except _THEIRS as error:
            log.debug("%s failed", call.__name__, exc_info=True)
            raise error.with_traceback(None) from None

    return called
