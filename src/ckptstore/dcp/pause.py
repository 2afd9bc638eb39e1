"""No garbage collection while training waits: a full collection looks at everything that torch has made."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Leave cycles alone for the time being; they are few, and found afterwards.

    Saves and loads make many short-lived objects, so they would set off collections all along. Each one stops every
    thread, for 0.1 s where there is a large model: a sixth of a load's CPU time was that. Process-wide; of several at a
    time the first to begin lets collections happen again. A child forked meanwhile collects as usual.
    """
    global _is_paused
    if not gc.isenabled():
        yield
        return
    try:
        _is_paused = True
        gc.disable()
        yield
    finally:
        gc.enable()
        _is_paused = False


_is_paused = False


def _resume_in_child() -> None:
    if _is_paused:
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume_in_child)
